"""LoRA adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT's tensors are named `base_model.model.{layer}.lora_A.weight`, the rest of the name being the base model's own.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save

from minixllm.errors import UserError, atomic_write
from minixllm.lora import LoraConfig, full_tensor, is_adapter, shard_like
from minixllm.tensor_files import read_header
from minixllm.tokenizers import read_json

PREFIX = "base_model.model."
# Settings that change what an adapter computes, none of which plain LoRA has.
UNSUPPORTED = ("use_rslora", "use_dora", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "layers_pattern",
               "rank_pattern", "alpha_pattern", "exclude_modules", "lora_bias", "target_parameters",
               "trainable_token_indices", "layer_replication", "alora_invocation_tokens")


def save_adapter(model, directory, config: LoraConfig, base: str | None = None):
    """Write the model's adapters, in fp32. A collective. `base`: where the base model is, for who opens the adapter."""
    tensors = {PREFIX + name: full_tensor(parameter).detach().cpu().contiguous()
               for name, parameter in model.named_parameters() if is_adapter(name)}
    if not dist.is_initialized() or dist.get_rank() == 0:
        directory = Path(directory)
        with atomic_write(directory / "adapter_model.safetensors", "wb") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        with atomic_write(directory / "adapter_config.json") as file:
            json.dump({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
                       "inference_mode": True, "init_lora_weights": True, "bias": "none", "fan_in_fan_out": False,
                       "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
                       "target_modules": list(config.target_modules)}, file, indent=2)


def read_adapter_config(directory) -> LoraConfig:
    """The settings of an adapter directory. Raises UserError, by name, for what is not plain LoRA."""
    path = Path(directory) / "adapter_config.json"
    saved = read_json(path)
    if saved.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type: found {saved.get('peft_type')!r}, expected 'LORA'")
    for key in UNSUPPORTED:
        if saved.get(key):
            raise UserError(f"{path}: {key}: found {saved[key]!r}, expected plain LoRA without it")
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
    for name in sorted(parameters.keys() ^ stored.keys()):
        raise UserError(f"{path}: tensor {name}: {'missing' if name in parameters else 'unexpected'}")
    for name, parameter in parameters.items():
        if stored[name].shape != tuple(parameter.shape):
            raise UserError(f"{path}: tensor {name}: found shape {list(stored[name].shape)}, "
                            f"expected {list(parameter.shape)}")
        parameter.copy_(shard_like(stored[name].read(), parameter))
