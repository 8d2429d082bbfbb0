"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685).

A layer y = W x becomes y = W x + (alpha / r) B A x, with A (r, in) and B (out, r) trained and W frozen. The adapted
layer keeps its own parameter names (`weight`, `bias`) and adds `lora_A.weight` and `lora_B.weight`, so that base
checkpoints load as before and adapter files need only PEFT's prefix (adapters.py).
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import nn

from minixllm.distributed import full_tensor, shard_like
from minixllm.errors import UserError


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scaling, dropout and targets: a target adapts every linear layer whose name ends with it."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]


class LoraLinear(nn.Linear):
    """A frozen linear layer (its own `weight` and `bias`) with a trained low-rank update beside it."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        nn.Module.__init__(self)  # not nn.Linear's: the weights are the base layer's own, not new ones
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        self.lora_A = nn.Linear(self.in_features, config.r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(config.r, self.out_features, bias=False, device=device, dtype=torch.float32)
        self.dropout = nn.Dropout(config.lora_dropout)
        self.scaling = config.lora_alpha / config.r
        self.enabled = True

    def forward(self, x):
        y = super().forward(x)
        return y + self.lora_B(self.low(x)) if self.enabled else y

    def low(self, x):
        return self.lora_A(self.dropout(x)) * self.scaling  # (..., r): scaled where it is narrow


def low_rank(layer: nn.Linear, x: torch.Tensor) -> tuple:
    """The two factors, (N, r) and (out, r), of what an adapted layer adds to its output for x (N, in); () for a layer
    without an adapter. For a head, whose output is never held whole."""
    return (layer.low(x), layer.lora_B.weight) if isinstance(layer, LoraLinear) and layer.enabled else ()


def add_lora(model: nn.Module, config: LoraConfig):
    """Freeze the model and put adapters beside the targeted linear layers, in place, on whatever device it is.

    The adapters' values are `initialise`'s business, or `load_adapter`'s. Raises UserError when a target names no
    linear layer.
    """
    if config.r < 1:
        raise UserError(f"LoRA rank {config.r}: expected at least 1")
    model.requires_grad_(False)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in config.target_modules:
        if not any(_targets(target, name) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(f"LoRA target {target!r} names no linear layer of this model; it has {known}")
    for name, module in linear.items():
        if any(_targets(target, name) for target in config.target_modules):
            if module is model.head and model.config.tie_word_embeddings:
                raise UserError(f"LoRA target {name!r} is the embedding too (tie_word_embeddings), which an adapter "
                                "cannot be merged into; expected a model with a head of its own")
            model.set_submodule(name, LoraLinear(module, config))


def _targets(target: str, name: str) -> bool:
    return name == target or name.endswith("." + target)


@torch.no_grad()
def initialise(model: nn.Module, seed: int):
    """Adapters as section 4.1 of the paper has them: A Gaussian, B zero, so that training starts at W.

    The paper gives no variance; 1 / in_features keeps A x at the size of x. Drawn whole from one seed, then sharded:
    the same at any world size.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        A = layer.lora_A.weight  # (r, in)
        A.copy_(shard_like(torch.empty(A.shape).normal_(std=1 / math.sqrt(A.shape[1]), generator=generator), A))
        layer.lora_B.weight.zero_()


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name belongs to an adapter rather than to the base model."""
    return "lora_A." in name or "lora_B." in name


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextlib.contextmanager
def disabled(model: nn.Module):
    """Run the base model alone: in DPO, the reference that costs no second copy."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@torch.no_grad()
def merge(model: nn.Module):
    """Turn adapted layers back into plain linear ones, in place: W + (alpha / r) B A, added in fp32, cast to W's type.

    On a sharded model this is a collective: every rank must call it.
    """
    for layer in lora_layers(model).values():
        delta = full_tensor(layer.lora_B.weight) @ full_tensor(layer.lora_A.weight) * layer.scaling  # (out, in)
        layer.weight.copy_(layer.weight.float() + shard_like(delta, layer.weight))
        del layer.lora_A, layer.lora_B, layer.dropout
        layer.__class__ = nn.Linear  # and no new module: it is into this one that FSDP2 gathers the weight
