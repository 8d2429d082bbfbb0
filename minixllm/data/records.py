"""The records that data files hold, read one at a time and checked, with file and line in every complaint.

A file is either JSON lines (one object a line) or one JSON array of objects (Alpaca's own format); of either, only a
record at a time is in memory. Which of the two is seen from its first character, whatever the suffix.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minixllm.errors import UserError, check_text

LONGEST_LINE = 16 * 2**20     # bytes; a longer line is a broken file, not an instruction
CHUNK = 64 * 2**10            # bytes of an array read at once, more within a record that is longer
WHITESPACE = " \t\n\r"        # JSON's
# What records are often kept in but not read from, by a file's first bytes.
OTHER_FORMATS = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\x1f\x8b": "a gzip archive",
                 b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "a Zstandard archive",
                 b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16"}
INSTRUCTION_FIELDS = "instruction, output and optionally input, language"
PREFERENCE_FIELDS = ("instruction, chosen, rejected and optionally input, language, response_language; or prompt, "
                     "chosen, rejected")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One supervised example, in Alpaca's fields; `extra` keeps whatever other fields the record had."""

    instruction: str
    input: str
    output: str
    language: str | None = None
    extra: dict = field(default_factory=dict)
    line: int = 0                 # where it stands in its file (see `place`)


def read_instructions(path, progress: Callable[[int], None] | None = None) -> Iterator[Instruction]:
    """Yield the records of an Alpaca-format file: `instruction`, `output`, and optionally `input` and `language`.

    `progress` is called with the number of bytes read since its last call. Raises UserError naming file and line.
    """
    for line, entry in read_objects(path, progress):
        take = _Fields(path, line, entry, INSTRUCTION_FIELDS)
        yield Instruction(take("instruction"), take("input", optional=True) or "", take("output"),
                          take("language", optional=True), take.left, line)


@dataclass(frozen=True, slots=True)
class Preference:
    """One instruction with a preferred and a rejected answer.

    language is the instruction's, response_language that of both answers. prompt: the whole prompt as it stands, for
    records in TRL's spelling, which have no instruction.
    """

    instruction: str
    input: str
    chosen: str
    rejected: str
    language: str | None = None
    response_language: str | None = None
    prompt: str | None = None
    extra: dict = field(default_factory=dict)
    line: int = 0


def read_preferences(path, progress: Callable[[int], None] | None = None) -> Iterator[Preference]:
    """Yield the pairs of a file: `instruction`, `chosen`, `rejected`, and optionally `input`, `language` and
    `response_language`.

    Also read are the spelling of the paper's released scripts (`prefered_output`, `rejected_output`) and TRL's standard
    one (`prompt`, `chosen`, `rejected`, all text). Raises UserError naming file and line.
    """
    for line, entry in read_objects(path, progress):
        take = _Fields(path, line, entry, PREFERENCE_FIELDS)
        prompt = None if "instruction" in entry else take("prompt", optional=True)
        yield Preference(take("instruction") if prompt is None else "", take("input", optional=True) or "",
                         take("chosen", "prefered_output"), take("rejected", "rejected_output"),
                         take("language", optional=True), take("response_language", optional=True),
                         prompt, take.left, line)


class _Fields:
    """Takes text fields out of one JSON object, and says what is wrong with them."""

    def __init__(self, path, line: int, entry: dict, expected: str):
        self.where, self.entry, self.expected, self.left = f"{path}, {place(line)}", entry, expected, dict(entry)

    def __call__(self, *spellings: str, optional: bool = False) -> str | None:
        """The field under the first of its spellings that is there; None if optional and absent or null."""
        name = next((name for name in spellings if name in self.left), None)
        value = self.left.pop(name, None)
        if optional and value is None:
            return None
        if name is None:
            found = _shortened(", ".join(sorted(self.entry)), 80) or "none"
            raise UserError(f"{self.where}: no field {spellings[0]!r}: found {found}; expected {self.expected}")
        if not isinstance(value, str):
            raise UserError(f"{self.where}: field {name!r} holds {_kind(value)}, expected text")
        check_text(value, f"{self.where}: field {name!r}")
        return value


def record_files(paths) -> list[Path]:
    """The files named, and the .json and .jsonl files of the directories named."""
    files = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.json")) + sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        # its own JSON files would be read as records; a cache of Arrow files below good ones matters not
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")) and (
                [*path.glob("*.arrow"), *path.glob("*/*.arrow")]):
            raise UserError(f"{path}: found an Arrow data set, as `datasets` saves it, expected JSON or JSONL; its "
                            "to_json(file) writes that")
        if not found:
            raise UserError(f"{path}: a directory without .json or .jsonl files, expected files of records in it")
        files += found
    return files


def read_objects(path, progress: Callable[[int], None] | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (its line, as `place` reads it, object) for every object of a JSON-lines file or a JSON array; an empty
    file is an error."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a .json or .jsonl file") from None
    if kind := next((kind for magic, kind in OTHER_FORMATS.items() if start.startswith(magic)), None):
        raise UserError(f"{path}: found {kind}, expected JSON or JSONL in UTF-8")
    start = start.removeprefix(codecs.BOM_UTF8).lstrip(WHITESPACE.encode())
    empty = True
    for line, entry in (_array if start.startswith(b"[") else _lines)(path, progress or (lambda size: None)):
        if not isinstance(entry, dict):
            raise UserError(f"{path}, {place(line)}: found {_kind(entry)}, expected an object {{...}}")
        empty = False
        yield line, entry
    if empty:
        raise UserError(f"{path}: holds no records, expected one or more")


def place(line: int) -> str:
    """"line 5"; of an array whose records share its first line "record 5", which is kept as -5."""
    return f"line {line}" if line > 0 else f"record {-line}"


def _lines(path: Path, progress) -> Iterator[tuple[int, object]]:
    with open(path, "rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes, expected a record a line")
            progress(len(raw))
            raw = raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
            if raw:
                try:
                    entry = json.loads(raw.decode())
                except (ValueError, RecursionError) as error:
                    raise _broken(path, number, error, raw) from None
                yield number, entry


def _array(path: Path, progress) -> Iterator[tuple[int, object]]:
    decode, parse = codecs.getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder().raw_decode
    text, line = "", 1                               # what is read but not yet taken, and the line it begins in

    def read() -> bool:
        nonlocal text
        raw = file.read(max(CHUNK, len(text)))       # doubled, for a long record is parsed anew each time
        progress(len(raw))
        try:
            text += decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise _broken(path, line + text.count("\n"), error, raw) from None
        return bool(raw)

    def take(count: int) -> str:
        """Take so many characters and the white space behind them; the next one, or nothing at the end."""
        nonlocal text, line
        while True:
            rest = text[count:].lstrip(WHITESPACE)
            line += text.count("\n", 0, len(text) - len(rest))
            text, count = rest, 0
            if text or not read():
                return text[:1]

    with open(path, "rb") as file:
        take(0)
        more, count = take(1) != "]", 0              # past the opening bracket
        while more:
            try:
                entry, end = parse(text)
            except (ValueError, RecursionError) as error:
                if len(text) < LONGEST_LINE and read():
                    continue
                raise _broken(path, line, error, text[:99].encode()) from None
            count += 1
            yield line if line > 1 else -count, entry
            more = take(end) == "," and take(1)
        if text[:1] != "]" or take(1):
            raise UserError(f"{path}, line {line}: the array of records ends in {_excerpt(text[:99])}, expected ',' or "
                            "']' and nothing after")


def _broken(path: Path, line: int, error: Exception, raw: bytes) -> UserError:
    """What to say of what begins in that line, with `raw`, and cannot be decoded or parsed."""
    reason = "a number too long"
    if isinstance(error, UnicodeDecodeError):
        line += error.object.count(b"\n", 0, error.start)
        return UserError(f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})")
    if isinstance(error, json.JSONDecodeError):
        line, reason = line + error.lineno - 1, f"{error.msg}, column {error.colno}"
    elif isinstance(error, RecursionError):
        reason = "nested too deeply"
    return UserError(f"{path}, line {line}: not JSON ({reason}), in {_excerpt(raw.decode(errors='replace'))}; expected "
                     "an object {...} in each line, or one array of them")


def _excerpt(text: str) -> str:
    return repr(_shortened(text.strip(), 60)) if text.strip() else "nothing"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
