"""Forwards without gradients on a CPU, in fewer and larger operations than the modules spell out.

A step of decoding reads every weight once, which takes as long as memory needs; its many small operations, of two to
ten microseconds each, would take as long again. Here projections that read the same input are one product, what
follows a product (activation, gate, residual) is done by it, and weights are packed beforehand: a product otherwise
begins by bringing the whole weight matrix into a layout that the processor's instructions can take. All of it is
oneDNN's, by the operators that torch.compile generates code for.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from minixllm.models.lora import LoraLinear

PACK_BYTES = 2**32  # a model's products are packed, a second copy of its weights, up to this size


class Product:
    """Linear layers that read the same input, as one product: (N, in) -> (N, sum of their outs), in `dtype`.

    An adapted layer is [W, B] [x; s A x]: the adapter is a few more columns of the product.
    """

    def __init__(self, *layers: nn.Linear, dtype: torch.dtype):
        weight = torch.cat([layer.weight.to(dtype) for layer in layers]) if layers[1:] else layers[0].weight.to(dtype)
        adapted = [layer for layer in layers if isinstance(layer, LoraLinear) and layer.enabled]
        self.low = None
        if adapted:
            self.low = torch.cat([layer.lora_A.weight * layer.scaling for layer in adapted]).to(dtype)  # (ranks, in)
            columns = [layer.lora_B.weight if layer in adapted else layer.weight[:, :0] for layer in layers]
            weight = torch.cat([weight, torch.block_diag(*columns).to(dtype)], dim=1)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]).to(dtype)

    def __call__(self, x, activation: str = "none", algorithm: str = "") -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(self._widened(x), self.weight, self.bias, activation, [], algorithm)

    def combined(self, x, operation: str, other) -> torch.Tensor:
        """The product with `other` "add"ed to it or multiplied into it, "mul"."""
        return torch.ops.mkldnn._linear_pointwise.binary(self._widened(x), other, self.weight, self.bias, operation)

    def _widened(self, x):
        return x if self.low is None else torch.cat([x, F.linear(x, self.low)], dim=-1)


def llama_block(block, dtype: torch.dtype, rotate):
    """The forward of a `LlamaBlock`; `rotate` is llama.py's, which imports this module and not the other way round."""
    attention, mlp = block.self_attn, block.mlp
    D, layer_idx = attention.head_dim, attention.layer_idx
    H, KV = (layer.out_features // D for layer in (attention.q_proj, attention.k_proj))
    query_key_value = Product(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype)
    output, gate, up, down = (Product(layer, dtype=dtype)
                              for layer in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def forward(hidden, rotary, context):
        N = hidden.shape[0]
        # in fp32, in which attention computes on a CPU
        projected = query_key_value(block.input_layernorm(hidden)).float().view(N, -1, D)  # (N, H + 2 KV, D)
        query_key, value = projected.split([H + KV, KV], dim=1)
        query_key = rotate(query_key, rotary)
        attended = context.attend(layer_idx, query_key[:, :H], query_key[:, H:], value).reshape(N, -1).to(dtype)
        hidden = output.combined(attended, "add", hidden)
        normed = block.post_attention_layernorm(hidden)
        return down.combined(up.combined(normed, "mul", gate(normed, "swish")), "add", hidden)

    return forward


def bloom_block(block, dtype: torch.dtype):
    """The forward of a `BloomBlock`."""
    attention, mlp = block.self_attention, block.mlp
    layer_idx, D = attention.layer_idx, attention.head_dim
    query_key_value, dense, widen, narrow = (
        Product(layer, dtype=dtype)
        for layer in (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h))

    def forward(hidden, slopes, context):
        N = hidden.shape[0]
        normed = block.input_layernorm(hidden)
        query, key, value = query_key_value(normed).float().view(N, -1, 3, D).unbind(2)
        attended = context.attend(layer_idx, query, key, value, slopes).reshape(N, -1).to(dtype)
        hidden = dense.combined(attended, "add", normed if block.residual_after_layernorm else hidden)
        normed = block.post_attention_layernorm(hidden)
        residual = normed if block.residual_after_layernorm else hidden
        return narrow.combined(widen(normed, "gelu", "tanh"), "add", residual)

    return forward


@contextlib.contextmanager
def fused(model):
    """Within, the model's forwards without gradients are fused ones; those with gradients are as ever.

    Where oneDNN has none (off a CPU, for sharded weights), or the second copy of the weights would be larger than
    PACK_BYTES, nothing changes. Each block is fused when it is first called, with its adapters as they then are,
    enabled or not.
    """
    modules = [*model.blocks, model.head] if hasattr(model, "fused_block") else []
    linears = [linear for module in modules for linear in module.modules() if isinstance(linear, nn.Linear)]
    dtype = getattr(model, "compute_dtype", next(model.parameters()).dtype)
    size = sum(linear.weight.numel() for linear in linears) * dtype.itemsize
    if size > PACK_BYTES or not all(_packs(linear.weight, dtype) for linear in linears):
        modules = []
    try:
        for module in modules:
            fuse = functools.partial(Product if module is model.head else model.fused_block, module, dtype=dtype)
            module.forward = _unless_gradients(module.forward, functools.cache(fuse))
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _packs(weight, dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack this weight: whole, on a CPU, in a type that it has products of there."""
    return (weight.is_cpu and not isinstance(weight, DTensor) and torch.backends.mkldnn.is_available()
            and (dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _unless_gradients(plain, fused):
    """`fused()`, made when it is first called, or `plain`."""
    return lambda *inputs: (plain if torch.is_grad_enabled() else fused())(*inputs)
