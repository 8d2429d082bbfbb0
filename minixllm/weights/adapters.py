"""LoRA adapters on disk in PEFT's format, both ways.

That is adapter_config.json and adapter_model.safetensors. A tensor is named `base_model.model.{layer}.lora_A.weight`,
the layer's name being the base model's own.
"""

import os
import re
from pathlib import Path

import torch
from safetensors.torch import save

from minixllm import distributed
from minixllm.errors import UserError, expect, found
from minixllm.files import atomic_write, read_json, write_json
from minixllm.models import lora
from minixllm.models.lora import LoraSettings, is_adapter
from minixllm.weights import hf_directory
from minixllm.weights.safetensors_files import read_header

PREFIX = "base_model.model."
# Settings that plain LoRA has or that change nothing it computes; any other that is set makes it something else.
PLAIN = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
         "inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "init_lora_weights",
         "eva_config", "megatron_core", "qalora_group_size"}
# Initial weights that leave the base as it is. "pissa", "olora", "corda", "loftq" and others subtract from it.
INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def save_adapter(model, directory, settings: LoraSettings, base: str | None = None):
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
            "r": settings.lora_r, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout,
            "target_modules": list(settings.lora_targets or model.LORA_TARGETS)})


def load(directory, dtype=torch.float32, device="cpu"):
    """(model in eval mode, tokenizer) of a Hugging Face directory, or of a PEFT adapter: its base with it merged in.

    A tokenizer and a generation_config.json in the adapter's directory are used in place of the base's.
    """
    base = base_directory(directory)
    adapter = None if base == Path(directory) else directory
    model, tokenizer = hf_directory.load(base, dtype, device, adapter)
    if adapter:
        merge_adapter(model, adapter)
    return model.eval(), tokenizer


def base_directory(directory) -> Path:
    """The directory of the model that an adapter directory was made for; any other directory itself."""
    directory = Path(directory)
    path = directory / "adapter_config.json"
    if not path.exists() or (directory / "config.json").exists():
        return directory
    where = f"{path}: base_model_name_or_path"
    base = expect(read_json(path).get("base_model_name_or_path"), str, where)
    if not os.path.exists(os.path.join(base, "config.json")):  # os.path takes any text, however long or odd
        relative = not os.path.isabs(base)  # taken as peft takes it
        raise UserError(f"{where}: found {found(base)}, expected the directory of the adapted model"
                        + f"; a relative path starts from the working directory, here {Path.cwd()}" * relative)
    return Path(base)


def read_adapter_config(directory) -> LoraSettings:
    """The settings of an adapter directory. Raises UserError, by name, for what is not plain LoRA."""
    path = Path(directory) / "adapter_config.json"
    saved = read_json(path)
    if saved.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type: found {found(saved.get('peft_type'))}, expected 'LORA'")
    for key, value in saved.items():
        if value and key not in PLAIN:
            raise UserError(f"{path}: {key}: found {found(value)}, expected plain LoRA without it")
    if (init := saved.get("init_lora_weights", True)) not in INITS:
        raise UserError(f"{path}: init_lora_weights: found {found(init)}, which changes the base model's weights; "
                        f"expected one of {', '.join(map(str, INITS))}")
    if saved.get("bias", "none") != "none":
        raise UserError(f"{path}: bias: found {found(saved['bias'])}, expected 'none'")
    targets = saved.get("target_modules")
    for target in targets if isinstance(targets, list) else [targets]:
        expect(target, str, f"{path}: target_modules")
    return LoraSettings(expect(saved.get("r"), int, f"{path}: r", least=1),
                        float(expect(saved.get("lora_alpha"), float, f"{path}: lora_alpha", above=0, most=1e9)),
                        targets)


@torch.no_grad()
def merge_adapter(model, directory):
    """Add a directory's adapters to the weights of a plain model, an adapter of the head included.

    Raises UserError for every missing, unexpected or misshaped tensor.
    """
    settings, path = read_adapter_config(directory), Path(directory) / "adapter_model.safetensors"
    try:
        layers = lora.targeted(model, settings.lora_targets)
    except (UserError, re.error) as error:
        raise UserError(f"{path.with_name('adapter_config.json')}: target_modules: {error}") from None
    stored, expected = read_header(path), {}
    for name, layer in layers.items():
        if layer is model.head and model.config.tie_word_embeddings:
            raise UserError(f"{path}: found an adapter of {name}, which is the embedding, too (tie_word_embeddings): "
                            "expected a model with a head of its own")
        out_features, in_features = layer.weight.shape
        shapes = {"lora_A": (settings.lora_r, in_features), "lora_B": (out_features, settings.lora_r),
                  "base_layer": (out_features, in_features)}
        expected |= {key: shape for part, shape in shapes.items() if (key := f"{PREFIX}{name}.{part}.weight") in stored
                     or part != "base_layer"}  # peft stores the frozen weight, too, of a head that it adapts
    for key in sorted(expected.keys() ^ stored.keys()):
        raise UserError(f"{path}: tensor {key}: {'missing' if key in expected else 'unexpected'}")
    for key, shape in expected.items():
        if stored[key].shape != shape:
            raise UserError(f"{path}: tensor {key}: found shape {list(stored[key].shape)}, expected {list(shape)}")
    for name, layer in layers.items():
        if frozen := stored.get(f"{PREFIX}{name}.base_layer.weight"):
            layer.weight.copy_(frozen.read())
        A, B = (stored[f"{PREFIX}{name}.{part}.weight"].read().to(layer.weight.device, torch.float32)
                for part in ("lora_A", "lora_B"))
        lora.add_update(layer.weight, A, B, settings.lora_alpha / settings.lora_r)
