"""A model to train, whole or through LoRA adapters, and the adapters on disk in PEFT's format.

That is adapter_config.json and adapter_model.safetensors. A tensor is named `base_model.model.{layer}.lora_A.weight`,
the layer's name being the base model's own.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from minixllm import distributed
from minixllm.errors import UserError
from minixllm.files import atomic_write, read_json, write_json
from minixllm.models import lora
from minixllm.models.architectures import ARCHITECTURES
from minixllm.models.lora import LoraConfig, add_lora, is_adapter
from minixllm.settings import setting
from minixllm.weights import hf_directory
from minixllm.weights.safetensors_files import read_header

PREFIX = "base_model.model."
# Settings that plain LoRA has or that change nothing it computes; any other that is set makes it something else.
PLAIN = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
         "inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "init_lora_weights",
         "eva_config", "megatron_core", "qalora_group_size"}
# Initial weights that leave the base as it is. "pissa", "olora", "corda", "loftq" and others subtract from it.
INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass
class LoraSettings:
    lora_r: int = setting(0, "rank of LoRA adapters beside a frozen base; 0: no adapters, every weight is trained",
                          least=0)
    lora_alpha: float = setting(16.0, "LoRA's scale: what adapters add is multiplied by alpha / r", above=0)
    lora_targets: list[str] = setting([], "names of the linear layers to adapt; none: q_proj v_proj in LLaMA, "
                                          "query_key_value in BLOOM")


def open_model(config, world, settings, directory=None, frozen=False):
    """The model to train, sharded and filled: from `directory`, or with random weights where that is None.

    With settings.lora_r the base is frozen and held once, in bf16 (fp32 with --dtype float32), and only adapters train.
    frozen: nothing trains, and the weights are held in the type that is computed in, which changes no number.
    """
    dtype = distributed.compute_dtype(settings.dtype, world.device)
    adapted = settings.lora_r > 0
    held = dtype if frozen else torch.bfloat16 if adapted and settings.dtype != "float32" else torch.float32
    model = hf_directory.build(config, held)
    if adapted:
        add_lora(model, lora_config(config, settings))
    elif not frozen and world.first and (settings.lora_targets or settings.lora_alpha != LoraSettings.lora_alpha):
        print("every weight is trained: lora_alpha and lora_targets count only with --lora-r, a rank above 0")
    distributed.shard(model, world, dtype)
    if directory:
        hf_directory.load_weights(model, directory, world.device)
    else:
        hf_directory.initialise(model, settings.seed, world.device)
    if adapted:
        lora.initialise(model, settings.seed)
    return model


def lora_config(config, settings) -> LoraConfig:
    targets = settings.lora_targets or ARCHITECTURES[config.model_type].LORA_TARGETS
    dropout = getattr(settings, "lora_dropout", 0.0)  # preference optimisation has none
    return LoraConfig(settings.lora_r, settings.lora_alpha, dropout, tuple(targets))


def save_trained(model, settings, tokenizer):
    """Write output/model and, under LoRA, output/adapter, the adapters being merged into the model. A collective."""
    output = Path(settings.output)
    if settings.lora_r:
        save_adapter(model, output / "adapter", lora_config(model.config, settings), settings.model)
        lora.merge(model)
    kept = hf_directory.read_generation_config(settings.model) if settings.model else None
    hf_directory.save_model(model, output / "model", tokenizer, kept)
    if distributed.is_first():
        print(f"\nsaved {output / 'model'}" + f" and {output / 'adapter'}" * bool(settings.lora_r))


def save_adapter(model, directory, config: LoraConfig, base: str | None = None):
    """Write the model's adapters, in fp32. A collective. `base`: where the base model is, for who opens the adapter."""
    tensors = {PREFIX + name: distributed.full_tensor(parameter).detach().cpu().contiguous()
               for name, parameter in model.named_parameters() if is_adapter(name)}
    if distributed.is_first():
        directory = Path(directory)
        with atomic_write(directory / "adapter_model.safetensors", "wb") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        write_json(directory / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "inference_mode": True, "init_lora_weights": True, "bias": "none", "fan_in_fan_out": False,
            "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
            "target_modules": list(config.target_modules)})


def load(directory, dtype=torch.float32, device="cpu"):
    """(model in eval mode, tokenizer) of a Hugging Face directory, or of a PEFT adapter: its base with it merged in."""
    base = base_directory(directory)
    model, tokenizer = hf_directory.load(base, dtype, device)
    if base != Path(directory):
        add_lora(model, read_adapter_config(directory))
        load_adapter(model, directory)
        lora.merge(model)
    return model.eval(), tokenizer


def base_directory(directory) -> Path:
    """The directory of the model that an adapter directory was made for; any other directory itself."""
    directory = Path(directory)
    path = directory / "adapter_config.json"
    if not path.exists() or (directory / "config.json").exists():
        return directory
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not (Path(base) / "config.json").exists():
        relative = isinstance(base, str) and not Path(base).is_absolute()  # taken as peft takes it
        raise UserError(f"{path}: base_model_name_or_path: found {base!r}, expected the directory of the adapted model"
                        + f"; a relative path starts from the working directory, here {Path.cwd()}" * relative)
    return Path(base)


def read_adapter_config(directory) -> LoraConfig:
    """The settings of an adapter directory. Raises UserError, by name, for what is not plain LoRA."""
    path = Path(directory) / "adapter_config.json"
    saved = read_json(path)
    if saved.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type: found {saved.get('peft_type')!r}, expected 'LORA'")
    for key, value in saved.items():
        if value and key not in PLAIN:
            raise UserError(f"{path}: {key}: found {value!r}, expected plain LoRA without it")
    if (init := saved.get("init_lora_weights", True)) not in INITS:
        raise UserError(f"{path}: init_lora_weights: found {init!r}, which changes the base model's weights; expected "
                        f"one of {', '.join(map(str, INITS))}")
    if saved.get("bias", "none") != "none":
        raise UserError(f"{path}: bias: found {saved['bias']!r}, expected 'none'")
    targets = saved.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{path}: target_modules: found {targets!r}, expected a list of layer names")
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
        if not isinstance(saved.get(key), kind):
            raise UserError(f"{path}: {key}: found {saved.get(key)!r}, expected a number")
    return LoraConfig(saved["r"], saved["lora_alpha"], saved["lora_dropout"], tuple(targets))


@torch.no_grad()
def load_adapter(model, directory):
    """Fill the adapters that `model` has (see `read_adapter_config` and `lora.add_lora`), plain or sharded.

    Raises UserError for every missing, unexpected or misshaped tensor.
    """
    path = Path(directory) / "adapter_model.safetensors"
    stored = read_header(path)
    parameters = {PREFIX + name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    # peft keeps the frozen weight of an adapted head beside its adapter
    frozen = {f"{PREFIX}{name}.base_layer.weight": layer.weight for name, layer in lora.lora_layers(model).items()}
    parameters.update((name, frozen[name]) for name in frozen.keys() & stored.keys())
    for name in sorted(parameters.keys() ^ stored.keys()):
        raise UserError(f"{path}: tensor {name}: {'missing' if name in parameters else 'unexpected'}")
    for name, parameter in parameters.items():
        if stored[name].shape != tuple(parameter.shape):
            raise UserError(f"{path}: tensor {name}: found shape {list(stored[name].shape)}, "
                            f"expected {list(parameter.shape)}")
        parameter.copy_(distributed.shard_like(stored[name].read(), parameter))
