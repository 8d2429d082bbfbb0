"""LLaMA held to transformers' LlamaForCausalLM, forward and backward, and what its config refuses."""

import math

import pytest
import torch
import transformers

from minixllm.errors import UserError
from minixllm.models.attention import Packed
from minixllm.models.llama import Llama, LlamaConfig, rotary_angles, rotate
from minixllm.weights.hf_directory import save_model

BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CONFIGS = {
    "llama1": {},
    "llama2-gqa": dict(num_key_value_heads=2, rms_norm_eps=1e-5),
    "mqa-tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "head_dim": dict(head_dim=16, num_key_value_heads=2),
    "head_dim-null": dict(head_dim=None, num_key_value_heads=None),
    "head_dim-gqa3": dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=36, head_dim=10),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "attention_bias-tied": dict(attention_bias=True, tie_word_embeddings=True),
    "v4-theta": dict(rope_theta=500000.0, pretraining_tp=2),
    "v4-linear": dict(rope_theta=1000.0, rope_scaling=dict(type="linear", factor=4.0)),
    "v4-llama3": dict(rope_theta=500.0, rope_scaling=dict(rope_type="llama3", **LLAMA3)),
    "v4-null": dict(rope_theta=10000.0, rope_scaling=None),
    "v5-default": dict(rope_parameters=dict(rope_type="default", rope_theta=777.0)),
    "v5-linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=777.0, factor=2.0)),
    "v5-llama3": dict(rope_parameters=dict(rope_type="llama3", rope_theta=500.0, **LLAMA3), num_key_value_heads=2),
}


def same_in_transformers(model, folder, ids):
    """Saved, transformers opens it with the same logits."""
    save_model(model, folder)
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert_close(opened(ids).logits, model(ids))


def pair(settings, seed=0):
    """Our model and transformers', with the same random weights: large ones, so that nothing hides in small numbers."""
    torch.manual_seed(seed)
    settings = {**BASE, "max_position_embeddings": 128, **settings}
    config = transformers.LlamaConfig(**settings, attn_implementation="eager")
    theirs = transformers.LlamaForCausalLM(config).float()
    for name, parameter in theirs.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    ours = Llama(LlamaConfig.from_dict(settings))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(settings, tmp_path):
    ours, theirs = pair(settings)
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    ids = torch.randint(0, 97, (2, 40))
    labels = torch.randint(0, 97, (2, 40))
    labels[0, :10] = -100
    expected = theirs(ids).logits
    assert_close(ours(ids), expected)
    same_in_transformers(ours, tmp_path / "saved", ids)
    logps = ours(ids, labels=labels)
    weights = torch.randn(2, 40)
    reference = expected.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    assert_close(logps, reference)
    (logps * weights).sum().backward()
    (reference * weights).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name].grad)


@pytest.mark.parametrize("settings", [CONFIGS[k] for k in ("v4-llama3", "v5-linear", "biases", "head_dim-gqa3")])
def test_config_read_again_by_both(settings):
    ours = LlamaConfig.from_dict({**BASE, **settings})
    written = ours.to_dict()
    assert LlamaConfig.from_dict(written) == ours
    theirs = transformers.LlamaConfig(**{k: v for k, v in written.items() if k != "model_type"})
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    assert theirs.rope_parameters["rope_type"] == (ours.rope_scaling or {"rope_type": "default"})["rope_type"]
    assert (theirs.head_dim, theirs.tie_word_embeddings) == (ours.head_dim, ours.tie_word_embeddings)


def test_packed_documents_are_those_alone():
    ours, theirs = pair(CONFIGS["llama2-gqa"])
    lengths = [7, 1, 12]
    ids = torch.randint(0, 97, (20,))
    packed = ours(ids, Packed(lengths)).split(lengths)
    for document, logits in zip(ids.split(lengths), packed):
        assert_close(logits, theirs(document[None]).logits[0])


def test_checkpointing_changes_no_bit():
    ours, _ = pair({})
    ids, labels = torch.randint(0, 97, (2, 20)), torch.randint(0, 97, (2, 20))
    gradients = []
    for ours.gradient_checkpointing in (False, True):
        ours.zero_grad()
        ours(ids, labels=labels).sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_bf16_is_as_near_as_transformers(tmp_path):
    """bf16 weights: norms round before their weight (as transformers), rotary angles stay fp32 (better than it)."""
    ours, theirs = pair({"max_position_embeddings": 1024})
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (1, 600))
    exact = theirs(ids).logits
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)  # keeps inv_freq in fp32
    ours = ours.bfloat16()
    error = (ours(ids).float() - exact).abs().mean()
    assert error <= 1.2 * (half(ids).logits.float() - exact).abs().mean()
    norm, theirs_norm = ours.model["norm"], half.model.norm
    x = torch.randn(50, 32, dtype=torch.bfloat16)
    assert torch.equal(norm(x), theirs_norm(x))


def test_rotary_angles_are_fp32_and_tell_far_positions_apart():
    cos, sin = rotary_angles(LlamaConfig(**BASE), torch.tensor([256, 257, 5000, 5001]))
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos[1] - cos[0]).abs().max() > 0.1 and (sin[3] - sin[2]).abs().max() > 0.1
    assert abs(cos[3, 0, 0].item() - math.cos(5001)) < 1e-4
    x = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    assert rotate(x, (cos, sin)).dtype == torch.bfloat16


REFUSED = {
    "rope_scaling": [dict(type="dynamic", factor=2.0), dict(rope_type="yarn", factor=2.0), dict(rope_type="linear"),
                     dict(rope_type="linear", factor=2.0, beta_fast=3), "linear", dict(rope_type="linear", factor=-1.0),
                     {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}, {"full_attention": {"factor": 2.0}},
                     dict(type=[])],
    "hidden_act": ["gelu"], "model_type": ["mistral"], "sliding_window": [4096],
    "quantization_config": [{"bits": 4}], "partial_rotary_factor": [0.5],
    "vocab_size": [0, -3, 2.5, "97", None, True, 10**12], "hidden_size": [-1], "num_hidden_layers": ["two"],
    "num_attention_heads": [5], "num_key_value_heads": [3], "head_dim": [7], "rms_norm_eps": [0, "x", float("nan")],
    "rope_theta": [-1.0, float("inf"), 10**400], "bos_token_id": [[1], "<s>"],
    "eos_token_id": ["</s>", 2.5, 10**10, [[1]], {"a": 1}, True], "tie_word_embeddings": ["yes"], "mlp_bias": [1],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in REFUSED.items() for value in values])
def test_unsupported_or_absurd_settings_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"^{key}: .*(found|missing).*expected"):
        LlamaConfig.from_dict({**BASE, key: value})


def test_dropout_of_training_is_accepted():
    assert LlamaConfig.from_dict({**BASE, "attention_dropout": 0.1}) == LlamaConfig(**BASE)


def test_published_config_of_llama_3_2_1b():
    config = LlamaConfig.from_dict({
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256})
    assert (config.num_key_value_heads, config.eos_token_id[2], config.tie_word_embeddings) == (8, 128009, True)
    assert config.rope_scaling["factor"] == 32.0 and LlamaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("key", BASE)
def test_missing_settings_are_named(key):
    with pytest.raises(UserError, match=f"^{key}: missing, expected"):
        LlamaConfig.from_dict({k: v for k, v in BASE.items() if k != key})
