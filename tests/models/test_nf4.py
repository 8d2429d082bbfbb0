"""NF4 held to bitsandbytes, bit for bit, on random and on genuine weights."""

import bitsandbytes.functional as theirs
import pytest
import torch
from real_models import smollm2
from torch import nn

from minixllm.models import nf4
from minixllm.weights.safetensors_files import find_tensors

CPU = torch.device("cpu")


def test_the_values_are_those_of_the_paper():
    assert torch.equal(nf4.nf4_values(CPU), theirs.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.scale_values(CPU), theirs.create_dynamic_map())


def weights():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(96, 192, generator=generator)
    yield "normal", normal
    yield "of one size", normal.sign()
    yield "tiny", normal * 1e-30
    yield "zeros", torch.zeros(64, 128)
    yield "a block of zeros", torch.cat([torch.zeros(1, 192), normal])
    yield "heavy tails", normal ** 5
    yield "in bf16", normal.bfloat16()
    yield "one row", normal[:1]
    yield "a width that no block divides", normal[:7, :37].contiguous()
    yield "an odd number of weights", normal[:3, :21].contiguous()
    yield "fewer than a block", normal[:1, :5].contiguous()
    yield "ties between two values", ((nf4.nf4_values(CPU)[:-1] + nf4.nf4_values(CPU)[1:]) / 2).repeat(64, 4)
    yield "many scales", torch.randn(300, 512, generator=generator) * torch.logspace(-4, 2, 300)[:, None]


def same_as_bitsandbytes(weight):
    """Its CPU kernel looks scales up in a table, which misses the nearest value once in 600 times; given fp64, it
    searches as its GPU kernel does. Where all scales are equal, any place is right: what is kept of each is 0.
    """
    kept = nf4.quantize(weight)
    codes, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    mean = state.absmax.mean()
    scales, scale_scales = torch.ops.bitsandbytes.quantize_blockwise((state.absmax - mean).double(),
                                                                     theirs.create_dynamic_map(), 256)
    assert torch.equal(kept["codes"], codes.flatten())
    assert torch.equal(kept["scale_scales"], scale_scales) and torch.equal(kept["mean_scale"], mean)
    assert not scale_scales.all() or torch.equal(kept["scales"], scales)
    state = theirs.QuantState(
        kept["scales"], weight.shape, theirs.get_4bit_type("nf4", device="cpu"), 64, "nf4", torch.float32, mean,
        theirs.QuantState(scale_scales, blocksize=256, code=theirs.create_dynamic_map(), dtype=torch.float32))
    whole = nf4.dequantize(kept, weight.shape, torch.float32)
    torch.testing.assert_close(whole, theirs.dequantize_4bit(codes, state), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [pytest.param(weight, id=name) for name, weight in weights()])
def test_codes_and_scales_are_those_of_bitsandbytes(weight):
    same_as_bitsandbytes(weight)


def test_on_genuine_weights():
    if (directory := smollm2()) is None:
        pytest.skip("the genuine model could not be downloaded")
    stored = [each for name, each in sorted(find_tensors(directory).items()) if name.endswith("_proj.weight")]
    for each in stored[::15]:
        same_as_bitsandbytes(each.read())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_computes_with_the_weight_that_is_kept(bias, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias)
    plain = nn.Linear(96, 40, bias, dtype=dtype)
    plain.weight.data.copy_(nf4.dequantize(nf4.quantize(layer.weight.detach()), (40, 96), dtype))
    if bias:
        plain.bias.data.copy_(layer.bias)
    nf4.to_nf4(layer)
    ours, expected = (torch.randn(2, 5, 96, dtype=dtype).requires_grad_() for _ in range(2))
    expected.data.copy_(ours.data)
    y, z = layer(ours), plain(expected)
    torch.testing.assert_close(y, z)
    y.square().sum().backward(), z.square().sum().backward()
    torch.testing.assert_close(ours.grad, expected.grad)


def test_a_weight_takes_little_more_than_four_bits():
    layer = nn.Linear(1024, 1024, bias=False)
    nf4.to_nf4(layer)
    assert not list(layer.parameters())
    assert 8 * sum(b.numel() * b.element_size() for b in layer.buffers()) / 1024**2 == pytest.approx(4.127, abs=0.001)
