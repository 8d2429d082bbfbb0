"""Records -> token ids on disk -> batches.

Tokenised once, in parallel, into files that are memory-mapped from then on: five million records never sit in memory.
Which records make up step k of a run is a pure function of the seed and k. The global batch is formed first and then
dealt to ranks and micro-batches, so that every split of it covers each of its records exactly once.

A document of L tokens is read as L - 1 inputs and the L - 1 tokens they predict: labels come already shifted, and -100
where nothing is to be learnt. Documents are laid end to end, without padding (`attention.Packed` keeps them apart).
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minixllm import prompts
from minixllm.errors import UserError
from minixllm.records import Instruction, Preference, read_instructions, read_preferences

FORMAT = 1                  # part of every cache's key: to be raised when what is written changes
IGNORE = -100               # the label of a token that nobody has to predict
CHUNK = 1000                # records a worker tokenises at a time
PARALLEL_FROM = 32 * 2**20  # bytes of records from which starting worker processes pays
UNKNOWN = "und"             # BCP-47's "undetermined": the language of records that name none


# Tokenising one record

@dataclass
class Counts:
    """What became of the records of one language. Tokens and characters are those of the answers, before any cut."""

    records: int = 0
    too_long: int = 0      # left out
    empty: int = 0         # left out: an answer without text
    equal: int = 0         # left out: a pair of equal answers
    truncated: int = 0     # kept, cut short: these do not teach where to stop
    tokens: int = 0
    characters: int = 0

    def add(self, other: "Counts"):
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def kept(self) -> int:
        return self.records - self.too_long - self.empty - self.equal

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / max(self.characters, 1)


def encode_instruction(record: Instruction, tokenizer, max_length: int, too_long: str):
    """-> (language, [prompt ids, answer ids with EOS] or None where left out, Counts of this record).

    Prompt and answer are tokenised apart, so that no token spans their boundary; the prompt begins with BOS exactly
    when the model's own tokenizer adds one. A record of more than max_length tokens is left out ("drop"), or keeps its
    prompt and as much of its answer as fits, without EOS ("truncate").
    """
    counts = Counts(records=1)
    language = record.language or UNKNOWN
    if not record.output.strip():
        counts.empty = 1
        return language, None, counts
    prompt = encode_prompt(tokenizer, prompts.alpaca(record.instruction, record.input))
    answer = tokenizer.encode(record.output) + [tokenizer.eos_id]
    counts.tokens, counts.characters = len(answer) - 1, len(record.output)
    if len(prompt) + len(answer) > max_length:
        if too_long == "drop" or len(prompt) >= max_length:
            counts.too_long = 1
            return language, None, counts
        counts.truncated = 1
        answer = answer[:max_length - len(prompt)]
    return language, [prompt, answer], counts


def encode_preference(record: Preference, tokenizer, max_length: int, too_long: str):
    """-> (languages, [prompt ids, chosen ids, rejected ids] or None where left out, Counts), as encode_instruction.

    A pair is too long when its prompt and its longer answer have more than max_length tokens. "truncate" then keeps of
    the prompt, where that is over half of max_length, BOS and its end (where the request stands) to that half, and the
    beginnings of the answers; answers that no longer differ are left out as too long.
    """
    counts = Counts(records=1)
    languages = [name for name in (record.language, record.response_language) if name] or [UNKNOWN]
    language = ">".join(dict.fromkeys(languages))
    text = prompts.preference(record)
    if not (text.strip() and record.chosen.strip() and record.rejected.strip()):
        counts.empty = 1
        return language, None, counts
    if record.chosen.strip() == record.rejected.strip():
        counts.equal = 1
        return language, None, counts
    prompt = encode_prompt(tokenizer, text)
    answers = [tokenizer.encode(answer) + [tokenizer.eos_id] for answer in (record.chosen, record.rejected)]
    counts.tokens = sum(map(len, answers)) - 2
    counts.characters = len(record.chosen) + len(record.rejected)
    if len(prompt) + max(map(len, answers)) > max_length:
        half = max_length // 2
        if len(prompt) > half:
            bos = prompt[:1] if prompt[0] == tokenizer.bos_id else []
            prompt = bos + prompt[len(prompt) - half + len(bos):]
        answers = [answer[:max_length - len(prompt)] for answer in answers]
        if too_long == "drop" or answers[0] == answers[1]:
            counts.too_long = 1
            return language, None, counts
        counts.truncated = 1
    return language, [prompt, *answers], counts


def encode_prompt(tokenizer, text: str) -> list[int]:
    """The ids of a prompt, without the EOS that some tokenizers put after every text: here the answer follows."""
    ids = tokenizer.encode(text, add_special_tokens=True)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids


# The token cache

class TokenData:
    """What SFTData and PreferenceData share: a directory of memory-mapped arrays, built where there is none.

    tokens (all segments of all records, end to end), segments (n, S) int32: how many tokens each segment of a record
    has, and offsets (n + 1,) int64: where a record's tokens begin.
    len(data), data.lengths (n,): tokens a record lays in a batch; data.supervised (n,): those with a label;
    data.languages (n,) indexes data.language_names; data.report: {language: Counts}; data.key names the contents.
    """

    def __init__(self, paths, tokenizer, cache_dir, read, encode, settings: dict, workers: int | None):
        paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        if tokenizer.eos_id is None:
            raise UserError("the tokenizer has no end-of-sequence token: answers could not be closed")
        inputs = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "files": [_digest(path) for path in paths],
                  "template": [prompts.WITH_INPUT, prompts.WITHOUT_INPUT], **settings}
        self.key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
        directory = Path(cache_dir) / self.key
        with _locked(directory.with_suffix(".lock")):    # one process builds, all others on this machine wait here
            if not directory.exists():
                _build(directory, paths, tokenizer, read, functools.partial(encode, tokenizer=tokenizer, **settings),
                       workers)
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.paths, self.language_names = paths, meta["languages"]
        self.report = {language: Counts(**counts) for language, counts in meta["counts"].items()}
        # plain views of the maps: slicing an np.memmap costs microseconds each time
        self.tokens = np.asarray(np.memmap(directory / "tokens.bin", dtype=meta["dtype"], mode="r"))
        arrays = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        self.segments, self.offsets, self.languages, self.lines, self.files = map(np.asarray, arrays)

    def __len__(self) -> int:
        return len(self.segments)

    def read(self, index: int) -> list[np.ndarray]:
        """The segments of a record, as int64 arrays."""
        tokens = self.tokens[self.offsets[index]:self.offsets[index + 1]].astype(np.int64)
        return np.split(tokens, np.cumsum(self.segments[index])[:-1])

    def where(self, index: int) -> str:
        """File and line of a record."""
        return f"{self.paths[self.files[index]]}, line {self.lines[index]}"

    def summary(self) -> str:
        """A table, one line a language: what was kept, left out and cut, and what a character costs in tokens."""
        lines = [f"{'language':<22}{'kept':>10}{'too long':>10}{'empty':>8}{'equal':>8}{'truncated':>11}"
                 f"{'tokens/character':>18}"]
        for language, counts in sorted(self.report.items()):
            lines.append(f"{language:<22}{counts.kept:>10,}{counts.too_long:>10,}{counts.empty:>8,}"
                         f"{counts.equal:>8,}{counts.truncated:>11,}{counts.tokens_per_character:>18.3f}")
        return "\n".join(lines)


class SFTData(TokenData):
    """Instructions with their answers, from Alpaca-format files (`records.read_instructions`).

    too_long: what happens to a record of more than max_length tokens, "drop" or "truncate" (see encode_instruction).
    train_on_prompt: the paper's way, in which every token but the first is learnt; otherwise answers and their EOS are.
    Raises UserError for files that cannot be read, and when no record is left.
    """

    blank = 1

    def __init__(self, paths, tokenizer, max_length: int, cache_dir, too_long: str = "drop",
                 train_on_prompt: bool = False, workers: int | None = None):
        settings = {"max_length": max_length, "too_long": too_long}
        super().__init__(paths, tokenizer, cache_dir, read_instructions, encode_instruction, settings, workers)
        self.train_on_prompt = train_on_prompt
        self.lengths = self.segments.sum(1, dtype=np.int32) - 1
        self.supervised = self.lengths if train_on_prompt else self.segments[:, 1]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels), int64 of the record's length."""
        prompt, answer = self.read(index)
        ids = np.concatenate([prompt, answer])
        labels = ids[1:].copy()
        if not self.train_on_prompt:
            labels[:len(prompt) - 1] = IGNORE
        return ids[:-1], labels

    def document(self, index: int) -> int:
        return int(self.lengths[index])

    def count(self, records) -> int:
        """What the loss of these records is divided by: their supervised tokens."""
        return int(self.supervised[records].sum(dtype=np.int64))


class PreferenceData(TokenData):
    """Pairs of answers, from files as `records.read_preferences` takes them.

    A pair is one document of two branches. Its trunk is the prompt but for the last token; the branches are that last
    token followed by the chosen answer, and by the rejected one. What is left out or cut: see encode_preference.
    """

    blank = (0, [1, 1])

    def __init__(self, paths, tokenizer, max_length: int, cache_dir, too_long: str = "drop", workers: int | None = None):
        settings = {"max_length": max_length, "too_long": too_long}
        super().__init__(paths, tokenizer, cache_dir, read_preferences, encode_preference, settings, workers)
        self.lengths = self.segments.sum(1, dtype=np.int32) - 1
        self.supervised = self.segments[:, 1:].sum(1, dtype=np.int32)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels), int64 of the pair's length: trunk, chosen branch, rejected branch."""
        prompt, chosen, rejected = self.read(index)
        ids = np.concatenate([prompt, chosen[:-1], prompt[-1:], rejected[:-1]])
        return ids, np.concatenate([np.full(len(prompt) - 1, IGNORE), chosen, rejected])

    def document(self, index: int) -> tuple[int, list[int]]:
        prompt, *answers = self.segments[index].tolist()
        return prompt - 1, answers

    def count(self, records) -> int:
        """What the loss of these records is divided by: the number of pairs."""
        return len(records)


_ARRAYS = ("segments", "offsets", "languages", "lines", "files")


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a .json or .jsonl file") from None


@contextlib.contextmanager
def _locked(path: Path):
    """Hold the lock of this name. The kernel drops it when its holder dies, so nobody waits for the dead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(directory: Path, paths, tokenizer, read, encode, workers):
    """Tokenise every record into `directory`, which appears whole or not at all."""
    unfinished = directory.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    languages, counts, parts = {}, defaultdict(Counts), []
    size = sum(path.stat().st_size for path in paths)
    try:
        with (tqdm(desc="Tokenising", total=size, unit="B", unit_scale=True, mininterval=0.5) as bar,
              open(unfinished / "tokens.bin", "wb") as file):
            records = ((number, path, record) for number, path in enumerate(paths) for record in read(path, bar.update))
            for tokens, segments, names, lines, files, chunk_counts in _encoded(records, encode, size, workers):
                tokens.astype(dtype).tofile(file)
                ids = [languages.setdefault(name, len(languages)) for name in names]
                parts.append((segments, np.array(ids, np.int16), lines, files))
                for language, each in chunk_counts.items():
                    counts[language].add(each)
        segments, ids, lines, files = (np.concatenate(part) for part in zip(*parts))
        if not len(segments):
            total = Counts()
            for each in counts.values():
                total.add(each)
            raise UserError(f"{', '.join(map(str, paths))}: nothing left to learn from: of {total.records:,} records "
                            f"{total.too_long:,} are too long, {total.empty:,} empty, {total.equal:,} pairs of equals")
        offsets = np.concatenate([[0], np.cumsum(segments.sum(1, dtype=np.int64))])
        for name, array in zip(_ARRAYS, (segments, offsets, ids, lines, files), strict=True):
            np.save(unfinished / f"{name}.npy", array)
        meta = {"dtype": dtype.name, "languages": list(languages), "counts": {k: asdict(v) for k, v in counts.items()}}
        (unfinished / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        os.replace(unfinished, directory)
    except OSError as error:
        raise UserError(f"{directory}: the token cache cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _encoded(records, encode, size: int, workers: int | None):
    """Yield the encoded chunks of (file number, path, record) in order, by worker processes if there is much to do."""
    chunks = iter(lambda: list(itertools.islice(records, CHUNK)), [])
    workers = workers or (len(os.sched_getaffinity(0)) if size >= PARALLEL_FROM else 1)
    if workers == 1:
        _start_worker(encode)
        yield from map(_encode_chunk, chunks)
        return
    # not forked: this process may have threads (PyTorch's, a process group's) whose locks a fork would copy as held
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (encode,)) as pool:
        try:
            waiting = [pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 4 * workers)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 1)]
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(encode):
    global _encode
    _encode = encode


def _encode_chunk(chunk):
    """-> (tokens, segments (k, S), language names, lines (k,), file numbers (k,), {language: Counts}) of those kept."""
    tokens, segments, names, lines, files, counts = [], [], [], [], [], defaultdict(Counts)
    for number, path, record in chunk:
        try:
            language, encoded, each = _encode(record)
        except UserError as error:
            raise UserError(f"{path}, line {record.line}: {error}") from None
        counts[language].add(each)
        if encoded is not None:
            for segment in encoded:
                tokens += segment
            segments.append([len(segment) for segment in encoded])
            names.append(language)
            lines.append(record.line)
            files.append(number)
    return (np.array(tokens, np.int32), np.array(segments, np.int32).reshape(len(segments), -1), names,
            np.array(lines, np.int64), np.array(files, np.int32), dict(counts))


# Batches

@dataclass
class Batch:
    """Documents laid end to end: input_ids (N,), labels (N,) long, `documents` as `attention.Packed` takes them.

    records: the id of each document's record. An empty batch, which a rank with nothing left runs so that all ranks
    take part in every collective, has no records and one document whose tokens have no label.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    documents: list
    records: list[int]

    @property
    def answers(self) -> torch.Tensor:
        """(N,) long: the answer each token belongs to, to sum by; i for the i-th document, 2i and 2i + 1 for a pair's.

        (A trunk, in which nothing is supervised, counts as the first of its answers.)
        """
        lengths = [length for document in self.documents for length in (
            [document] if isinstance(document, int) else [document[0] + document[1][0], *document[1][1:]])]
        return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


@dataclass
class Step:
    """One optimiser step of one rank: its micro-batches, and the count that the *global* batch's loss is divided by."""

    micro_batches: list[Batch]
    count: int


def collate(data, records) -> Batch:
    """The batch of these record ids, in this order."""
    if not len(records):
        size = 1 if isinstance(data.blank, int) else sum(data.blank[1])
        return Batch(torch.zeros(size, dtype=torch.long), torch.full((size,), IGNORE), [data.blank], [])
    records = [int(record) for record in records]
    input_ids, labels = zip(*(data[record] for record in records))
    return Batch(torch.from_numpy(np.concatenate(input_ids)), torch.from_numpy(np.concatenate(labels)),
                 [data.document(record) for record in records], records)


def hold_out(data, per_language: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(the ids to train on, the ids held out): of each language `per_language` records, but never over a tenth."""
    order = np.random.default_rng(seed).permutation(len(data))
    languages = data.languages[order]
    held = [order[languages == language] for language in range(len(data.language_names))]
    held = np.sort(np.concatenate([each[:min(per_language, len(each) // 10)] for each in held]))
    return np.setdiff1d(np.arange(len(data)), held), held


def in_order(data, records, max_tokens: int, rank: int = 0, world: int = 1):
    """Yield this rank's batches of the given records, each once over all ranks, of up to max_tokens tokens (at least
    one record): for held-out losses. All ranks get equally many batches, the last perhaps empty.
    """
    order, bounds = pack(data.lengths[records], max(max_tokens, data.lengths[records].max(initial=1)))
    rows = np.split(records[order], bounds[1:-1])
    for start in range(0, len(rows), world):
        yield collate(data, rows[start + rank] if start + rank < len(rows) else [])


class Stream:
    """The batches of a run, by step number: the same for every resume, and the same global batch for every world size.

    A batch is `batch_size` rows, over all ranks, of at most `max_length` tokens, each packed with as many records as
    fit; without max_length a row is one record. An epoch gives every record once, in an order drawn from (seed, epoch),
    and is cut evenly into ceil(rows / batch_size) steps, so there is no small last batch. (Packing differs from epoch
    to epoch by a row or so; the number of steps stays that of the first.)
    temperature: draw languages with p ~ n^(1/T) instead, n being a language's records: an epoch keeps its size, and
    within a language every record comes as often as any other, give or take one. T = 1 changes nothing.
    records: the ids to draw from (default: all).
    """

    def __init__(self, data, seed: int, batch_size: int, micro_batch_size: int, max_length: int | None = None,
                 rank: int = 0, world: int = 1, temperature: float | None = None, records=None):
        self.data, self.seed, self.temperature, self.max_length = data, seed, temperature, max_length
        self.micro_batch_size, self.rank, self.world = micro_batch_size, rank, world
        self.records = np.arange(len(data)) if records is None else np.asarray(records)
        if max_length is not None and (longest := data.lengths[self.records].max()) > max_length:
            raise UserError(f"rows of {max_length} tokens cannot hold the longest record, of {longest}")
        self._plan = functools.lru_cache(maxsize=1)(self._plan)
        self.steps_per_epoch = -(-(len(self._plan(0)[1]) - 1) // batch_size)

    def batch(self, step: int) -> Step:
        """This rank's share of step `step`, counted from 0 over the whole run."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order, bounds = self._plan(epoch)
        rows = len(bounds) - 1
        first, last = (k * rows // self.steps_per_epoch for k in (step, step + 1))
        mine = range(first, last)[self.rank::self.world]
        most = -(-(last - first) // self.world)         # rows of the rank that has most: all take as many turns
        micro_batches = [
            collate(self.data, [record for row in mine[start:start + self.micro_batch_size]
                                for record in order[bounds[row]:bounds[row + 1]]])
            for start in range(0, most, self.micro_batch_size)]
        return Step(micro_batches, self.data.count(order[bounds[first]:bounds[last]]))

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(record ids of the epoch, row after row; (rows + 1,) where each row begins)."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self._draw(rng))
        if self.max_length is None:
            return order, np.arange(len(order) + 1)
        by_row, bounds = pack(self.data.lengths[order], self.max_length)
        return order[by_row], bounds

    def _draw(self, rng) -> np.ndarray:
        if self.temperature is None:
            return self.records
        languages = self.data.languages[self.records]
        members = [self.records[languages == language] for language in np.unique(languages)]
        weights = np.array([len(each) for each in members], float) ** (1 / self.temperature)
        ends = np.rint(np.cumsum(weights) / weights.sum() * len(self.records)).astype(int)   # quotas that sum to n
        drawn = []
        for each, quota in zip(members, np.diff(ends, prepend=0)):
            times, rest = divmod(quota, len(each))
            drawn += [np.repeat(each, times), rng.permutation(each)[:rest]]
        return np.concatenate(drawn)


def pack(lengths: np.ndarray, capacity: int, open_rows: int = 32, window: int = 2**14) -> tuple[np.ndarray, np.ndarray]:
    """Lay documents (n,) out in rows of at most `capacity` tokens: (their order (n,), where each row begins (rows + 1,)).

    Best fit in the given order among a few open rows; where a document fits none, the fullest is closed. Windows of
    documents are packed independently, which lets numpy pack all of them at once.
    """
    n = len(lengths)
    windows = -(-n // window)
    padded = np.zeros(windows * window, np.int32)
    padded[:n] = lengths
    padded = padded.reshape(windows, window)
    every = np.arange(windows)
    room = np.full((windows, open_rows), capacity, np.int32)
    row = np.tile(np.arange(open_rows), (windows, 1))         # the row that is open in each place
    opened = np.full(windows, open_rows)
    result = np.empty((windows, window), np.int64)
    for t in range(min(window, n)):
        need = padded[:, t]
        left = room - need[:, None]                           # (windows, open_rows)
        place = np.where(left >= 0, left, capacity + 1).argmin(1)
        full = left[every, place] < 0
        place[full] = room[full].argmin(1)
        room[full, place[full]] = capacity
        row[full, place[full]] = opened[full]
        opened += full
        room[every, place] -= need
        result[:, t] = row[every, place]
    result += window * every[:, None]                         # rows of a window are fewer than its documents
    result = result.reshape(-1)[:n]
    sizes = np.unique(result, return_counts=True)[1]
    return np.argsort(result, kind="stable"), np.concatenate([[0], np.cumsum(sizes)])
