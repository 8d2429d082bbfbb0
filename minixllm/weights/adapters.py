"""LoRA adapters on disk in PEFT's format, both ways.

These are adapter_config.json and adapter_model.safetensors, with tensors `base_model.model.{layer}.lora_A.weight`.
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
from minixllm.weights.safetensors_files import check_shapes, read_header

PREFIX = "base_model.model."
# Settings of plain LoRA, and those that do not change what it computes. With any other, an adapter is not plain LoRA.
PLAIN = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
         "inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "init_lora_weights",
         "eva_config", "megatron_core", "qalora_group_size"}
# Initialisations that leave the base as it is. "pissa", "olora", "corda", "loftq" and others subtract from it.
INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def save_adapter(model, directory, settings: LoraSettings, base: str | None = None):
    """Write the model's adapters, in fp32. A collective. `base`: where those who open them find the base model."""
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
    config, tokenizer = hf_directory.read_directory(base, adapter)
    model = hf_directory.build(config, dtype, base / "config.json")
    hf_directory.load_weights(model, base, device)
    if adapter:
        merge_adapter(model, adapter)
    return model.eval(), tokenizer


def base_directory(directory) -> Path:
    """The base model's directory if this is an adapter's directory, and otherwise the directory itself."""
    directory = Path(directory)
    path = directory / "adapter_config.json"
    if not path.exists() or (directory / "config.json").exists():
        return directory
    where = f"{path}: base_model_name_or_path"
    base = expect(read_json(path).get("base_model_name_or_path"), str, where)
    if not os.path.exists(os.path.join(base, "config.json")):  # os.path raises no error, however odd the text
        relative = not os.path.isabs(base)  # peft, too, starts from the working directory
        raise UserError(f"{where}: found {found(base)}, expected the directory of the adapted model"
                        + f"; a relative path starts from the working directory, here {Path.cwd()}" * relative)
    return Path(base)


def read_adapter_config(directory) -> LoraSettings:
    """The settings of an adapter directory. Raises UserError naming the setting that is not plain LoRA's."""
    path = Path(directory) / "adapter_config.json"
    saved = read_json(path)
    expect(saved.get("peft_type"), str, f"{path}: peft_type", choices=("LORA",))
    expect(saved.get("bias", "none"), str, f"{path}: bias", choices=("none",))
    for key, value in saved.items():
        if value and key not in PLAIN:
            raise UserError(f"{path}: {key}: found {found(value)}, expected plain LoRA without it")
    if (init := saved.get("init_lora_weights", True)) not in INITS:
        raise UserError(f"{path}: init_lora_weights: found {found(init)}, which changes the base model's weights; "
                        f"expected one of {', '.join(map(str, INITS))}")
    targets = saved.get("target_modules")
    for target in targets if isinstance(targets, list) else [targets]:
        expect(target, str, f"{path}: target_modules")
    return LoraSettings(expect(saved.get("r"), int, f"{path}: r", least=1),
                        float(expect(saved.get("lora_alpha"), float, f"{path}: lora_alpha", above=0, most=1e9)),
                        targets)


@torch.no_grad()
def merge_adapter(model, directory):
    """Add a directory's adapters to the weights of a plain model, which may include one of the head.

    Raises UserError when a tensor is missing, unexpected or of another shape.
    """
    settings, path = read_adapter_config(directory), Path(directory) / "adapter_model.safetensors"
    try:
        layers = lora.targeted(model, settings.lora_targets)
    except (UserError, re.error) as error:
        raise UserError(f"{path.with_name('adapter_config.json')}: target_modules: {error}") from None
    stored, shapes = read_header(path), {}
    for name, layer in layers.items():
        if layer is model.lm_head and model.config.tie_word_embeddings:
            raise UserError(f"{path}: found an adapter of {name}, which is the embedding, too (tie_word_embeddings): "
                            "expected a model with a head of its own")
        out_features, in_features = layer.weight.shape
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (settings.lora_r, in_features)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (out_features, settings.lora_r)
        if (frozen := f"{PREFIX}{name}.base_layer.weight") in stored:  # peft stores the weight of a head that it adapts
            shapes[frozen] = (out_features, in_features)
    check_shapes(stored, shapes, str(path))
    for name, layer in layers.items():
        if frozen := stored.get(f"{PREFIX}{name}.base_layer.weight"):
            layer.weight.copy_(frozen.read())
        A, B = (stored[f"{PREFIX}{name}.{part}.weight"].read().to(layer.weight.device, torch.float32)
                for part in ("lora_A", "lora_B"))
        lora.add_update(layer.weight, A, B, settings.lora_alpha / settings.lora_r)
