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
        self.cache = cache
        # By numpy: on a few numbers its operations take a tenth of the time of torch's.
        counts, ends = np.array(lengths), np.cumsum(lengths)
        rows = np.arange(len(lengths)).repeat(counts)
        places = np.arange(ends[-1]) + (np.array(past) + counts - ends)[rows]
        self.position_ids, self.last, self.rows = (  # rows (N,): each token's row
            torch.from_numpy(ids).to(device) for ids in (places, ends - 1, rows))
        # Neighbouring rows with one new token each share a call, which covers the longest of them. On a CPU only a few
        # rows share one, so that little is computed beyond the ends of shorter rows. A row with several new tokens has
        # a call of its own.
        together = TOGETHER if self.rows.is_cpu else len(lengths)
        self.masks = None  # one for each part, made in the first layer and used in all
        self.parts, start = [], 0
        for single, run in itertools.groupby(range(len(lengths)), key=lambda row: lengths[row] == 1):
            run = [row for row in run if lengths[row]]
            size = together if single else 1
            for rows in (run[i:i + size] for i in range(0, len(run), size)):
                seen = [past[row] + lengths[row] for row in rows]
                end = start + sum(lengths[row] for row in rows)
                self.parts.append((slice(start, end), slice(rows[0], rows[-1] + 1), max(seen),
                                   _distances(seen).to(device) if single else None))
                start = end

    def attend(self, layer_idx, query, key, value, slopes=None) -> torch.Tensor:
        """query (N, H, D), key and value (N, KV, D) of the new tokens -> (N, H, D); `slopes` (H,) adds ALiBi."""
        keys, values = self.cache.layer(layer_idx, key)
        dtype = query.dtype
        query, key, value = (x.to(keys.dtype) for x in (query, key, value))
        keys[self.rows, :, self.position_ids] = key
        values[self.rows, :, self.position_ids] = value
        if self.masks is None:
            self.masks = self._make_masks(slopes, query, key.shape[1])
        outputs = []
        for (tokens, rows, longest, distances), mask in zip(self.parts, self.masks):
            k, v = keys[rows, :, :longest], values[rows, :, :longest]  # (rows, KV, longest, D)
            if distances is None:
                k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
                outputs.append(causal_attention(query[tokens], k, v, slopes, mask))
            else:
                outputs.append(_attend_one(query[tokens], k, v, mask))
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).to(dtype)

    def _make_masks(self, slopes, query, key_heads: int) -> list:
        """What each part adds to its scores: (rows, 1 or KV, 1 or H / KV, longest) for one query a row."""
        longest = max((longest for _, _, longest, distances in self.parts if distances is None), default=0)
        causal = None if slopes is None else causal_mask(longest, slopes, query.dtype, query.device)
        masks = []
        for _, _, _, distances in self.parts:
            if distances is None:
                masks.append(causal)
            elif slopes is None:
                masks.append(distances.masked_fill(distances > -math.inf, 0).to(query.dtype))
            else:
                masks.append((slopes.view(key_heads, -1, 1) * distances).to(query.dtype))
        return masks


def _distances(seen: list[int]) -> torch.Tensor:
    """The distance of each key to the newest token of its row, a number <= 0, or -inf beyond the row's end.

    seen: how many tokens each row has. Returns (rows, 1, 1, longest).
    """
    seen = torch.tensor(seen)[:, None]
    distances = torch.arange(seen.max()) - (seen - 1)
    return distances.float().masked_fill(distances > 0, -math.inf)[:, None, None]


def _attend_one(query, keys, values, mask) -> torch.Tensor:
    """One query a row: query (rows, H, D), keys and values (rows, KV, longest, D) -> (rows, H, D)."""
    B, H, D = query.shape
    KV = keys.shape[1]
    # Grouped-query attention: the query heads that share a key head become queries of that head, so that its keys are
    # read once and never repeated.
    return F.scaled_dot_product_attention(query.view(B, KV, H // KV, D), keys, values, attn_mask=mask).view(B, H, D)
