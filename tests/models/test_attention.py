"""Packed attention: isolation to the bit, branches, and the rule that FlexAttention would be given on a GPU."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from minixllm.models import attention
from minixllm.models.attention import Packed, alibi_slopes, causal_attention
from minixllm.models.bloom import Bloom, BloomConfig
from minixllm.models.llama import Llama, LlamaConfig

LLAMA = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2)
BLOOM = BloomConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def tensors(n, heads=4, kv_heads=2, D=8):
    torch.manual_seed(0)
    return torch.randn(n, heads, D), torch.randn(n, kv_heads, D), torch.randn(n, kv_heads, D)


def plain_attention(query, key, value, sees, bias):
    """Textbook attention: sees (N, N) bool, bias (H, N, N)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5 + bias
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, float("-inf")).softmax(-1), value)


def pairs_seen(documents):
    """(sees (N, N), positions (N,)) written out token by token."""
    tokens = []  # (document, branch, position)
    for d, document in enumerate(documents):
        trunk, branches = (document, []) if isinstance(document, int) else document
        tokens += [(d, None, p) for p in range(trunk)]
        tokens += [(d, b, trunk + p) for b, length in enumerate(branches) for p in range(length)]
    sees = [[q[0] == k[0] and k[1] in (None, q[1]) and k[2] <= q[2] for k in tokens] for q in tokens]
    return torch.tensor(sees), torch.tensor([position for *_, position in tokens])


DOCUMENTS = [[5, 1, 9], [12], [(4, [3, 1, 2]), 3], [2, (1, [1, 1]), (6, []), 4], [(0, [3, 2]), 2],
             [(2, [1, 3]), (2, [1, 3]), 2, 2, 2]]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
@pytest.mark.parametrize("alibi", [False, True])
def test_sdpa_and_flex_attention_follow_the_same_rule(documents, alibi, monkeypatch):
    sees, positions = pairs_seen(documents)
    packed = Packed(documents)
    assert torch.equal(packed.position_ids, positions)
    query, key, value = tensors(len(positions))
    slopes = alibi_slopes(4) if alibi else None
    distances = (positions - positions[:, None]).float()
    expected = plain_attention(query, key, value, sees, slopes[:, None, None] * distances if alibi else 0.0)
    torch.testing.assert_close(packed.attend(0, query, key, value, slopes), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)  # eager: the compiled kernel needs a GPU
    flex = packed._attend_flex(query, key, value, slopes)
    torch.testing.assert_close(flex, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slopes", [None, alibi_slopes(4)], ids=["plain", "alibi"])
def test_queries_are_the_last_positions(slopes):
    query, key, value = tensors(10)
    whole = causal_attention(query, key, value, slopes)
    for n in (1, 3, 9):  # is_causal would align the first query with the first key
        torch.testing.assert_close(causal_attention(query[-n:], key, value, slopes), whole[-n:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture, config", [(Llama, LLAMA), (Bloom, BLOOM)], ids=["llama", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_changed_document_leaves_its_neighbours_bit_equal(architecture, config, dtype):
    torch.manual_seed(0)
    model = architecture(config).to(dtype)
    ids = torch.randint(0, 50, (20,))
    packed = Packed([6, 5, (4, [2, 3])])
    before = model(ids, packed)
    changed = ids.clone()
    changed[:6] = (changed[:6] + 1) % 50
    assert torch.equal(model(changed, packed)[6:], before[6:])
    sibling = ids.clone()
    sibling[15:17] = (sibling[15:17] + 1) % 50  # the first branch: neither its trunk nor its sibling may notice
    after = model(sibling, packed)
    assert torch.equal(after[:15], before[:15]) and torch.equal(after[17:], before[17:])
    assert not torch.equal(after[15:17], before[15:17])


@pytest.mark.parametrize("architecture, config", [(Llama, LLAMA), (Bloom, BLOOM)], ids=["llama", "bloom"])
def test_branches_give_the_gradients_of_separate_documents(architecture, config):
    torch.manual_seed(0)
    model = architecture(config)
    ids, labels = torch.randint(0, 50, (11,)), torch.randint(0, 50, (11,))
    labels[:5] = -100
    model(ids, Packed([(5, [2, 4])]), labels).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    apart = torch.cat([ids[:7], ids[:5], ids[7:]]), torch.cat([labels[:7], labels[:5], labels[7:]])
    model(apart[0], Packed([7, 9]), apart[1]).sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients):
        assert (parameter.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_rows_of_a_rectangle_are_documents():
    model = Llama(LLAMA)
    ids = torch.randint(0, 50, (3, 7))
    logits = model(ids)
    assert logits.shape == (3, 7, 50)
    assert torch.equal(logits.flatten(0, 1), model(ids.flatten(), Packed([7, 7, 7])))
    rows = torch.tensor([6, 13])
    torch.testing.assert_close(model(ids.flatten(), Packed([7, 7, 7]), positions=rows), logits.flatten(0, 1)[rows])


def test_gradients_are_those_of_one_masked_attention():
    documents = [3, (4, [2, 3]), 6]
    sees, positions = pairs_seen(documents)
    inputs = [x.requires_grad_() for x in tensors(len(positions))]
    slopes = alibi_slopes(4)
    upstream = torch.randn(len(positions), 4, 8)
    found = torch.autograd.grad(Packed(documents).attend(0, *inputs, slopes), inputs, upstream)
    bias = slopes[:, None, None] * (positions - positions[:, None]).float()
    expected = torch.autograd.grad(plain_attention(*inputs, sees, bias), inputs, upstream)
    for a, b in zip(found, expected):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("seed", range(8))
def test_flex_attention_visits_the_blocks_that_matter(seed):
    """Whatever a query sees is in a block that is visited; a block taken as whole is seen whole."""
    rng = np.random.default_rng(seed)
    documents = [int(rng.integers(1, 400)) if rng.random() < 0.6 else
                 (int(rng.integers(0, 500)), rng.integers(1, 200, rng.integers(1, 4)).tolist())
                 for _ in range(rng.integers(1, 8))]
    packed = Packed(documents)
    N, mask = len(packed.position_ids), packed.block_mask
    q, k = torch.arange(N)[:, None], torch.arange(N)
    sees = torch.zeros(2, -(-N // 128) * 128, -(-N // 128) * 128, dtype=torch.bool)  # any in a block; all, ends aside
    sees[0, :N, :N] = sees[1, :N, :N] = packed.mask_mod(0, 0, q, k)
    sees[1, N:] = sees[1, :, N:] = True
    blocks = sees.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))  # (2, blocks, 128, blocks, 128)
    some, every = blocks[0].any(3).any(1), blocks[1].all(3).all(1)

    def dense(counts, order):
        visited = torch.zeros_like(some)
        for row, (count, places) in enumerate(zip(counts[0, 0], order[0, 0])):
            visited[row, places[:count].long()] = True
        return visited

    partial, whole = dense(mask.kv_num_blocks, mask.kv_indices), dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & whole).any() and not (whole & ~every).any() and not (some & ~(partial | whole)).any()
    theirs = create_block_mask(packed.mask_mod, None, None, N, N, device="cpu")
    assert mask.seq_lengths == theirs.seq_lengths and mask.BLOCK_SIZE == theirs.BLOCK_SIZE
    if all(isinstance(document, int) for document in documents):  # then no block is visited in vain, and none missed
        assert torch.equal(partial | whole, some)
        assert torch.equal(whole, dense(theirs.full_kv_num_blocks, theirs.full_kv_indices))
