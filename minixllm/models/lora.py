"""LoRA: low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685).

A layer y = W x becomes y = W x + (alpha / r) B A x, where A (r, in) and B (out, r) are trained and W is frozen. The
adapted layer keeps its own parameter names (`weight`, `bias`) and adds `lora_A.weight` and `lora_B.weight`: checkpoints
of the base load as before, and PEFT's names for adapters differ only in a prefix.
"""

import contextlib
import itertools
import math
import re
from dataclasses import dataclass

import torch
from torch import nn

from minixllm.distributed import full_tensor, shard_like
from minixllm.errors import UserError, expect
from minixllm.models.nf4 import NF4Linear
from minixllm.settings import setting


@dataclass
class LoraSettings:
    """LoRA's settings: flags of both training scripts, and what an adapter's directory says of it."""

    lora_r: int = setting(0, "rank of LoRA adapters beside a frozen base; 0: no adapters, every weight is trained",
                          least=0)
    lora_alpha: float = setting(16.0, "LoRA's scale: what adapters add is multiplied by alpha / r", above=0)
    lora_targets: list[str] = setting([], "names of the linear layers to adapt, not the head; none: q_proj v_proj in "
                                          "LLaMA, query_key_value in BLOOM")
    base: str = setting("auto", "how the frozen base is held: bf16, fp32, or nf4, in four bits a weight; auto: bf16, "
                                "or fp32 with --dtype float32", ("auto", "bf16", "fp32", "nf4"))
    lora_dropout = 0.0  # a flag of instruction tuning alone: preference optimisation has no dropout


class LoraLinear(nn.Linear):
    """A frozen linear layer with a trained low-rank update beside it; `add_lora` makes it of a plain one."""

    def add_adapter(self, settings: LoraSettings):
        r, device = settings.lora_r, next(itertools.chain(self.parameters(), self.buffers())).device
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=device, dtype=torch.float32)
        self.dropout = nn.Dropout(settings.lora_dropout)
        self.scaling = settings.lora_alpha / r
        self.enabled = True

    def forward(self, x):
        y = super().forward(x)
        # scaled between A and B, where there are only r numbers a token
        return y + self.lora_B(self.lora_A(self.dropout(x)) * self.scaling) if self.enabled else y


class LoraNF4Linear(LoraLinear, NF4Linear):
    """The same beside a frozen layer in NF4 (QLoRA)."""


def targeted(model: nn.Module, targets) -> dict[str, nn.Linear]:
    """The linear layers whose names end with one of `targets`; the architecture's usual ones where there are none.

    targets: a list of names, or as in PEFT a regular expression for whole names. UserError if one names no layer.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {}
    for target in [targets] if isinstance(targets, str) else targets or model.LORA_TARGETS:
        pattern = target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}"
        found = {name: module for name, module in linear.items() if re.fullmatch(pattern, name)}
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(f"LoRA target {target!r} names no linear layer of this model; it has {known}")
        chosen |= found
    return chosen


def add_lora(model: nn.Module, settings: LoraSettings):
    """Freeze the model and put adapters beside the targeted linear layers, in place, on whatever device it is.

    `initialise` gives the adapters their values. Raises UserError when a target names no linear layer, or the head: the
    head's logits are never whole (see token_logps), so that nothing could be added to them.
    """
    expect(settings.lora_r, int, "lora_r", least=1)
    model.requires_grad_(False)
    for name, layer in targeted(model, settings.lora_targets).items():
        if layer is model.lm_head:
            raise UserError(f"LoRA target {name!r}: found the head, expected layers below it: the head gets no adapter")
        layer.__class__ = LoraNF4Linear if isinstance(layer, NF4Linear) else LoraLinear  # `merge` turns it back
        layer.add_adapter(settings)


@torch.no_grad()
def initialise(model: nn.Module, seed: int):
    """Initial adapters as in section 4.1 of the LoRA paper: A Gaussian, B zero, so that training starts at W.

    The paper gives no variance; 1 / in_features keeps A x as large as x. Every process draws the whole tensors from one
    seed and keeps its share: they are the same at any world size.
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
    """Run the base model alone. In DPO this is the reference, without a second copy of the weights."""
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
    """Turn adapted layers back into plain linear ones, in place, their weights being W + (alpha / r) B A.

    On a sharded model this is a collective: every rank must call it.
    """
    for layer in lora_layers(model).values():
        add_update(layer.weight, full_tensor(layer.lora_A.weight), full_tensor(layer.lora_B.weight), layer.scaling)
        del layer.lora_A, layer.lora_B, layer.dropout
        layer.__class__ = nn.Linear  # no new module takes its place, because FSDP2 gathers the weight into this one


def add_update(weight, A, B, scaling: float):
    """weight (out, in) becomes weight + scaling B A, added in fp32 and rounded once; A (r, in) and B (out, r) whole."""
    weight.copy_(weight.float() + shard_like(B @ A * scaling, weight))
