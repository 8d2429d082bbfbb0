"""The model of a run: opened for training, whole or through LoRA's adapters, and saved at its end."""

from pathlib import Path

import torch

from minixllm import distributed
from minixllm.models import lora
from minixllm.weights import hf_directory
from minixllm.weights.adapters import save_adapter


def open_model(config, world, settings, directory=None, frozen=False):
    """The model to train, sharded over the processes and filled from `directory`, or at random if that is None.

    With settings.lora_r the base is frozen and held once, in bf16 (fp32 with --dtype float32); only adapters train.
    frozen: nothing trains. The weights are then held in the type that they are computed with, which changes no number.
    """
    dtype = distributed.compute_dtype(settings.dtype, world.device)
    adapted = settings.lora_r > 0
    held = dtype if frozen else torch.bfloat16 if adapted and settings.dtype != "float32" else torch.float32
    model = hf_directory.build(config, held)
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
        lora.merge(model)
    hf_directory.save_model(model, output / "model", tokenizer, generation_config)
    if distributed.is_first():
        print(f"\nsaved {output / 'model'}" + f" and {output / 'adapter'}" * bool(settings.lora_r))
