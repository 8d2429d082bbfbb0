"""The paper's five benchmarks: how their published files are read, and what a model is asked.

| benchmark | files in its directory | answer | limit |
|---|---|---|---|
| pawsx | `{lang}/test_2k.tsv`: id, sentence1, sentence2, label (1 = paraphrase) | yes or no | all |
| xcopa | `test.{lang}.jsonl`: premise, choice1, choice2, question, label | A or B | all |
| translation | aligned `{code}.devtest` (FLORES-101, -200), `{code}.txt`, `newstest2019-ref.{code}.txt` | text | 200 |
| xlsum | `{language}_test.jsonl` (v2.0): id, url, title, summary, text | text | 250 |
| self-instruct | `{lang}.jsonl`: instruction, instances [{input, output}]; `user_oriented_instructions` | text | all |

Instructions come from instructions.toml (the paper's wording) or from a file of the same form (templates.py). By
default the first rows of each language or direction are read, up to the limit. benchmark_files.py tells what a directory
holds.
"""

import collections
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minixllm import languages
from minixllm.data.prompts import alpaca
from minixllm.data.records import place, read_objects
from minixllm.errors import UserError, check_text, expect, found
from minixllm.evaluation.benchmark_files import TITLES, detect, files
from minixllm.evaluation.templates import FIELDS, read_templates
from minixllm.languages import LANGUAGES

LIMITS = {"translation": 200, "xlsum": 250}


@dataclass(frozen=True)
class Item:
    """One question. `body` names the field whose end may be cut where a prompt is too long."""

    benchmark: str
    column: str                   # of the paper's table: "FLORES(f)"
    group: str                    # what is scored together: a language, or a direction "eng-fra"
    language: str                 # whose tier the group counts to
    target: str                   # the language an answer must be in
    id: str                       # the file's own, or the place in it
    instruction: str              # with the fields' names in braces
    input: str
    fields: dict
    reference: str
    choices: tuple[str, ...] = ()   # whose likelihoods are compared; the reference is one of them
    words: tuple = ()             # for each choice, what is understood as it in a free answer
    body: str = ""

    def prompt(self, kept: int | None = None) -> str:
        """The Alpaca prompt, with only the first `kept` characters of the body where that is given."""
        fields = {**self.fields, self.body: self.fields[self.body][:kept]} if self.body else self.fields
        return alpaca(self.instruction.format(**fields), self.input.format(**fields))


@dataclass(frozen=True)
class Wanted:
    """What to read: `languages` and `directions` are empty for all; `limit` None for the paper's."""

    mode: str = "generating"      # or "understanding": the instruction in the input's language
    languages: tuple[str, ...] = ()
    directions: tuple[str, ...] = ("from-english", "to-english")
    limit: int | None = None
    seed: int = 0                 # of the draw of non-English pairs
    templates: Path | None = None


def read(path, wanted: Wanted) -> tuple[list[Item], list[str]]:
    """The items of one benchmark's directory, none perhaps, and notes: what was skipped, missing or not asked.

    Raises UserError naming file and line for what is malformed, and for a directory that is none of the five.
    """
    path, notes = Path(path), []
    name = detect(path)
    reader = _Reader(name, path, wanted, read_templates(wanted.templates), notes)
    if name == "self-instruct":
        reader.note(f"{wanted.mode} mode, instructions as its files have them")
    items, seen, left_out = [], set(), collections.Counter()
    for item in _by_file(reader) if name in ROWS else _translation(reader):
        row = item.column, item.group, item.id
        if "\0" in item.reference + "".join(item.fields.values()):
            left_out["the character NUL"] += 1
        elif row in seen:
            left_out["the id of an earlier row"] += 1
        else:
            items.append(item)
        seen.add(row)
    for what, count in sorted(left_out.items()):
        reader.note(f"{path}: {count} rows left out, they hold {what}")
    if not items:
        reader.note(f"nothing of {path} is left to evaluate")
    for source, asked_in in reader.used.items():
        reader.note(f"{wanted.mode} mode, instructions in {', '.join(asked_in)}: {source}")
    return items, notes


@dataclass
class _Reader:
    """What the five readers share: which languages are wanted, which instruction each gets, and the notes."""

    benchmark: str
    path: Path
    wanted: Wanted
    templates: dict
    notes: list[str]
    used: dict[str, dict] = field(default_factory=dict)   # {where instructions are from: {the languages they are in}}

    @property
    def limit(self) -> int | None:
        return self.wanted.limit if self.wanted.limit is not None else LIMITS.get(self.benchmark)

    @property
    def asked(self) -> list[str]:
        return [languages.find(text).code for text in self.wanted.languages]

    def by_language(self) -> dict[str, Path]:
        """{language code: file}, the last of each language. Notes the files that are left out and the languages asked
        for that have none."""
        codes = files(self.benchmark, self.path)
        last = {code: path for path, code in codes.items() if code}
        left_out = {f"{path.relative_to(self.path)}": code for path, code in codes.items() if last.get(code) != path}
        unknown = [name for name, code in left_out.items() if not code]
        second = [f"{name} is a second file of {languages.find(code).name} ({code})"
                  for name, code in left_out.items() if code]
        for what, some in ((" of no known language", unknown), ("", second)):
            if some:
                self.note(f"{len(some)} files{what} left out: {', '.join(some[:5])}" + ", ..." * (len(some) > 5))
        if missing := [code for code in self.asked if code not in last]:
            self.note(f"no file for {', '.join(missing)} in {self.path}")
        return last

    def note_english(self, codes) -> None:
        """Note which of these languages have no instruction in the language itself, where that is asked for."""
        without = [code for code in codes if (self.benchmark, code) not in self.templates]
        if without and self.wanted.mode == "understanding" and self.benchmark in FIELDS:
            self.note(f"no instruction in the language itself for {len(without)} of {len(codes)}, asked in English: "
                      f"{', '.join(without)}")

    def template(self, code: str) -> tuple[dict, str]:
        """The instruction for items in this language, and the language it is written in."""
        if self.benchmark == "self-instruct":
            return {"instruction": "{instruction}", "input": "{input}"}, code
        in_it = self.wanted.mode == "understanding" and (self.benchmark, code) in self.templates
        asked_in = code if in_it else "eng"
        template = self.templates[self.benchmark, asked_in]
        shipped = template == read_templates().get((self.benchmark, asked_in))
        self.used.setdefault("as shipped" if shipped else str(self.wanted.templates), {})[asked_in] = None
        return template, asked_in

    def note(self, text: str) -> None:
        self.notes.append(f"{TITLES[self.benchmark]}: {text}")


def _name(code: str, asked_in: str) -> str:
    """A language's name for an instruction: in English, or where that is written in another language its own."""
    language = languages.find(code)
    return language.name if asked_in == "eng" else language.own_name


def _by_file(reader: _Reader) -> Iterator[Item]:
    """The items of the four benchmarks that have a file for each language: one for each row that is not skipped."""
    rows, item_of, skipped_for = ROWS[reader.benchmark]
    chosen = {code: file for code, file in sorted(reader.by_language().items())
              if not reader.asked or code in reader.asked}
    reader.note_english(chosen)
    for code, file in chosen.items():
        template, asked_in = reader.template(code)
        count = skipped = 0
        for place_in_file, (line, entry) in enumerate(rows(file)):
            if count == reader.limit:
                break
            where = f"{file}, {place(line)}"
            if (row := item_of(reader, where, entry, template, code)) is None:
                skipped += 1
                continue
            count += 1
            fields, reference, more = row
            id = entry.get("idx" if reader.benchmark == "xcopa" else "id", place_in_file)
            if isinstance(id, str):
                check_text(id, f"{where}: id")
            yield Item(reader.benchmark, TITLES[reader.benchmark], code, code, code, str(id), template["instruction"],
                       template["input"], fields | {"language": _name(code, asked_in)}, reference, **more)
        if skipped:
            reader.note(f"{file}: {skipped} rows skipped, {skipped_for}")


def _tsv(file: Path):
    """(line number, {id, sentence1, ...}) of each row of PAWS-X's tables, blank lines and the header aside."""
    names, empty = ("id", "sentence1", "sentence2", "label"), True
    for number, line in enumerate(_lines(file), 1):
        if not line.strip() or number == 1 and line.lower().startswith("id\t"):
            continue
        row, empty = line.split("\t"), False
        if len(row) != len(names):
            raise UserError(f"{file}, line {number}: {len(row)} columns, expected 4: {', '.join(names)}")
        yield number, dict(zip(names, row))
    if empty:
        raise UserError(f"{file}: holds no rows, expected {', '.join(names)} in each")


def _pawsx(reader: _Reader, where: str, entry: dict, template: dict, code: str):
    if {entry["sentence1"].strip(), entry["sentence2"].strip()} & {"", "NS"}:   # both are found in the published files
        return None
    label = expect(entry["label"], str, f"{where}: label", choices=("0", "1"))
    own, english = reader.templates.get(("pawsx", code), template), reader.templates["pawsx", "eng"]
    words = tuple(tuple(dict.fromkeys([*template[k], *own[k], *english[k]])) for k in ("yes", "no"))
    choices = template["yes"][0], template["no"][0]
    return ({key: entry[key] for key in ("sentence1", "sentence2")}, choices[label == "0"],
            {"choices": choices, "words": words})


def _xcopa(reader: _Reader, where: str, entry: dict, template: dict, code: str):
    texts = {key: _text(where, entry, key) for key in ("premise", "choice1", "choice2", "question")}
    expect(texts["question"], str, f"{where}: question", choices=("cause", "effect"))
    label = expect(entry.get("label"), int, f"{where}: label", choices=(0, 1))
    choices = texts["choice1"], texts["choice2"]
    return texts | {"question": template[texts["question"]]}, choices[label], {"choices": choices}


def _xlsum(reader: _Reader, where: str, entry: dict, template: dict, code: str):
    article, summary = (_text(where, entry, key, empty=True) for key in ("text", "summary"))
    return ({"article": article}, summary, {"body": "article"}) if article.strip() and summary.strip() else None


def _self_instruct(reader: _Reader, where: str, entry: dict, template: dict, code: str):
    """Instruction and input as the file has them, in its language, in both modes."""
    instances = expect(entry.get("instances"), list, f"{where}: instances")
    first = expect(instances[0] if instances else None, dict, f"{where}: instances: the first")
    fields = {"instruction": _text(where, entry, "instruction"),
              "input": _text(where, first, "input", empty=True)}
    return fields, _text(where, first, "output"), {"body": "input"}


def _translation(reader: _Reader) -> Iterator[Item]:
    """The items of each direction: the lines of two aligned texts in which neither is empty."""
    texts = reader.by_language()
    codes = [code for code in texts if not reader.asked or code in [*reader.asked, "eng"]]
    lines = functools.cache(lambda code: _lines(texts[code]))
    title = _translation_set(texts.values())
    directions = translation_directions(codes, reader.wanted.directions, reader.wanted.seed, reader.note)
    reader.note_english(dict.fromkeys(source for source, _, _ in directions))
    for source, target, column in directions:
        if len(lines(source)) != len(lines(target)):
            raise UserError(f"{texts[source]} has {len(lines(source))} lines, {texts[target]} {len(lines(target))}: "
                            "expected texts aligned line by line")
        template, asked_in = reader.template(source)
        pairs = [(number, *pair) for number, pair in enumerate(zip(lines(source), lines(target)), 1)
                 if all(map(str.strip, pair))][:reader.limit]
        if empty := (pairs[-1][0] if len(pairs) == reader.limit else len(lines(source))) - len(pairs):
            reader.note(f"{source}-{target}: {empty} lines skipped, a sentence is empty")
        names = {"source_language": _name(source, asked_in), "target_language": _name(target, asked_in),
                 "language": _name(target, asked_in)}
        for number, text, reference in pairs:
            yield Item("translation", f"{title}({column})", f"{source}-{target}", source if target == "eng" else target,
                       target, str(number), template["instruction"], template["input"], {"source": text, **names},
                       reference, body="source")


def translation_directions(codes: list[str], asked, seed: int, note=print) -> list[tuple[str, str, str]]:
    """(source, target, column) of each direction asked: f is from English, t to English, as in the paper's tables.

    asked: "from-english", "to-english", "deu-fra", or a pair of tiers such as "high-low", of which 15 pairs without
    English are drawn by the seed, as many as the paper has.
    """
    others, directions = [code for code in codes if code != "eng"], []
    for text in asked:
        parts = text.split("-")
        if text in ("from-english", "to-english"):
            if "eng" not in codes:
                note(f"direction {text}: no English file")
                continue
            directions += [("eng", code, "f") if text == "from-english" else (code, "eng", "t") for code in others]
        elif len(parts) == 2 and set(parts) <= {"high", "mid", "low"}:
            pairs = [(a, b, text) for a in LANGUAGES for b in LANGUAGES
                     if a != b and [LANGUAGES[a].tier, LANGUAGES[b].tier] == parts]
            random.Random(f"{seed} {text}").shuffle(pairs)  # of the 100: files of others change no draw
            directions += sorted([pair for pair in pairs if pair[0] in others and pair[1] in others][:15])
        elif len(parts) == 2:
            source, target = (languages.find(part).code for part in parts)
            if source in codes and target in codes and source != target:
                directions.append((source, target, "f" if source == "eng" else "t" if target == "eng" else "pairs"))
            else:
                note(f"direction {text}: no files for it")
        else:
            raise UserError(f"directions: found {text!r}, expected from-english, to-english, two tiers such as "
                            "high-low, or two languages such as deu-fra")
    return list(dict.fromkeys(directions))


# {benchmark: (rows of a file, row -> (fields, reference, more of its item), why rows are skipped)}
ROWS = {"pawsx": (_tsv, _pawsx, "a sentence is empty or the placeholder NS"), "xcopa": (read_objects, _xcopa, ""),
        "xlsum": (read_objects, _xlsum, "the article or its summary is empty"),
        "self-instruct": (read_objects, _self_instruct, "")}


def _translation_set(texts) -> str:
    """What the tables call aligned texts: the set that publishes files of such names."""
    if all(file.suffix in (".dev", ".devtest") for file in texts):
        return "FLORES"
    return "NTREX" if all(file.name.startswith("newstest2019-") for file in texts) else TITLES["translation"]


def _lines(file: Path) -> list[str]:
    """Lines by line feeds alone: str.splitlines would also cut at U+2028 and others that stand inside sentences."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _text(where: str, entry: dict, key: str, empty: bool = False) -> str:
    value = expect(entry.get(key), str, f"{where}: {key}")
    if not (value.strip() or empty):
        raise UserError(f"{where}: {key}: found {found(value)}, expected text")
    return value
