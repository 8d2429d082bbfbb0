"""BLOOM held to transformers' BloomForCausalLM: forward and backward, padded, packed and cached; what is refused."""

import pytest
import torch
import transformers

from minixllm.errors import UserError
from minixllm.models.attention import Packed, alibi_slopes
from minixllm.models.bloom import Bloom, BloomConfig
from minixllm.models.kv_cache import KVCache

BASE = dict(vocab_size=97, n_layer=2)
CONFIGS = [dict(n_head=heads, hidden_size=size, tie_word_embeddings=tied,
                apply_residual_connection_post_layernorm=after)
           for heads, size, after, tied in [(4, 32, False, True), (6, 48, False, False), (8, 32, True, True),
                                            (12, 48, True, False), (112, 224, False, True), (8, 64, False, True)]]


def pair(settings):
    """Our model and transformers', with the same random weights."""
    torch.manual_seed(0)
    theirs = transformers.BloomForCausalLM(transformers.BloomConfig(**BASE, **settings)).float()
    for name, parameter in theirs.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "layernorm.weight" in name or "ln_f.weight" in name else 0.0, 0.2)
    ours = Bloom(BloomConfig.from_dict({**BASE, **settings}))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_close(found, expected, tolerance=1e-5):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("settings", CONFIGS, ids=lambda s: "-".join(str(int(v)) for v in s.values()))
def test_logits_and_gradients_are_those_of_transformers(settings):
    ours, theirs = pair(settings)
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    ids, labels = torch.randint(0, 97, (2, 40)), torch.randint(0, 97, (2, 40))
    labels[0, :10] = -100
    expected = theirs(ids).logits
    assert_close(ours(ids), expected)
    logps, weights = ours(ids, labels=labels), torch.randn(2, 40)
    reference = expected.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    assert_close(logps, reference)
    (logps * weights).sum().backward()
    (reference * weights).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        # A key's bias moves all scores of a query alike, so its true gradient is 0 and both compute noise there.
        expected = gradients[name].grad
        assert (parameter.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_packed_and_padded_are_what_each_document_gives_alone():
    ours, theirs = pair(CONFIGS[1])
    lengths = [9, 1, 14]
    ids = torch.randint(0, 97, (24,))
    packed = ours(ids, Packed(lengths)).split(lengths)
    padded, mask = torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 14, dtype=torch.long)
    for row, document in enumerate(ids.split(lengths)):
        padded[row, 14 - len(document):], mask[row, 14 - len(document):] = document, 1  # left, as in generation
    batched = theirs(padded, attention_mask=mask).logits
    for row, (document, logits) in enumerate(zip(ids.split(lengths), packed)):
        assert_close(logits, theirs(document[None]).logits[0])
        assert_close(logits, batched[row, 14 - len(document):])


def test_branches_and_cache_keep_alibi_distances():
    ours, theirs = pair(CONFIGS[3])
    ids = torch.randint(0, 97, (15,))  # a trunk of 6, continued by 4 tokens or by 5
    branched = ours(ids, Packed([(6, [4, 5])]))
    assert_close(branched[:10], theirs(ids[None, :10]).logits[0])
    assert_close(branched[10:], theirs(torch.cat([ids[:6], ids[10:]])[None]).logits[0, 6:])
    cache = KVCache(1, 16)
    steps = [ours(part, cache.extend([len(part)])) for part in ids.split([6, 3, 1, 1, 4])]
    assert_close(torch.cat(steps), theirs(ids[None]).logits[0])


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 32, 71, 112])
def test_slopes_of_any_number_of_heads(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs, rtol=1e-6, atol=0)


def test_gradient_checkpointing_changes_no_bit():
    ours, _ = pair(CONFIGS[0])
    ids, labels = torch.randint(0, 97, (2, 20)), torch.randint(0, 97, (2, 20))
    gradients = []
    for ours.gradient_checkpointing in (False, True):
        ours.zero_grad()
        ours(ids, labels=labels).sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_config_of_the_published_files_is_read_and_written_again():
    published = {  # bloom-560m's, with what older exports call hidden_size
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0, "n_embed": 1024,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom",
        "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pad_token_id": 3,
        "pretraining_tp": 1, "seq_length": 2048, "use_cache": True, "vocab_size": 250880}
    config = BloomConfig.from_dict(published)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 24, 16)
    assert config.tie_word_embeddings and config.pad_token_id == 3
    written = config.to_dict()
    assert BloomConfig.from_dict(written) == config
    theirs = transformers.BloomConfig(**{k: v for k, v in written.items() if k != "model_type"})
    assert (theirs.hidden_size, theirs.n_layer, theirs.n_head, theirs.vocab_size) == (1024, 24, 16, 250880)


@pytest.mark.parametrize("key, value", [("n_head", 5), ("num_hidden_layers", 0), ("n_inner", 7), ("n_inner", [7]),
                                        ("layer_norm_epsilon", -1), ("model_type", "gpt2"),
                                        ("apply_residual_connection_post_layernorm", "yes")])
def test_unsupported_or_absurd_settings_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"^{key}: found .*expected"):
        BloomConfig.from_dict({**BASE, "n_head": 4, "hidden_size": 32, key: value})


def test_sums_in_slices_are_refused_by_name():
    """`slow_but_exact` adds up the products of `pretraining_tp` slices, which rounds otherwise."""
    for value, slices in ((True, 4), (1, 2), ("yes", "x")):
        with pytest.raises(UserError, match="^slow_but_exact: found .* with pretraining_tp .*expected false"):
            BloomConfig.from_dict({**BASE, "n_head": 4, "hidden_size": 32, "slow_but_exact": value,
                                   "pretraining_tp": slices})
    for harmless in ({"slow_but_exact": True, "pretraining_tp": 1}, {"slow_but_exact": False, "pretraining_tp": 4},
                     {"slow_but_exact": True}):
        BloomConfig.from_dict({**BASE, "n_head": 4, "hidden_size": 32, **harmless})


def test_dropouts_and_a_null_n_embed_are_read_as_transformers_reads_them():
    """Dropouts act in training alone: in evaluation the logits are those without."""
    config, theirs = {**BASE, "n_head": 4, "hidden_size": 32}, transformers.BloomConfig
    change = {"hidden_dropout": 0.5, "attention_dropout": 0.5, "n_embed": None}
    assert BloomConfig.from_dict(config | change) == BloomConfig.from_dict(config)
    assert theirs(**config, n_embed=48).hidden_size == BloomConfig.from_dict(config | {"n_embed": 48}).hidden_size == 48
