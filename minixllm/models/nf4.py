"""NF4: frozen weights of four bits each (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E).

A weight matrix is cut into blocks of 64 numbers, row after row. A block keeps its largest absolute value as its scale,
and of every number the nearest of 16 values between -1 and 1, by its place in their list: 4 bits. The scales are
quantised in turn ("double quantisation"): their mean is taken off, and the rest is kept in 8 bits a scale, in blocks of
256 that have one fp32 scale each. In all a weight takes 4 + 8/64 + 32/(64 x 256) = 4.127 bits.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

BLOCK, SCALE_BLOCK = 64, 256


@functools.cache
def nf4_values(device: torch.device) -> torch.Tensor:
    """The 16 values of NF4, (16,) fp32 in rising order: quantiles of a normal distribution, scaled to [-1, 1].

    Trained weights are about normal, so that these values are used about equally often (appendix E). Seven lie below 0
    and eight above, at equal steps of probability; 0 itself is one of them, for a weight of 0 must stay 0. The last
    quantile would be infinite, so the steps begin at the probability 0.9677083, which is 1 - (1/32 + 1/30) / 2.
    """
    def quantiles(count):
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count + 1)[:-1].double()).float()

    values = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8)]).sort().values
    return (values / values.max()).to(device)


@functools.cache
def scale_values(device: torch.device) -> torch.Tensor:
    """The 256 values that scales take, (256,) fp32 in rising order: "dynamic" 8-bit numbers (Dettmers 2016, arXiv
    1511.04561, section 2): a sign, a power of ten, and the finer steps the larger the number is; and 0 and 1.
    """
    values = [torch.zeros(1), torch.ones(1)]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight of n numbers, any shape -> what is kept of it.

    codes (n / 2,) uint8: two places in `nf4_values` a byte, the first in the high bits; scales (n / 64,) uint8: places
    in `scale_values`; scale_scales (n / 64 / 256,) and mean_scale (), fp32. Every size is rounded up.
    """
    codes, scales = _to_places(weight.float().flatten(), nf4_values(weight.device), BLOCK)
    mean = scales.mean()
    scale_codes, scale_scales = _to_places(scales - mean, scale_values(weight.device), SCALE_BLOCK)
    codes = F.pad(codes, (0, len(codes) % 2), value=7)  # a 0
    return {"codes": codes[::2] << 4 | codes[1::2], "scales": scale_codes, "scale_scales": scale_scales,
            "mean_scale": mean}


def dequantize(kept: dict[str, torch.Tensor], shape, dtype: torch.dtype) -> torch.Tensor:
    """The weight of this shape and type that `quantize` kept, computed in fp32."""
    device = kept["codes"].device
    scales = _from_places(kept["scales"], scale_values(device), kept["scale_scales"], SCALE_BLOCK) + kept["mean_scale"]
    codes = torch.stack([kept["codes"] >> 4, kept["codes"] & 15], dim=1).flatten()[:torch.Size(shape).numel()]
    return _from_places(codes, nf4_values(device), scales, BLOCK).view(shape).to(dtype)


def _blocks(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """numbers (n,) -> (n / size, size), the last block filled up with zeros."""
    return F.pad(numbers, (0, -len(numbers) % size)).view(-1, size)


def _to_places(numbers: torch.Tensor, values: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """numbers (n,) -> (n,) uint8, the place of the value nearest to each, divided by its block's scale; the scales."""
    blocks = _blocks(numbers, size)
    scales = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / scales.clamp(min=1e-38))[:, None]
    places = torch.bucketize(scaled.flatten(), (values[:-1] + values[1:]) / 2, out_int32=True)
    return places[:len(numbers)].to(torch.uint8), scales


def _from_places(places: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    return (_blocks(values[places.int()], size) * scales[:, None]).flatten()[:len(places)]


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is kept in NF4, and made whole in the input's type while it is used.

    `to_nf4` makes it of a plain one. For a parameter `weight` it has the four buffers of `quantize`, which FSDP2 leaves
    whole on every process.
    """

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in ("codes", "scales", "scale_scales", "mean_scale")}

    @torch.no_grad()
    def load(self, weight: torch.Tensor):
        """Quantise `weight` (out, in) into this layer."""
        for name, tensor in quantize(weight).items():
            getattr(self, name).copy_(tensor)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _FrozenLinear.apply(x, self.kept, (self.out_features, self.in_features), bias)


def to_nf4(layer: nn.Linear):
    """Make a linear layer an `NF4Linear`, in place. One on the meta device is filled afterwards (`NF4Linear.load`)."""
    kept = quantize(layer.weight.detach())
    del layer.weight
    for name, tensor in kept.items():
        layer.register_buffer(name, tensor)
    layer.__class__ = NF4Linear


def quantize_blocks(model: nn.Module):
    """Put every linear layer of the model's blocks into NF4. Embedding, norms and head stay as they are."""
    for layer in [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]:
        to_nf4(layer)


def nf4_layers(model: nn.Module) -> dict[str, NF4Linear]:
    """{name that the layer's weight has in files: layer}."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b. The backward makes W whole again: if the forward kept it, all layers' would be held at once."""

    @staticmethod
    def forward(ctx, x, kept, shape, bias):
        ctx.kept, ctx.shape = kept, shape
        return F.linear(x, dequantize(kept, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize(ctx.kept, ctx.shape, grad.dtype), None, None, None
