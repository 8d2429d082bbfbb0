"""Files that appear whole or not at all, JSON in them, what kind of file one is, and locks."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np

from minixllm.errors import UserError, check_text

DEEPEST = 100  # levels of nested JSON
# Files that are often given in place of records or weights, by their first bytes.
KINDS = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\x1f\x8b": "a gzip archive",
         b"PK\x03\x04": "a zip archive, perhaps a PyTorch pickle", b"\x28\xb5\x2f\xfd": "a Zstandard archive",
         b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16", b"GGUF": "a GGUF file", b"\x80": "a pickle",
         b"version https://git-lfs": "a Git LFS pointer whose content was not downloaded"}


@contextlib.contextmanager
def atomic_write(path, mode: str = "w"):
    """Open a temporary file beside `path`; it takes that name when the block ends well, and is removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = _temporary_file(path)
    try:
        with os.fdopen(descriptor, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.umask(umask := os.umask(0))  # it can only be read by setting it
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)  # a full disk does not say where
        raise


def _temporary_file(path: Path) -> tuple[int, str]:
    """A new locked file beside `path`: (its descriptor, its name). Those that killed processes have left are removed.

    The lock tells them apart: the kernel drops it when a process dies.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError while another process writes the file
            os.unlink(left)
    while True:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is removed either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # no other process has removed it before it was locked
            return descriptor, temporary
        os.close(descriptor)


def save_array(file, array: np.ndarray) -> None:
    """np.save, that says of a full disk what it is: numpy says only how many bytes it could write."""
    try:
        np.save(file, array)
    except OSError as error:
        raise error if error.errno else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


@contextlib.contextmanager
def replacing(directory):
    """A new directory for files. When the block ends well it replaces `directory`, and is removed otherwise."""
    directory = Path(directory)
    partial, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("partial", "old"))

    def clean_up():
        if old.exists() and not directory.exists():  # stopped between the two renames below
            os.rename(old, directory)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)

    clean_up()  # an earlier process may have been killed
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.iterdir():  # or a power cut might leave files empty that have their names
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if directory.exists():
            os.rename(directory, old)
        os.rename(partial, directory)
    finally:
        clean_up()


def read_json(path) -> dict:
    """The object in a JSON file, {} where there is no file; UserError where it is damaged or no object.

    What is read may be written when a training run ends. So what `write_json` could not write is refused here.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode(json.detect_encoding(content))  # json.loads alone would let half a surrogate pair pass
        value = json.loads(text)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON, perhaps cut short: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]
    if level:
        raise UserError(f"{path}: found objects and lists nested more than {DEEPEST} deep, expected fewer levels")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # a half of a pair, or a whole pair
        check_text(json.dumps(value, ensure_ascii=False), str(path))
    return value


def what_kind(path) -> str | None:
    """Which of KINDS a file is; None for any other."""
    with open(path, "rb") as file:
        start = file.read(64)
    return next((kind for magic, kind in KINDS.items() if start.startswith(magic)), None)


def digest(path) -> str:
    """The sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value):
    """The value with None, JSON's null, for every number in it that is not finite: JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value) -> None:
    with atomic_write(path) as file:
        json.dump(finite(value), file, ensure_ascii=False, indent=2)
        file.write("\n")


def write_json_lines(path, records) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records)


@contextlib.contextmanager
def locked(path, busy: str | None = None):
    """Hold the lock of this name. The kernel drops it when its holder dies, so nobody waits for a dead process.

    busy: what a UserError says if another process holds the lock; without it this process waits. Some network file
    systems have no locks: then a process that would have waited gets the OSError, and any other a warning.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{busy} ({file.read(200) or 'unknown'} holds {path})") from None
        except OSError as error:
            if not busy:
                raise
            print(f"{path}: cannot be locked ({error.strerror}): see to it that nothing else writes there",
                  file=sys.stderr)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
