"""The KV cache: keys and values of the tokens that running sequences have seen, in rows of different lengths.

`cache.extend(lengths)` takes new tokens for each row (none, one or many), laid end to end with no padding, and returns
the context with which a model attends to them and to their past. So one forward can start some rows (prefill) and add
a token to others (decode), and reads the weights once for both.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from minixllm.models.attention import causal_attention, causal_mask

TOGETHER = 8  # rows in one call on a CPU: the fastest of 4 to 32 for prompts of mixed lengths


class KVCache:
    """Room for `rows` sequences of at most `capacity` tokens; `lengths[row]` of them are filled.

    A layer's keys and values (rows, KV, capacity, D) are made when it first attends, in the type that it computes in.
    On a CPU that is fp32: with one query, PyTorch's kernel is three to seven times as fast in fp32 as in bf16.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, capacity
        self.lengths = [0] * rows
        self.layers = {}  # layer_idx -> (keys, values)

    def extend(self, lengths: list[int], device="cpu") -> "Extension":
        """The context of a forward over sum(lengths) tokens: lengths[0] tokens for row 0, then those for row 1, ...

        Rows beyond the list get none. Raises ValueError when a row would exceed the capacity.
        """
        past = self.lengths[:len(lengths)]
        total = [p + n for p, n in zip(past, lengths, strict=True)]
        if max(total) > self.capacity:
            raise ValueError(f"row {total.index(max(total))} would hold {max(total)} tokens, the cache {self.capacity}")
        self.lengths[:len(lengths)] = total
        return Extension(self, past, lengths, device)

    def keep(self, rows: list[int]) -> list[int]:
        """Drop all rows but these and close the gaps. Returns where the rows now at 0, 1, ... were before.

        Only rows beyond the new end move, into the gaps, so that as little as possible is copied.
        """
        gaps = [row for row in range(len(rows)) if row not in rows]
        order = list(range(len(rows)))
        for gap, row in zip(gaps, (row for row in rows if row >= len(rows))):
            order[gap] = row
            for tensor in itertools.chain.from_iterable(self.layers.values()):
                tensor[gap, :, :self.lengths[row]] = tensor[row, :, :self.lengths[row]]
        self.lengths = [self.lengths[row] for row in order] + [0] * (self.rows - len(rows))
        return order

    def layer(self, layer_idx: int, key: torch.Tensor):
        """Keys and values of a layer. They begin as zeros: even masked numbers must be finite (0 * nan is nan)."""
        if layer_idx not in self.layers:
            shape = (self.rows, key.shape[1], self.capacity, key.shape[2])
            dtype = torch.float32 if key.is_cpu else key.dtype
            self.layers[layer_idx] = key.new_zeros(shape, dtype=dtype), key.new_zeros(shape, dtype=dtype)
        return self.layers[layer_idx]


class Extension:
    """The context of a forward over new tokens that continue the rows of a cache (compare `attention.Packed`).

    position_ids (N,): each token's place in its row. last (rows,): where the last new token of each row lies.
    """

    def __init__(self, cache: KVCache, past: list[int], lengths: list[int], device):
        self.cache, self.past, self.lengths = cache, past, lengths
        # By numpy: on a few numbers its operations take a tenth of the time of torch's.
        counts, ends = np.array(lengths), np.cumsum(lengths)
        rows = np.arange(len(lengths)).repeat(counts)
        places = np.arange(ends[-1]) + (np.array(past) + counts - ends)[rows]
        self.position_ids, self.last, self.rows = (  # rows (N,): each token's row
            torch.from_numpy(ids).to(device) for ids in (places, ends - 1, rows))
        self.calls = None  # of attention: planned in the first layer, and the same in all

    def attend(self, layer_idx, query, key, value, slopes=None) -> torch.Tensor:
        """query (N, H, D), key and value (N, KV, D) of the new tokens -> (N, H, D); `slopes` (H,) adds ALiBi."""
        keys, values = self.cache.layer(layer_idx, key)
        dtype = query.dtype
        query, key, value = (x.to(keys.dtype) for x in (query, key, value))
        keys[self.rows, :, self.position_ids] = key
        values[self.rows, :, self.position_ids] = value
        if self.calls is None:
            self.calls = list(self._plan(slopes, query, key.shape[1]))
        outputs = []
        for tokens, rows, longest, single, mask in self.calls:
            q, k, v = query[tokens], keys[rows, :, :longest], values[rows, :, :longest]  # k, v (rows, KV, longest, D)
            outputs.append(_attend_one(q, k, v, mask) if single else
                           causal_attention(q, k[0].transpose(0, 1), v[0].transpose(0, 1), slopes, mask))
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).to(dtype)

    def _plan(self, slopes, query, key_heads: int):
        """Yields (tokens, rows, how many keys, whether each row has a single query, mask) for each call of attention.

        Neighbouring rows with one new token each share a call, which covers the longest of them: on a CPU only a few,
        so that little is computed beyond the ends of shorter rows. A row with several new tokens has its own call.
        """
        seen = [past + new for past, new in zip(self.past, self.lengths)]
        longest = max((total for total, new in zip(seen, self.lengths) if new > 1), default=0)
        causal = None if slopes is None else causal_mask(longest, slopes, query.dtype, query.device)
        start = 0
        for single, run in itertools.groupby(range(len(seen)), key=lambda row: self.lengths[row] == 1):
            run = [row for row in run if self.lengths[row]]
            size = 1 if not single else TOGETHER if query.is_cpu else len(run)
            for rows in (run[i:i + size] for i in range(0, len(run), size)):
                end = start + sum(self.lengths[row] for row in rows)
                totals = [seen[row] for row in rows]
                mask = _mask_of_single(totals, slopes, query, key_heads) if single else causal
                yield slice(start, end), slice(rows[0], rows[-1] + 1), max(totals), single, mask
                start = end


def _mask_of_single(seen: list[int], slopes, query, key_heads: int) -> torch.Tensor:
    """What is added to the scores of one query a row, which sees `seen` tokens: (rows, 1 or KV, 1 or H / KV, longest).
    """
    distances = (torch.arange(max(seen)) - (torch.tensor(seen)[:, None] - 1)).float()  # of keys to the query: <= 0
    distances = distances.masked_fill(distances > 0, -math.inf)[:, None, None].to(query.device)
    if slopes is None:
        return distances.masked_fill(distances > -math.inf, 0).to(query.dtype)
    return (slopes.view(key_heads, -1, 1) * distances).to(query.dtype)


def _attend_one(query, keys, values, mask) -> torch.Tensor:
    """One query a row: query (rows, H, D), keys and values (rows, KV, longest, D) -> (rows, H, D)."""
    B, H, D = query.shape
    KV = keys.shape[1]
    # Grouped-query attention: the query heads that share a key head become its queries, so that its keys are read once.
    return F.scaled_dot_product_attention(query.view(B, KV, H // KV, D), keys, values, attn_mask=mask).view(B, H, D)
