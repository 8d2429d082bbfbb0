"""Causal attention over documents laid end to end, with or without ALiBi, by PyTorch's own kernels.

Batches are flat: the tokens of several documents follow one another along one axis of N tokens, with no padding, and
no document sees another. On a CPU each document is one call of `scaled_dot_product_attention`, which spends nothing
on the blocks between documents; on a GPU one compiled FlexAttention kernel skips them.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # of queries, or keys, in FlexAttention


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Copies a tensor from the CPU to `device` without waiting until a GPU has done its earlier work."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # the driver may wait when it copies from other memory
    return tensor.to(device, non_blocking=True)


def alibi_slopes(num_heads: int, device="cpu") -> torch.Tensor:
    """ALiBi, attention with linear biases: head h adds slope_h * (key's place - query's place) to its scores (Press et
    al. 2022, "Train Short, Test Long", arXiv 2108.12409, section 3). Returns the slopes, (H,) fp32.

    They are 2^(-8h/n) for h = 1..n when the number of heads n is a power of two. Otherwise they are those of the power
    of two below, followed by every second slope of the power of two above.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    slopes += [2 ** (-4 * h / below) for h in range(1, 2 * (num_heads - below), 2)]
    return to_device(torch.tensor(slopes, dtype=torch.float32), device)


def causal_mask(length: int, slopes, dtype, device) -> torch.Tensor:
    """What is added to a document's scores: (H, length, length) with ALiBi, (1, length, length) without.

    Query i sees the keys j <= i, and ALiBi adds slope * (j - i). BLOOM's own code adds slope * j, which gives the same
    softmax; but the smaller numbers are rounded less in bf16.
    """
    places = torch.arange(length, device=device)
    distances = (places - places[:, None]).float()
    bias = torch.zeros_like(distances)[None] if slopes is None else slopes[:, None, None] * distances
    return bias.masked_fill_(distances > 0, -math.inf).to(dtype)


def causal_attention(query, key, value, slopes=None, mask=None) -> torch.Tensor:
    """Attention of one document: query (n, H, D), key and value (m, KV, D) -> (n, H, D); or of several, all (B, ...).

    The queries are the last n of the m positions. `slopes` (H,) adds ALiBi. `mask`: a `causal_mask` of m positions or
    more, so that a caller with many documents makes it once.
    """
    n, m = query.shape[-3], key.shape[-3]
    if slopes is not None or 1 < n < m:  # `is_causal` takes the queries for the first n positions, not the last
        mask = causal_mask(m, slopes, query.dtype, query.device) if mask is None else mask
        mask = mask[:, m - n:m, :m].unsqueeze(0)
    else:
        mask = None
    batched = (x if x.dim() == 4 else x.unsqueeze(0) for x in (query, key, value))
    heads_first = (x.transpose(1, 2) for x in batched)  # (B, heads, tokens, D)
    output = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=mask is None and n == m,
                                            enable_gqa=query.shape[-2] != key.shape[-2])
    return output.transpose(1, 2).reshape(query.shape)


class Packed:
    """The context of a forward over documents laid end to end: no document sees another.

    documents: each is a number of tokens, or a pair (trunk, [branch, ...]) of numbers of tokens: a shared beginning,
    the trunk, and its continuations, the branches. A branch sees the trunk and itself, never another branch. Its
    positions start at `trunk`, as if it followed the trunk alone.
    """

    def __init__(self, documents, device="cpu"):
        self.documents = [(d, []) if isinstance(d, int) else (d[0], list(d[1])) for d in documents]
        self.device = torch.device(device)
        position_ids = [torch.arange(start, start + length) for trunk, branches in self.documents
                        for start, length in [(0, trunk), *((trunk, branch) for branch in branches)]]
        self.position_ids = to_device(torch.cat(position_ids), device)
        self._longest_mask = None
        # Runs of (count, trunk, branches): neighbours of equal length without branches are computed by one call.
        self.runs = []
        for (trunk, branches), run in itertools.groupby(self.documents):
            count = len(list(run))
            self.runs += [(1, trunk, branches)] * count if branches else [(count, trunk, branches)]

    def attend(self, layer_idx, query, key, value, slopes=None) -> torch.Tensor:
        """query (N, H, D), key and value (N, KV, D) -> (N, H, D); `slopes` (H,) adds ALiBi."""
        if query.device.type == "cuda":
            return self._attend_flex(query, key, value, slopes)
        # Always in fp32: for documents of up to 400 tokens the kernel's bf16 backward takes 1.5 to 3 times as long as
        # its fp32 backward, and the two forwards take equally long.
        dtype = query.dtype
        query, key, value = query.float(), key.float(), value.float()
        lengths = [length for count, trunk, branches in self.runs for length in (count * trunk, *branches)]
        # Each tensor is split once: the backward is one concatenation, where each slice would fill N rows with zeros.
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths))
        mask = self._mask(slopes)
        outputs = []
        for count, trunk, branches in self.runs:
            q, trunk_k, trunk_v = next(parts)
            if count > 1:
                together = (x.unflatten(0, (count, trunk)) for x in (q, trunk_k, trunk_v))  # (count, trunk, heads, D)
                outputs.append(causal_attention(*together, slopes, mask).flatten(0, 1))
                continue
            outputs.append(causal_attention(q, trunk_k, trunk_v, slopes, mask))
            for q, k, v in itertools.islice(parts, len(branches)):
                outputs.append(causal_attention(q, torch.cat([trunk_k, k]), torch.cat([trunk_v, v]), slopes, mask))
        return torch.cat(outputs).to(dtype)

    def _mask(self, slopes):
        """The mask of the longest document. The first layer makes it, and every other use takes a part of it."""
        branched = any(branches for _, branches in self.documents)
        if self._longest_mask is None and (branched or slopes is not None):
            longest = max(trunk + max(branches, default=0) for trunk, branches in self.documents)
            self._longest_mask = causal_mask(longest, slopes, torch.float32, self.device)
        return self._longest_mask

    # FlexAttention: the same documents as a rule about pairs of tokens

    @functools.cached_property
    def segments(self):
        """The document of each token, and its branch, (N,) each; branch 0 is the trunk."""
        segments = [(document, branch, length) for document, (trunk, branches) in enumerate(self.documents)
                    for branch, length in enumerate((trunk, *branches))]
        document, branch, lengths = torch.tensor(segments).unbind(1)
        return document.repeat_interleave(lengths), branch.repeat_interleave(lengths)

    @functools.cached_property
    def mask_mod(self):
        """A function that tells whether query q sees key k, in the form that FlexAttention calls."""
        document, branch = (to_device(ids, self.device) for ids in self.segments)

        def sees(b, h, q, k):
            return (q >= k) & (document[q] == document[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))

        return sees

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """Which blocks of keys each block of queries looks at: from the beginning of its first document to itself.

        Blocks in which every query sees every key are listed separately, because they need no mask. PyTorch's own
        `create_block_mask` would call `mask_mod` for all N x N pairs.
        """
        document, branch = self.segments
        N = len(document)
        begins = torch.arange(0, N, BLOCK)
        ends = torch.clamp(begins + BLOCK, max=N) - 1
        earliest = torch.searchsorted(document, document[begins]) // BLOCK
        q, k = torch.arange(len(begins))[:, None], torch.arange(len(begins))
        seen = (earliest[:, None] <= k) & (k <= q)                                              # (blocks, blocks)
        whole = (k < q) & (document[begins] == document[ends][:, None]) & (branch[ends] == 0)   # keys of one trunk

        def ordered(blocks):  # for each block of queries: how many blocks of keys, and their numbers before the others
            order = blocks.int().argsort(dim=-1, descending=True, stable=True)
            return (to_device(x[None, None].int(), self.device) for x in (blocks.sum(-1), order))

        return BlockMask.from_kv_blocks(*ordered(seen & ~whole), *ordered(seen & whole), BLOCK_SIZE=BLOCK,
                                        mask_mod=self.mask_mod, seq_lengths=(N, N))

    def score_mod(self, slopes):
        """ALiBi in the form that FlexAttention calls. It counts positions in the document, not in the row."""
        position_ids = self.position_ids
        return lambda score, b, h, q, k: score + slopes[h] * (position_ids[k] - position_ids[q])

    def _attend_flex(self, query, key, value, slopes):
        options = {"FORCE_USE_FLEX_ATTENTION": True}  # the kernel for few queries fails at some numbers of them
        if query.dtype == torch.float32:  # otherwise heads of 96 and 128 need more shared memory than most GPUs have
            options["num_stages"] = 1
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        output = _compiled_flex()(*heads_first, block_mask=self.block_mask,
                                  score_mod=None if slopes is None else self.score_mod(slopes),
                                  enable_gqa=query.shape[1] != key.shape[1], kernel_options=options)
        return output.squeeze(0).transpose(0, 1)


@functools.cache
def _compiled_flex():
    # torch.compile makes one variant for each combination of: keys with or without gradients, one block or several,
    # fixed or changing sizes. Beyond eight, its usual limit, attention would run unfused and hold H x N x N numbers.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention)
