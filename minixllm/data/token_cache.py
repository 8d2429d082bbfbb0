"""Token ids on disk: built once from record files, by several processes, and memory-mapped from then on.

Five million records never sit in memory: they are read one at a time, tokenised in chunks, and appended to a file. A
cache is named by all that its contents depend on (the bytes of the record files, the tokenizer, the prompt template,
the settings), so it is rebuilt exactly when one of these changes.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import threading
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minixllm import languages
from minixllm.data import prompts
from minixllm.data.records import place
from minixllm.errors import UserError
from minixllm.files import locked

FORMAT = 2                  # part of every cache's key: to be raised when what is written changes
CHUNK = 1000                # records a worker tokenises at a time
PARALLEL_FROM = 64 * 2**20  # bytes of records from which starting worker processes pays
ARRAYS = ("segments", "offsets", "languages", "lines", "files")
LEFT_OUT = ("too_long", "empty", "equal")  # why a record is not kept: "equal" are the two answers of a pair


def kept(counts: Counter) -> int:
    """How many records of a language, or of all, were kept."""
    return counts["records"] - sum(counts[reason] for reason in LEFT_OUT)


class TokenCache:
    """What SFTData and PreferenceData share: a directory of memory-mapped arrays, built where there is none.

    tokens: those of all records, end to end; offsets (n + 1,) int64: where each record's begin; segments (n, S) int32:
    how many belong to its prompt and its answers; languages (n,): indices into language_names; lines, files (n,): where
    the record was read; report: {language: a Counter of its records, of those in LEFT_OUT, of those truncated (kept,
    cut short), and of the answers' tokens and characters before any cut}; key: a hash of all this depends on.
    Subclasses add lengths (n,), the tokens a record takes in a batch, data[i], data.document(i), data.count(records).
    Raises UserError for records that cannot be read or encoded, when none is left, and where the cache cannot be kept.
    """

    def __init__(self, paths, tokenizer, cache_dir, read, encode, settings: dict, workers: int | None):
        paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        if tokenizer.eos_id is None:
            raise UserError("the tokenizer has no end-of-sequence token: answers could not be closed")
        wording = [Path(prompts.__file__), prompts.REQUESTS, Path(languages.__file__)]
        inputs = {"format": FORMAT, "kind": encode.__name__, "tokenizer": tokenizer.fingerprint, **settings,
                  "files": [file_digest(path) for path in paths + wording]}
        self.key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
        directory = Path(cache_dir) / self.key
        if not directory.exists():
            with _alone(directory) as alone:  # one process builds, all others on this machine wait here
                for left in directory.parent.glob(f"{self.key}.*.unfinished") if alone else ():  # of a killed builder
                    shutil.rmtree(left, ignore_errors=True)
                if not directory.exists():
                    _build(directory, paths, tokenizer, read,
                           functools.partial(encode, tokenizer=tokenizer, **settings), workers)
        self.paths = paths
        try:
            self._map(directory)
        except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{directory}: a damaged token cache ({error}); remove it to have it built anew") from None

    def _map(self, directory: Path):
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.language_names = meta["languages"]
        self.report = {language: Counter(counts) for language, counts in meta["counts"].items()}
        # plain views of the maps: slicing an np.memmap costs microseconds each time
        self.tokens = np.asarray(np.memmap(directory / "tokens.bin", dtype=meta["dtype"], mode="r"))
        arrays = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
        self.segments, self.offsets, self.languages, self.lines, self.files = map(np.asarray, arrays)
        if len(self.tokens) != self.offsets[-1]:
            raise ValueError(f"{len(self.tokens)} tokens, expected {self.offsets[-1]}")

    def __len__(self) -> int:
        return len(self.segments)

    def read(self, index: int) -> list[np.ndarray]:
        """The segments of a record, as int64 arrays."""
        tokens = self.tokens[self.offsets[index]:self.offsets[index + 1]].astype(np.int64)
        return np.split(tokens, np.cumsum(self.segments[index])[:-1])

    def where(self, index: int) -> str:
        """File and line of a record."""
        return f"{self.paths[self.files[index]]}, {place(self.lines[index])}"

    def summary(self) -> str:
        """A table, one line a language: what was kept, left out and cut, where anything was, and what a character costs
        in tokens.
        """
        shown = [name for name in (*LEFT_OUT, "truncated") if any(counts[name] for counts in self.report.values())]
        lines = [f"{'language':<22}{'kept':>10}" + "".join(f"{name.replace('_', ' '):>11}" for name in shown)
                 + f"{'tokens/character':>18}"]
        for language, counts in sorted(self.report.items()):
            values = "".join(f"{counts[name]:>11,}" for name in shown)
            cost = counts["tokens"] / max(counts["characters"], 1)
            lines.append(f"{language:<22}{kept(counts):>10,}{values}{cost:>18.3f}")
        return "\n".join(lines)


def file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a .json or .jsonl file") from None


@contextlib.contextmanager
def _alone(directory: Path):
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(locked(directory.with_suffix(".lock")))
        except OSError as error:
            raise UserError(f"{directory.parent}: no place for a token cache ({error.strerror})") from None
        yield alone


def _build(directory: Path, paths, tokenizer, read, encode, workers):
    """Tokenise every record into `directory`, which appears whole or not at all.

    Where there are no locks several may build at once, each apart from the others; the first to end is used.
    """
    unfinished = directory.with_name(f"{directory.name}.{socket.gethostname()}-{os.getpid()}.unfinished")
    unfinished.mkdir()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    languages, counts, parts = {}, defaultdict(Counter), []
    size = sum(path.stat().st_size for path in paths)
    try:
        with (tqdm(desc="Tokenising", total=size, unit="B", unit_scale=True, mininterval=0.5) as bar,
              open(unfinished / "tokens.bin", "wb") as file):
            records = ((number, path, record) for number, path in enumerate(paths) for record in read(path, bar.update))
            for tokens, segments, names, lines, files, chunk_counts in _encoded(records, encode, size, workers):
                file.write(tokens.astype(dtype).tobytes())
                ids = [languages.setdefault(name, len(languages)) for name in names]
                parts += [(np.array(segments, np.int32), np.array(ids, np.int32), lines, files)] if segments else []
                for language, each in chunk_counts.items():
                    counts[language] += each
        if not parts:
            total = sum(counts.values(), Counter())
            raise UserError(f"{', '.join(map(str, paths))}: nothing left to learn from: of {total['records']:,} "
                            f"records {total['too_long']:,} are too long, {total['empty']:,} empty, "
                            f"{total['equal']:,} pairs of equals")
        segments, ids, lines, files = (np.concatenate(part) for part in zip(*parts))
        offsets = np.concatenate([[0], np.cumsum(segments.sum(1, dtype=np.int64))])
        for name, array in zip(ARRAYS, (segments, offsets, ids, lines, files), strict=True):
            np.save(unfinished / f"{name}.npy", array)
        meta = {"dtype": dtype.name, "languages": list(languages), "counts": counts}
        (unfinished / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        for path in unfinished.iterdir():  # or a power cut might leave files empty that have their names
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        try:
            os.replace(unfinished, directory)
        except OSError:
            if not directory.exists():
                raise
    except OSError as error:
        raise UserError(f"{directory}: the token cache cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _encoded(records, encode, size: int, workers: int | None):
    """Yield the encoded chunks of (file number, path, record) in order, by worker processes if there is much to do."""
    chunks = iter(lambda: list(itertools.islice(records, CHUNK)), [])
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()    # not on a Mac
        workers = cores if size >= PARALLEL_FROM else 1
    if workers == 1:
        _start_worker(encode)
        yield from map(_encode_chunk, chunks)
        return
    # not forked: this process may have threads (PyTorch's, a process group's) whose locks a fork would copy as held
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (encode,)) as pool:
        try:
            waiting = [pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 2 * workers)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(_encode_chunk, chunk) for chunk in itertools.islice(chunks, 1)]
        except concurrent.futures.BrokenExecutor:
            raise UserError("a process that tokenised was killed, perhaps for lack of memory") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(encode):
    global _encode
    _encode = encode
    if parent := multiprocessing.parent_process():  # else, were it killed, this process would wait for work for ever
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_chunk(chunk):
    """Of the k records kept: tokens, segments (k lists), languages, lines (k,), files (k,); and {language: counts}."""
    tokens, segments, names, lines, files, counts = [], [], [], [], [], defaultdict(Counter)
    for number, path, record in chunk:
        try:
            language, encoded, each = _encode(record)
        except UserError as error:
            raise UserError(f"{path}, {place(record.line)}: {error}") from None
        counts[language] += each
        if encoded is not None:
            for segment in encoded:
                tokens += segment
            segments.append([len(segment) for segment in encoded])
            names.append(language)
            lines.append(record.line)
            files.append(number)
    return (np.array(tokens, np.int32), segments, names, np.array(lines, np.int64), np.array(files, np.int32),
            dict(counts))
