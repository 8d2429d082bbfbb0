"""A model alone, for tests whose directories have no tokenizer."""

from pathlib import Path

import torch

from minixllm.weights import hf_directory


def load_model(directory, dtype=torch.float32):
    model = hf_directory.build(hf_directory.read_config(directory), dtype, Path(directory) / "config.json")
    hf_directory.load_weights(model, directory)
    return model.eval()
