"""The training loop: the same gradients however a batch is split, the same run however often it is killed.

Run by torchrun this file is a tiny training run of its own (see `main`).
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from minixllm import parallel, resume
from minixllm.attention import Packed
from minixllm.checkpoint import build, initialise
from minixllm.datasets import Stream, collate
from minixllm.errors import UserError
from minixllm.llama import Llama, LlamaConfig
from minixllm.settings import parse, run, setting
from minixllm.training import TIMINGS, TrainingSettings, held_out_loss, learning_rate, sft_loss, train

CONFIG = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, tie_word_embeddings=True)


class Records:
    """Random token ids in two languages, with the interface of SFTData; the first half of each record is its prompt."""

    language_names = ["deu", "tha"]
    blank = 1

    def __init__(self, n, seed=0):
        rng = np.random.default_rng(seed)
        self.ids = [rng.integers(0, CONFIG.vocab_size, rng.integers(4, 25)) for _ in range(n)]
        self.lengths = np.array([len(ids) - 1 for ids in self.ids], np.int32)
        self.supervised = self.lengths - self.lengths // 2
        self.languages = np.arange(n) % 2

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index][1:].copy()
        labels[:len(labels) // 2] = -100
        return self.ids[index][:-1], labels

    def document(self, index):
        return int(self.lengths[index])

    def count(self, records):
        return int(self.supervised[records].sum())

    def where(self, index):
        return f"tiny.jsonl, line {index + 1}"


@dataclass
class Settings(TrainingSettings):
    pause: float = setting(0.0, "seconds between steps, so that a test can hit one")
    gradients: str | None = setting(None, "file for the loss and gradients of one step")
    fault: str | None = setting(None, "what goes wrong at step 3: die, hang, nan, gradient, masked, disk")
    batch_size: int = setting(6, "")
    micro_batch_size: int = setting(2, "")
    max_length: int = setting(32, "")
    steps: int = setting(12, "")
    warmup_steps: int = setting(3, "")
    learning_rate: float = setting(1e-2, "")
    dtype: str = setting("float32", "")
    save_every: int = setting(3, "")
    eval_every: int = setting(4, "")


def main(argv):
    settings = parse(Settings, argv)
    world = parallel.setup("cpu")
    model = parallel.shard(build(CONFIG, Llama), world, torch.float32)
    initialise(model, seed=1)
    data, held_out = Records(100), Records(9, seed=1)
    stream = Stream(data, settings.seed, settings.batch_size, settings.micro_batch_size, settings.max_length,
                    world.rank, world.size)
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += 1
        time.sleep(settings.pause)
        if calls == 7 and settings.fault == "die" and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss, _ = sft_loss(model, batch)
        if calls == 7 and settings.fault == "nan" and world.rank == world.size - 1:
            loss = loss * math.nan
        return loss, {"twice": 2 * loss}

    if settings.gradients:
        return save_gradients(model, world, stream, settings.gradients)
    finished = train(model, world, settings, stream, loss_fn, lambda: held_out_loss(model, world, held_out, range(9), tokens=40))
    weights = {name: p.full_tensor() for name, p in model.named_parameters()}
    if world.first and finished:
        torch.save(weights, Path(settings.output) / "weights.pt")
    parallel.close()


def save_gradients(model, world, stream, path):
    """The global batch's mean loss and summed gradients, by the very step that trains, short of the optimiser."""
    from minixllm import training
    from minixllm.meter import Meter

    grabbed = {}

    class Grab:  # an optimiser that keeps gradients and changes nothing
        param_groups = [{"params": list(model.parameters())}]

        def step(self):
            grabbed.update({name: p.grad.full_tensor() for name, p in model.named_parameters()})

        def zero_grad(self):
            pass

    settings = TrainingSettings(clip=1e9)
    row = training.train_step(model, world, settings, stream, sft_loss, Grab(), Meter(model, world, settings), 1, [])
    if world.first:
        torch.save({"loss": torch.tensor(row["loss"]), **grabbed}, path)


if __name__ == "__main__":
    run(main)
