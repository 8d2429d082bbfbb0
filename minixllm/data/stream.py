"""Packing, batches and steps: which records make up step k of a run is a pure function of the seed and k.

The global batch is formed first and then dealt to ranks and micro-batches, so that every split of it covers each of its
records exactly once. Documents are laid end to end, without padding (`attention.Packed` keeps them apart).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from minixllm.data.datasets import IGNORE
from minixllm.errors import UserError, expect

OPEN_ROWS, WINDOW = 32, 2**14  # of `pack`


@dataclass
class Batch:
    """Documents laid end to end: input_ids (N,), labels (N,) long, `documents` as `attention.Packed` takes them.

    records: the id of each document's record. A rank with nothing left to do runs an empty batch, so that all ranks
    take part in every collective. It has no records, and one document of one token without a label.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    documents: list
    records: list[int]


@dataclass
class Step:
    """One optimiser step of one rank: its micro-batches, and the count that the *global* batch's loss is divided by."""

    micro_batches: list[Batch]
    count: int


def collate(data, records) -> Batch:
    """The batch of these record ids, in this order."""
    if not len(records):
        return Batch(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORE), [1], [])
    records = [int(record) for record in records]
    input_ids, labels = zip(*(data[record] for record in records))
    return Batch(torch.from_numpy(np.concatenate(input_ids)), torch.from_numpy(np.concatenate(labels)),
                 [data.document(record) for record in records], records)


def hold_out(data, per_language: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(the ids to train on, the ids held out): of each language `per_language` records, but never over a tenth.

    Where every language has under ten, a tenth of all records, with as many of a language at most.
    """
    order = np.random.default_rng(seed).permutation(len(data))
    sorted_by_language = order[np.argsort(data.languages[order], kind="stable")]
    languages = np.split(sorted_by_language, np.cumsum(np.bincount(data.languages))[:-1])
    held = np.concatenate([each[:min(per_language, len(each) // 10)] for each in languages])
    if not len(held):
        few = np.concatenate([each[:per_language] for each in languages])
        held = order[np.isin(order, few)][:len(data) // 10]
    held = np.sort(held)
    return np.setdiff1d(np.arange(len(data)), held), held


def in_order(data, records, max_tokens: int, rank: int = 0, world: int = 1):
    """Yield this rank's batches of the given records, each once over all ranks, of up to max_tokens tokens (at least
    one record): for held-out losses. All ranks get equally many batches, the last perhaps empty.
    """
    order, bounds = pack(data.lengths[records], max(max_tokens, data.lengths[records].max(initial=1)))
    rows = [records[order[start:end]] for start, end in zip(bounds, bounds[1:])]
    for start in range(0, len(rows), world):
        yield collate(data, rows[start + rank] if start + rank < len(rows) else [])


class Stream:
    """The batches of a run, by step number: the same for every resume, and the same global batch for every world size.

    A batch is `batch_size` rows, over all ranks, of at most `max_length` tokens, each packed with as many records as
    fit; without max_length a row is one record. An epoch gives every record once, in an order drawn from (seed, epoch),
    and is cut evenly into ceil(rows / batch_size) steps, so there is no small last batch. (Packing differs from epoch
    to epoch by a row or so; the number of steps stays that of the first, and none is empty.)
    temperature: draw languages with p ~ n^(1/T) instead, n being a language's records: an epoch keeps its size, and
    within a language every record comes as often as any other, give or take one. T = 1 changes nothing.
    records: the ids to draw from (default: all).
    """

    def __init__(self, data, seed: int, batch_size: int, micro_batch_size: int, max_length: int | None = None,
                 rank: int = 0, world: int = 1, temperature: float | None = None, records=None):
        expect(batch_size, int, "batch_size", least=1)
        expect(micro_batch_size, int, "micro_batch_size", least=1)
        if temperature is not None:
            expect(temperature, float, "temperature", above=0)
        self.data, self.seed, self.temperature, self.max_length = data, seed, temperature, max_length
        self.micro_batch_size, self.rank, self.world = micro_batch_size, rank, world
        self.records = np.arange(len(data)) if records is None else np.asarray(records)
        if max_length is not None and (longest := data.lengths[self.records].max()) > max_length:
            raise UserError(f"rows of {max_length} tokens cannot hold the longest record, of {longest}")
        self._plan = functools.lru_cache(maxsize=1)(self._plan)
        self.batch = functools.lru_cache(maxsize=1)(self.batch)
        self.steps_per_epoch = 0  # no epoch has fewer rows than this (see _plan); the first may have any number
        self.steps_per_epoch = -(-(len(self._plan(0)[1]) - 1) // batch_size)

    def batch(self, step: int) -> Step:
        """This rank's share of step `step`, counted from 0 over the whole run."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order, bounds = self._plan(epoch)
        rows = len(bounds) - 1
        first, last = (k * rows // self.steps_per_epoch for k in (step, step + 1))
        mine = range(first, last)[self.rank::self.world]
        most = -(-(last - first) // self.world)         # rows of the rank that has most: all take as many turns
        micro_batches = []
        for start in range(0, most, self.micro_batch_size):
            records = [record for row in mine[start:start + self.micro_batch_size]
                       for record in order[bounds[row]:bounds[row + 1]]]
            # neighbours of one length share a call of attention
            micro_batches.append(collate(self.data, sorted(records, key=self.data.lengths.__getitem__)))
        return Step(micro_batches, self.data.count(order[bounds[first]:bounds[last]]))

    def records_between(self, begin: float, end: float) -> list[int]:
        """The records from `begin` to `end`, two places in the run counted in epochs, in the order they come in."""
        records = []
        for epoch in range(int(begin), math.ceil(end)):
            order, bounds = self._plan(epoch)
            first, last = (bounds[round(min(max(place - epoch, 0), 1) * (len(bounds) - 1))] for place in (begin, end))
            records += order[first:last].tolist()
        return records

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(record ids of the epoch, row after row; (rows + 1,) where each row begins)."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self._draw(rng))
        if self.max_length is None:
            return order, np.arange(len(order) + 1)
        by_row, bounds = pack(self.data.lengths[order], self.max_length)
        missing = max(0, self.steps_per_epoch - (len(bounds) - 1))
        cuts = np.setdiff1d(np.arange(len(order)), bounds)[:missing]
        return order[by_row], np.sort(np.concatenate([bounds, cuts]))

    def _draw(self, rng) -> np.ndarray:
        if self.temperature is None:
            return self.records
        languages = self.data.languages[self.records]
        members = [self.records[languages == language] for language in np.unique(languages)]
        counts = np.array([len(each) for each in members])
        weights = (counts / counts.max()) ** (1 / self.temperature)
        ends = np.rint(np.cumsum(weights) / weights.sum() * len(self.records)).astype(int)   # quotas that sum to n
        drawn = []
        for each, quota in zip(members, np.diff(ends, prepend=0)):
            times, rest = divmod(quota, len(each))
            drawn += [np.repeat(each, times), rng.permutation(each)[:rest]]
        return np.concatenate(drawn)


def pack(lengths, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay documents of these lengths (n,) out in rows of at most `capacity` tokens.

    -> (the documents, row after row (n,); where each row begins (rows + 1,)). A document goes into that of the open
    rows where it leaves the least room (best fit). Where it fits none, a new row takes the place of the fullest.

    Documents are packed in windows of WINDOW, each by itself. A Python loop over millions of documents would take
    minutes; this one has WINDOW turns at most, in each of which numpy places one document of every window. The price is
    that the last OPEN_ROWS rows of a window stay partly empty, which are under one in a hundred.
    """
    n, capacity = len(lengths), min(capacity, 2**31 - 2)  # `room` is of int32
    windows = -(-n // WINDOW)
    padded = np.zeros(windows * WINDOW, np.int32)
    padded[:n] = lengths
    padded = padded.reshape(windows, WINDOW)
    every = np.arange(windows)
    room = np.full((windows, OPEN_ROWS), capacity, np.int32)
    row = np.tile(np.arange(OPEN_ROWS), (windows, 1))         # the row that is open in each place
    opened = np.full(windows, OPEN_ROWS)
    result = np.empty((windows, WINDOW), np.int64)
    for t in range(min(WINDOW, n)):
        need = padded[:, t]
        left = room - need[:, None]                           # (windows, OPEN_ROWS)
        place = np.where(left >= 0, left, capacity + 1).argmin(1)
        full = left[every, place] < 0
        place[full] = room[full].argmin(1)
        room[full, place[full]] = capacity
        row[full, place[full]] = opened[full]
        opened += full
        room[every, place] -= need
        result[:, t] = row[every, place]
    result += WINDOW * every[:, None]                         # no two windows share a row
    result = result.reshape(-1)[:n]
    sizes = np.unique(result, return_counts=True)[1]
    return np.argsort(result, kind="stable"), np.concatenate([[0], np.cumsum(sizes)])
