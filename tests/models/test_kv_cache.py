"""The KV cache against the same tokens computed without one."""

import pytest
import torch

from minixllm.models.attention import alibi_slopes
from minixllm.models.bloom import Bloom, BloomConfig
from minixllm.models.kv_cache import KVCache
from minixllm.models.llama import Llama, LlamaConfig

LLAMA = dict(vocab_size=101, hidden_size=48, intermediate_size=64, num_hidden_layers=2)
CONFIGS = {
    "llama": LlamaConfig(**LLAMA, num_attention_heads=4),
    "llama, grouped heads": LlamaConfig(**LLAMA, num_attention_heads=6, num_key_value_heads=2, head_dim=10),
    "llama, one key head": LlamaConfig(**LLAMA, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True),
    "bloom, 4 heads": BloomConfig(101, 48, 2, 4),
    "bloom, 6 heads": BloomConfig(101, 48, 2, 6),
}


def make(name):
    config = CONFIGS[name]
    torch.manual_seed(0)
    model = (Llama if isinstance(config, LlamaConfig) else Bloom)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that positions and neighbours matter
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def check_rows(model, cache, steps, sequences):
    """Feed each row's tokens in the steps' portions; every new token's logits must be those of an uncached forward."""
    fed = list(cache.lengths)
    for lengths in steps:
        new = [tokens[f:f + n] for tokens, f, n in zip(sequences, fed, lengths)]
        context = cache.extend(lengths)
        logits = model(torch.cat(new), context)
        for row, part in enumerate(logits.split(lengths)):
            if lengths[row]:
                whole = model(sequences[row][None, :fed[row] + lengths[row]])[0]
                torch.testing.assert_close(part, whole[fed[row]:], rtol=1e-5, atol=1e-5)
                assert context.last[row] == sum(lengths[:row + 1]) - 1
            fed[row] += lengths[row]
    assert cache.lengths == fed


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cached_equals_uncached(name):
    """Prefill, single steps, several tokens after a past (aligned bottom-right), and all of these in one forward."""
    model = make(name)
    sequences = torch.randint(101, (4, 40))
    check_rows(model, KVCache(4, 40), [
        [7, 1, 12, 0],   # prefill of unequal rows, one of a single token
        [1, 1, 1, 9],    # three steps and a prefill
        [1, 1, 1, 1], [1, 1, 1, 1],
        [5, 1, 0, 3],    # chunks after a past; a row that rests between others
        [1, 2, 1, 1], [1, 1, 1, 1]], sequences)


@torch.no_grad()
def test_keep_closes_gaps_and_refills():
    model = make("llama, grouped heads")
    sequences = torch.randint(101, (5, 40))
    cache = KVCache(5, 40)
    check_rows(model, cache, [[7, 3, 2, 5, 9], [1, 1, 1, 1, 1]], sequences)
    order = cache.keep([1, 3, 4])
    assert order == [3, 1, 4] and cache.lengths == [6, 4, 10, 0, 0]  # a shorter row and a longer one fill the gaps
    sequences = torch.cat([sequences[order], torch.randint(101, (2, 40))])  # two new rows behind the three kept
    check_rows(model, cache, [[1, 1, 1, 9, 2], [1, 1, 1, 1, 1]], sequences)
    assert cache.keep([4, 3, 2, 1, 0]) == [0, 1, 2, 3, 4]
    assert cache.keep([]) == [] and cache.lengths == [0, 0, 0, 0, 0]
    check_rows(model, cache, [[3, 3], [1, 1]], sequences)


@torch.no_grad()
def test_what_is_masked_does_not_matter():
    """Neither a longer neighbour nor the remains of an earlier sequence change a row by a bit."""
    model = make("bloom, 6 heads")
    tokens = torch.randint(101, (6,))

    def logits(neighbour, remains):
        cache = KVCache(2, 30)
        if remains:
            model(torch.randint(101, (30,)), cache.extend([30]))
            cache.keep([])
        model(torch.cat([tokens[:5], neighbour]), cache.extend([5, 12]))
        return model(torch.cat([tokens[5:], neighbour[:1]]), cache.extend([1, 1]))[0]

    expected = logits(torch.randint(101, (12,)), False)
    assert torch.equal(expected, logits(torch.randint(101, (12,)), False))
    assert torch.equal(expected, logits(torch.randint(101, (12,)), True))


def test_capacity():
    cache = KVCache(2, 10)
    cache.extend([10, 9])
    with pytest.raises(ValueError, match="row 1 would hold 11 tokens, the cache 10"):
        cache.extend([0, 2])
    assert cache.lengths == [10, 9]


def test_type_follows_the_model():
    """The cache is made in the type the model computes in, ALiBi's mask included."""
    cache = KVCache(1, 4)
    x = torch.randn(1, 6, 8, dtype=torch.bfloat16)
    for _ in range(2):
        assert cache.extend([1]).attend(0, x, x, x, alibi_slopes(6)).dtype == torch.bfloat16
    assert cache.layers[0][0].dtype == torch.float32  # as it is kept on a CPU
