"""Token ids on disk: built once from record files, by several processes, and memory-mapped from then on.

Millions of records never sit in memory: they are read one at a time, tokenised in chunks, and appended to a file. A
cache is named by all that its contents depend on (the bytes of the record files, the tokenizer, the prompt templates,
the settings), so it is built anew exactly when one of these changes.
"""

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minixllm import languages
from minixllm.data import prompts
from minixllm.data.records import place
from minixllm.errors import UserError
from minixllm.files import digest, locked, replacing, save_array

FORMAT = 4                  # to be raised when other ids or other files come of the same inputs (a test holds the ids)
CHUNK = 1000                # records a worker tokenises at a time
PARALLEL_FROM = 64 * 2**20  # bytes of records from which starting worker processes pays
LEFT_OUT = ("too_long", "empty", "equal")  # why a record is not kept; equal: the two answers of a pair
SEVERAL_TURNS = "are chats of more or less than one exchange, which are left out"


def kept(counts: Counter) -> int:
    """How many records of a language, or of all, were kept."""
    return counts["records"] - sum(counts[reason] for reason in LEFT_OUT)


class TokenCache:
    """The records of some files as token ids: a directory of memory-mapped arrays, built where there is none.

    encoder: `datasets.Instructions` or `datasets.Preferences`, which reads records and makes ids and labels of them.

    tokens: those of all records, end to end; segments (n, S): how many of a record's belong to its prompt and to each
    answer; offsets (n + 1,): where its tokens begin; lengths (n,): the tokens it takes in a batch; counted (n,): what
    it adds to the count that a loss is divided by; languages (n,): indices into language_names; lines, files (n,):
    where it was read; report: {language: a Counter of its records, of those in LEFT_OUT, of those truncated (kept, cut
    short), and of the answers' tokens and characters before any cut}; remarks: what is odd about a file's records, in
    lines to print; key: a hash of all that the ids depend on.
    Raises UserError for records that cannot be read or encoded, when none is left, and where the cache cannot be kept.
    """

    def __init__(self, paths, tokenizer, cache_dir, encoder, workers: int | None = None):
        self.paths, self.encoder = list(map(Path, paths)), encoder
        if tokenizer.eos_id is None:
            raise UserError("the tokenizer has no end-of-sequence token: answers could not be closed")
        tables = [prompts.REQUESTS, languages.TABLE]
        inputs = [FORMAT, type(encoder).__name__, encoder.max_length, encoder.too_long, tokenizer.fingerprint,
                  prompts.WITH_INPUT, prompts.WITHOUT_INPUT, *map(digest, self.paths + tables)]
        self.key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
        directory = Path(cache_dir) / self.key
        if not directory.exists():
            _build(directory, self.paths, tokenizer, encoder, workers)
        try:
            self._map(directory)
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{directory}: a damaged token cache ({error}); remove it to have it built anew") from None

    def _map(self, directory: Path):
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.language_names = meta["languages"]
        self.report = {language: Counter(counts) for language, counts in meta["report"].items()}
        self.remarks = _in_words(self.paths, meta["remarks"])
        # np.asarray gives plain views of the maps: slicing an np.memmap costs microseconds each time
        self.tokens = np.asarray(np.memmap(directory / "tokens.bin", dtype=meta["dtype"], mode="r"))
        records = np.asarray(np.load(directory / "records.npy", mmap_mode="r"))
        self.segments, (self.languages, self.lines, self.files) = records[:, :-3], records[:, -3:].T
        self.offsets = np.concatenate([[0], np.cumsum(self.segments.sum(1, dtype=np.int64))])
        if len(self.tokens) != self.offsets[-1]:
            raise ValueError(f"{len(self.tokens)} tokens, expected {self.offsets[-1]}")
        self.lengths = self.segments.sum(1, dtype=np.int32) - 1
        self.counted = self.encoder.counted(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    def read(self, index: int) -> list[np.ndarray]:
        """The segments of a record, as int64 arrays."""
        tokens = self.tokens[self.offsets[index]:self.offsets[index + 1]].astype(np.int64)
        return np.split(tokens, np.cumsum(self.segments[index])[:-1])

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of a record, int64 (lengths[index],)."""
        return self.encoder.example(self.read(index))

    def document(self, index: int):
        """The record as `attention.Packed` takes it: its length, or its trunk and branches."""
        return self.encoder.document(self.segments[index].tolist())

    def count(self, records) -> int:
        """What the loss of these records is divided by: their supervised tokens, or the number of pairs."""
        return int(self.counted[records].sum(dtype=np.int64))

    def where(self, index: int) -> str:
        """File and line of a record."""
        return f"{self.paths[self.files[index]]}, {place(self.lines[index])}"

    def total(self) -> str:
        """What was kept, left out and cut, over all languages."""
        return _total(self.report, self.encoder.unit)

    def summary(self) -> str:
        """What was kept, left out and cut of each language, and its tokens a character, in a table; and the remarks."""
        shown = [name for name in (*LEFT_OUT, "truncated") if any(counts[name] for counts in self.report.values())]
        lines = [f"{'language':<22}{'kept':>10}" + "".join(f"{name.replace('_', ' '):>11}" for name in shown)
                 + f"{'tokens/character':>18}"]
        for language, counts in sorted(self.report.items()):
            values = "".join(f"{counts[name]:>11,}" for name in shown)
            cost = counts["tokens"] / max(counts["characters"], 1)
            lines.append(f"{language:<22}{kept(counts):>10,}{values}{cost:>18.3f}")
        return "\n".join(lines + self.remarks)


def _total(report: dict[str, Counter], unit: str) -> str:
    counts = sum(report.values(), Counter())
    left_out = ", ".join(f"{counts[reason]:,} {reason.replace('_', ' ')}" for reason in LEFT_OUT)
    return f"{unit}: {kept(counts):,} kept; left out {left_out}; {counts['truncated']:,} truncated"


def _in_words(paths, remarks) -> list[str]:
    """A line for each (file number, what its records do, how many, the line of the first, what it holds)."""
    lines = [f"{paths[number]}: records that {what}: {count:,}, the first in {place(line)}"
             + (f": {example!r}" if example else "") for number, what, count, line, example in remarks]
    return lines if len(lines) <= 20 else [*lines[:20], f"more remarks of this kind: {len(lines) - 20}"]


def _build(directory: Path, paths, tokenizer, encoder, workers):
    """Tokenise every record into `directory`. One process builds, and the others on this machine wait for it."""
    try:
        with locked(directory.with_suffix(".lock")):
            if not directory.exists():
                with replacing(directory) as partial:
                    _write(partial, paths, tokenizer, encoder, workers)
    except OSError as error:
        raise UserError(f"{directory}: the token cache cannot be written: {error.strerror or error}; --cache names "
                        "another directory") from error


def _write(folder: Path, paths, tokenizer, encoder, workers):
    """The files of a cache. Chunks of records are read here, encoded here or by workers, and written in their order."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    names, report, parts, remarks = {}, defaultdict(Counter), [], {}

    def remark(number, what, line, example=""):
        remarks.setdefault((number, what), [0, line, example])[0] += 1

    def records():
        for number, path in enumerate(paths):
            for record in encoder.read(path, bar.update, lambda line: remark(number, SEVERAL_TURNS, line)):
                yield number, path, record

    size = sum(path.stat().st_size for path in paths)
    with (tqdm(desc="Tokenising", total=size, unit="B", unit_scale=True, mininterval=0.5) as bar,
          open(folder / "tokens.bin", "wb") as file):
        for tokens, rows, counts, odd in _encoded(records(), encoder, tokenizer, size, workers):
            file.write(tokens.astype(dtype).tobytes())
            for row in rows:
                row[-3] = names.setdefault(row[-3], len(names))
            if rows:
                parts.append(np.array(rows, np.int32))
            for language, each in counts.items():
                report[language] += each
            for each in odd:
                remark(*each)
    remarks = [[*key, *value] for key, value in remarks.items()]
    if not parts:
        raise UserError(f"{', '.join(map(str, paths))}: nothing left to learn from: {_total(report, encoder.unit)}. "
                        f"{' '.join(_in_words(paths, remarks)[:1])}")
    save_array(folder / "records.npy", np.concatenate(parts))
    meta = {"dtype": dtype.name, "languages": list(names), "report": report, "remarks": remarks}
    (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def _encoded(records, encoder, tokenizer, size: int, workers: int | None):
    """Yield the encoded chunks of (file number, path, record) in order, by worker processes if there is much to do."""
    chunks = iter(lambda: list(itertools.islice(records, CHUNK)), [])
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on a Mac
        workers = cores if size >= PARALLEL_FROM else 1
    if workers == 1:
        yield from (_encode_chunk(chunk, encoder, tokenizer) for chunk in chunks)
        return
    # not forked: this process may have threads (PyTorch's, a process group's) whose locks a fork would copy as held
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (encoder, tokenizer)) as pool:
        try:
            waiting = [pool.submit(_encode_in_worker, chunk) for chunk in itertools.islice(chunks, 2 * workers)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(_encode_in_worker, chunk) for chunk in itertools.islice(chunks, 1)]
        except concurrent.futures.BrokenExecutor:
            raise UserError("a process that tokenised was killed, perhaps for lack of memory") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(*held):
    global _held
    _held = held
    parent = multiprocessing.parent_process()  # were it killed, this process would wait for work for ever
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_in_worker(chunk):
    return _encode_chunk(chunk, *_held)


def _encode_chunk(chunk, encoder, tokenizer):
    """(tokens; [length of each segment, language, line, file number] for each record that is kept; {language: counts};
    remarks as `_write` takes them)."""
    tokens, rows, counts, remarks = [], [], defaultdict(Counter), []
    for number, path, record in chunk:
        try:
            language, segments, each, odd = encoder.encode(record, tokenizer)
        except UserError as error:
            raise UserError(f"{path}, {place(record.line)}: {error}") from None
        counts[language] += each
        remarks += [(number, what, record.line, example) for what, example in odd]
        if segments:
            tokens += itertools.chain.from_iterable(segments)
            rows.append([*map(len, segments), language, record.line, number])
    return np.array(tokens, np.int32), rows, dict(counts), remarks
