"""The records of data files, read one at a time and checked, with file and line in every complaint.

A file is either JSON lines (one object a line, of which one is in memory at a time) or one JSON array of objects, as
Alpaca's own file is (read whole). Its first character tells which of the two it is, whatever the suffix says.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minixllm.errors import UserError, expect, found
from minixllm.files import what_kind

LONGEST_LINE = 16 * 2**20  # bytes; a longer line is a broken file, not an instruction
ARCHIVES = (".gz", ".zst", ".xz", ".bz2", ".zip")
INSTRUCTION_FIELDS = "instruction, output and optionally input, language; or messages"
PREFERENCE_FIELDS = ("instruction, chosen, rejected and optionally input, language, response_language; or prompt, "
                     "chosen, rejected")
CHATS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for who speaks


@dataclass(frozen=True, slots=True)
class Instruction:
    """One supervised example, in Alpaca's fields; `extra` has every field of the record as the file has it."""

    instruction: str
    input: str
    output: str
    language: str | None = None
    extra: dict = field(default_factory=dict)
    line: int = 0                 # where it stands in its file (see `place`)


def read_instructions(path, progress: Callable[[int], None] | None = None,
                      leave_out: Callable[[int], None] | None = None) -> Iterator[Instruction]:
    """Yield the records of an Alpaca-format file: `instruction`, `output`, and optionally `input` and `language`.

    Chats are read, too: `messages` (turns of role and content) or ShareGPT's `conversations` (from and value) of one
    exchange. The system's text, where there is one, stands before the user's in the instruction. Of a chat that is not
    one exchange leave_out is told the line; without leave_out it is an error. `progress` is called with the number of
    bytes read since its last call. Raises UserError naming file and line.
    """
    for line, entry in read_objects(path, progress):
        where = f"{path}, {place(line)}"
        chat = None if "instruction" in entry else next(filter(entry.__contains__, CHATS), None)
        if chat:
            roles, texts = _turns(entry.pop(chat), f"{where}: {chat}")
            if roles[-2:] == ["user", "assistant"] and roles[:-2] in ([], ["system"]):
                entry |= {"instruction": "\n\n".join(texts[:-1]), "output": texts[-1]}
            elif leave_out:
                leave_out(line)
                continue
            else:
                raise UserError(f"{where}: {chat}: found turns of {', '.join(roles)[:80] or 'nobody'}, expected one of "
                                "the user and one of the assistant")
        instruction, output = (_text(entry, where, INSTRUCTION_FIELDS, name) for name in ("instruction", "output"))
        input, language = (_optional(entry, where, name) for name in ("input", "language"))
        yield Instruction(instruction, input or "", output, language, entry, line)


def _turns(turns, where: str) -> tuple[list[str], list[str]]:
    """(who speaks, what is said) in each turn of a chat."""
    roles, texts = [], []
    for number, turn in enumerate(expect(turns, list, where), 1):
        turn = expect(turn, dict, f"{where}: turn {number}")
        role = expect(turn.get("role", turn.get("from")), str, f"{where}: turn {number}: role")
        roles.append(ROLES.get(role, role))
        texts.append(expect(turn.get("content", turn.get("value")), str, f"{where}: turn {number}: content"))
    return roles, texts


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
    """Yield the pairs of a file. Raises UserError naming file and line.

    They have `instruction`, `chosen`, `rejected` and optionally `input`, `language`, `response_language`; or are spelt
    as in the paper's released scripts (`prefered_output`, `rejected_output`) or TRL's (`prompt`, `chosen`, `rejected`).
    """
    for line, entry in read_objects(path, progress):
        where, prompt, instruction = f"{path}, {place(line)}", None, ""
        if "instruction" in entry or (prompt := _optional(entry, where, "prompt")) is None:
            instruction = _text(entry, where, PREFERENCE_FIELDS, "instruction")
        chosen = _text(entry, where, PREFERENCE_FIELDS, "chosen", "prefered_output")
        rejected = _text(entry, where, PREFERENCE_FIELDS, "rejected", "rejected_output")
        input, *spoken = (_optional(entry, where, name) for name in ("input", "language", "response_language"))
        yield Preference(instruction, input or "", chosen, rejected, *spoken, prompt, entry, line)


def _text(entry: dict, where: str, expected: str, *names: str) -> str:
    """The text of the field that has one of these names. expected: what errors say an entry should hold."""
    for name in names:
        if name in entry:
            return expect(entry[name], str, f"{where}: {name}")
    there = ", ".join(sorted(entry)) or "none"
    raise UserError(f"{where}: no field {names[0]!r}: found {there[:80]}{'...' * (len(there) > 80)}; "
                    f"expected {expected}")


def _optional(entry: dict, where: str, name: str) -> str | None:
    """The text of a field that may be absent or null."""
    return None if entry.get(name) is None else expect(entry[name], str, f"{where}: {name}")


def record_files(paths) -> list[Path]:
    """The files named, and the .json and .jsonl files of the directories named; hidden ones are passed over.

    Raises UserError for what is no file, a directory without such files, and archives in one, which are not read.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(_check_file(path))
            continue
        inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        records = [file for suffix in (".json", ".jsonl") for file in inside if file.suffix.lower() == suffix]
        # A data set saved by `datasets` has JSON files of its own, which hold no records.
        if {"state.json", "dataset_dict.json"} & {file.name for file in inside} and any(path.rglob("*.arrow")):
            raise UserError(f"{path}: found an Arrow data set, as `datasets` saves it, expected JSON or JSONL; its "
                            "to_json(file) writes that")
        packed = [file.name for file in inside if file.suffix in ARCHIVES and file.with_suffix("") not in records]
        if packed:
            raise UserError(f"{path}: found {', '.join(packed[:3])}{', ...' * (len(packed) > 3)}, which is not read: "
                            "expected it to be unpacked, or in another directory")
        if not records:
            raise UserError(f"{path}: a directory without .json or .jsonl files, expected files of records in it")
        files += records
    return files


def _check_file(path: Path) -> Path:
    """The path, if it is a file that can be read more than once; UserError otherwise."""
    if path.is_file():
        return path
    reason, hint = "no such file", ""
    if path.is_dir():
        reason = "it is a directory"
    elif path.exists():
        reason, hint = "it is a pipe or a device, which can be read only once", "; write its content to a file first"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and path.suffix not in (".json", ".jsonl"):
        hint = (f"; if it is a data set on the Hugging Face Hub, download it first: hf download --repo-type dataset "
                f"{path} --local-dir {path.name}")
    raise UserError(f"{path}: cannot be read ({reason}); expected a .json or .jsonl file{hint}")


def read_objects(path, progress: Callable[[int], None] | None = None) -> Iterator[tuple[int, dict]]:
    """Yield (where it stands, as `place` reads it; object) for every object of a JSON-lines file or a JSON array.

    Raises UserError for what is neither, and for a file without records.
    """
    path, line = _check_file(Path(path)), 0
    if kind := what_kind(path):
        raise UserError(f"{path}: found {kind}, expected JSON or JSONL in UTF-8")
    with open(path, "rb") as file:
        is_array = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    for line, entry in (_array if is_array else _lines)(path, progress or (lambda size: None)):
        yield line, expect(entry, dict, f"{path}, {place(line)}")
    if not line:
        raise UserError(f"{path}: holds no records, expected one or more")


def place(line: int) -> str:
    """"line 5"; of the fifth record of an array, which is kept as -5, "record 5"."""
    return f"line {line}" if line > 0 else f"record {-line}"


def _lines(path: Path, progress) -> Iterator[tuple[int, object]]:
    with open(path, "rb") as file:
        lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
        for number, raw in enumerate(lines, 1):
            if len(raw) > LONGEST_LINE:
                raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes, expected a record a line")
            progress(len(raw))
            if raw := raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                yield number, _parse(raw, path, number)


def _array(path: Path, progress) -> Iterator[tuple[int, object]]:
    raw = path.read_bytes()
    size, entries = len(raw), _parse(raw.removeprefix(codecs.BOM_UTF8), path, 1)
    del raw
    for number, entry in enumerate(entries, 1):
        progress(size * number // len(entries) - size * (number - 1) // len(entries))
        yield -number, entry


def _parse(raw: bytes, path: Path, line: int):
    """The JSON value in `raw`, which begins in that line. Raises UserError."""
    reason, excerpt = "nested too deeply, or a number too long", raw[:60].decode(errors="replace")
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        line, reason = line + error.lineno - 1, f"{error.msg}, column {error.colno}"
        excerpt = error.doc[max(0, error.pos - 30):error.pos + 30].strip()
        if error.doc[error.pos:error.pos + 1] == "\ufeff":
            reason = "a byte-order mark, U+FEFF, inside the file, as files joined by cat have it: remove it"
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path}, line {line}: not JSON ({reason}), in {found(excerpt) if excerpt else 'nothing'}; "
                    "expected an object {...} in each line, or one array of them")
