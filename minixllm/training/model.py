"""The model of a run: opened for training, whole or through LoRA's adapters, and saved at its end."""

from pathlib import Path

import torch

from minixllm import distributed
from minixllm.models import lora
from minixllm.models.nf4 import nf4_layers, quantize_blocks
from minixllm.weights import hf_directory
from minixllm.weights.adapters import merge_adapter, save_adapter


def open_model(config, world, settings, directory=None, frozen=False):
    """The model to train, sharded over the processes and filled from `directory`, or at random if that is None.

    With settings.lora_r the base is frozen and held once, as settings.base says; only adapters train.
    frozen: nothing trains. The weights are then held in the type that they are computed with, which changes no number.
    """
    dtype = world.gather(distributed.compute_dtype(settings.dtype, world.device, config.hidden_size))[0]  # one for all
    adapted = settings.lora_r > 0
    base = settings.base if settings.base != "auto" else "fp32" if settings.dtype == "float32" else "bf16"
    held = dtype if frozen else torch.float32 if not adapted or base == "fp32" else torch.bfloat16
    where = Path(directory) / "config.json" if directory else "config.json"
    model = hf_directory.build(config, held, where)
    if adapted and base == "nf4":
        quantize_blocks(model)
    if adapted:
        lora.add_lora(model, settings)
    distributed.shard(model, world, dtype)
    if directory:
        hf_directory.load_weights(model, directory, world.device)
    else:
        hf_directory.initialise(model, settings.seed, world.device)
    if adapted:
        lora.initialise(model, settings.seed)
    return model


def save_trained(model, settings, tokenizer, generation_config=None):
    """Write output/model and, under LoRA, output/adapter; the adapters are then merged into the model. A collective.

    generation_config: what the trained model keeps of the base's, as `read_generation_config` gives it. The scripts
    read it before they train, so that a directory that has changed since does not cost the trained model.
    """
    output = Path(settings.output)
    if settings.lora_r:
        save_adapter(model, output / "adapter", settings, settings.model)
        model = _merged(model, settings, output / "adapter")
    hf_directory.save_model(model, output / "model", tokenizer, generation_config)
    if distributed.is_first():
        print(f"\nsaved {output / 'model'}" + f" and {output / 'adapter'}" * bool(settings.lora_r))


def _merged(model, settings, adapter: Path):
    """The model with its adapters merged in. A base in NF4 is read again, in bf16: the original weights take the
    update, not the rounded ones that it was trained beside. Only the first process, which writes the model, reads it.
    """
    if not nf4_layers(model):
        lora.merge(model)
        return model
    merged = hf_directory.build(model.config, torch.bfloat16)
    if distributed.is_first():
        hf_directory.load_weights(merged, settings.model)
        merge_adapter(merged, adapter)
    return merged
