"""The fused forwards give what the modules give, and step aside wherever they cannot serve."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from minixllm.models import fused_cpu, lora
from minixllm.models.attention import Packed
from minixllm.models.bloom import Bloom, BloomConfig
from minixllm.models.kv_cache import KVCache
from minixllm.models.llama import Llama, LlamaConfig

MODELS = {
    "llama": (Llama, LlamaConfig(97, 48, 72, 2, 6, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    "llama with biases": (Llama, LlamaConfig(97, 48, 72, 2, 4, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3)),
    "bloom": (Bloom, BloomConfig(97, 48, 2, 6)),
    "bloom post": (Bloom, BloomConfig(97, 48, 2, 6, apply_residual_connection_post_layernorm=True)),
}


@pytest.fixture(params=MODELS)
def model(request):
    """Random weights, norms and biases too."""
    model_class, config = MODELS[request.param]
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model


def logits(model):
    """Of packed documents with branches, and of rows of a cache that begin, go on and stand still."""
    ids = torch.arange(17) * 5 % 97
    packed = model(ids, Packed([4, (3, [2, 4]), 4]))
    cache = KVCache(3, 12)
    steps = []
    for lengths in ([5, 1, 7], [1, 1, 0], [1, 2, 1]):
        context = cache.extend(lengths)
        steps.append(model(ids[:sum(lengths)], context, positions=context.last))
    return torch.cat([packed, *steps])


@torch.no_grad()
def test_logits_are_those_of_the_modules(model):
    expected = logits(model)
    with fused_cpu.fused(model):
        assert all("forward" in vars(module) for module in (*model.blocks, model.lm_head))
        found = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert not torch.equal(found, expected)  # it was another computation
    assert torch.equal(logits(model), expected)  # and the modules are as before


@torch.no_grad()
def test_in_bf16_they_round_no_worse(model):
    exact = logits(model)
    model.bfloat16()
    plain = (logits(model).float() - exact).square().mean()
    with fused_cpu.fused(model):
        fused_error = (logits(model).float() - exact).square().mean()
    assert 0 < fused_error < 1.5 * plain


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")])
@torch.no_grad()
def test_adapters_are_columns_of_the_product(model, targets):
    if isinstance(model, Bloom):
        targets = ("query_key_value", "dense_4h_to_h") if "q_proj" in targets else ("dense", "dense_h_to_4h")
    base = logits(model)
    settings = lora.LoraSettings(3, 6.0, list(targets))
    settings.lora_dropout = 0.5
    lora.add_lora(model, settings)
    lora.initialise(model.eval(), 0)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.normal_(std=0.1)
    expected = logits(model)
    assert (expected - base).abs().max() > 0.1
    with fused_cpu.fused(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    with lora.disabled(model), fused_cpu.fused(model):
        torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-5 * base.abs().max().item())


def test_forwards_with_gradients_are_the_modules_own(model):
    ids = torch.arange(9)
    model(ids[None], labels=ids[None]).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with fused_cpu.fused(model):
        model(ids[None], labels=ids[None]).sum().backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())


@torch.no_grad()
def test_a_block_is_packed_when_it_is_first_called(model, monkeypatch):
    packed, pack = [], fused_cpu.Product.__init__

    def recorded(self, *layers, dtype):
        packed.append(layers)
        pack(self, *layers, dtype=dtype)

    monkeypatch.setattr(fused_cpu.Product, "__init__", recorded)
    ids = torch.arange(9)[None]
    with fused_cpu.fused(model):
        assert not packed
        model(ids, labels=ids)  # which forms no output of the head
        assert packed and (model.lm_head,) not in packed
        count = len(packed)
        model(ids)
        assert len(packed) == count + 1 and packed[-1] == (model.lm_head,)


@torch.no_grad()
def test_attention_may_return_any_strides(model):
    """PyTorch's kernels differ in it."""
    expected = logits(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), fused_cpu.fused(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_without_onednn_the_package_opens():
    """Some builds of PyTorch have none, and no such operators."""
    script = "import torch; torch.ops.mkldnn = None; import minixllm.generation"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("why", ["too large", "no oneDNN", "no bf16 products"])
def test_where_they_cannot_serve_nothing_changes(model, why, monkeypatch):
    size = 4 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    monkeypatch.setattr(fused_cpu, "PACK_BYTES", size)
    with fused_cpu.fused(model):
        assert "forward" in vars(model.lm_head)
    if why == "too large":
        monkeypatch.setattr(fused_cpu, "PACK_BYTES", size - 1)
    elif why == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        model.half()
    with fused_cpu.fused(model):
        assert not any("forward" in vars(module) for module in model.modules())
