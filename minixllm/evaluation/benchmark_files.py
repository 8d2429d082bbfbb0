"""Where the five benchmarks keep their files, as published: which benchmark a directory holds, and whose file is whose.

A file's language stands in its name, or its folder's, spelt in each benchmark's own way.
"""

import collections
import contextlib
import re
from pathlib import Path

from minixllm import languages
from minixllm.data.records import read_objects
from minixllm.errors import UserError

TITLES = {"pawsx": "PAWS-X", "xcopa": "XCOPA", "translation": "Translation", "xlsum": "XL-Sum",
          "self-instruct": "Self-Inst*"}


def _name_of_text(file: Path) -> str:
    """fra.devtest, newstest2019-ref.fra.txt, fra.txt, fra -> fra; "" for what names no language, for a text in another
    script (arb_Latn is Arabic in Latin letters), for a pair of languages (en-de), and for what is no text, such as
    records, fra.devtest.gz or an editor's fra.devtest~."""
    name = re.sub(r"^newstest\d+-(src|ref)\.", "", file.name).split(".")[0]
    known = languages.lookup(name)
    if file.suffix not in (".dev", ".devtest", ".txt", "") or not known:
        return ""
    # a tag in small letters is a second language, in capitals a region
    return "" if any(len(word) == 4 or word in name and languages.lookup(word) for word in known[1]) else name


# {benchmark: (patterns of its files in a directory, file -> what it calls its language)}
LAYOUTS = {
    "pawsx": (["*/test_2k.tsv"], lambda file: file.parent.name),
    "xcopa": (["test.*.jsonl", "*/test.*.jsonl", "data/*/test.*.jsonl"], lambda file: file.name.split(".")[1]),
    "translation": (["*"], _name_of_text),
    "xlsum": (["*_test.jsonl"], lambda file: file.name.removesuffix("_test.jsonl")),
    "self-instruct": (["*.jsonl"], lambda file: {"user_oriented_instructions": "eng"}.get(file.stem, file.stem))}


def files(benchmark: str, folder: Path) -> dict[Path, str | None]:
    """What may be a benchmark's files in a directory, each with the code of its language, None where its name names
    none. By name (fra.dev before fra.devtest), but first those of a region or another script (eng-GB before eng)."""
    patterns, name_of = LAYOUTS[benchmark]
    known = {file: languages.lookup(name_of(file)) for pattern in patterns for file in folder.glob(pattern)
             if not file.is_dir() and not file.name.startswith(".")}
    order = sorted(known, key=lambda file: (not (known[file] and known[file][1]), file))
    return {file: known[file] and known[file][0].code for file in order}


def detect(path) -> str:
    """Which of the five benchmarks a directory holds, from its file names.

    Raises UserError where it has files of another one, too, or a folder up to two below it has, as deep as archives of
    benchmarks go: only one would be evaluated.
    """
    path = Path(path)
    if not path.is_dir():
        found = "found a file" if path.exists() else "no such directory"
        raise UserError(f"{path}: {found}; expected a directory of a benchmark's files")
    own, where = _held(path), collections.defaultdict(list)   # {benchmark: the topmost folders below that hold it}
    for folder in [*sorted(path.glob("*/")), *sorted(path.glob("*/*/"))]:
        with contextlib.suppress(OSError):
            for name in _held(folder):
                if not any(parent in where[name] for parent in folder.parents):
                    where[name].append(folder)
    where = {name: [path] for name in own} | where
    if len(where) == 1:
        [(name, folders)] = where.items()
        if own:
            return name
        raise UserError(f"{path}: holds {TITLES[name]} below, expected one of: {', '.join(map(str, folders[:5]))}"
                        + ", ..." * (len(folders) > 5))
    if where:
        held = ", ".join(f"{TITLES[name]} in {where[name][0]}" for name in TITLES if name in where)
        raise UserError(f"{path}: holds {held}: expected each benchmark by itself")
    found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    raise UserError(f"{path}: none of the five benchmarks: found {found}; expected */test_2k.tsv (PAWS-X), "
                    "test.*.jsonl (XCOPA), *_test.jsonl (XL-Sum), *.jsonl with instances (Self-Instruct), or texts such "
                    "as fra.devtest")


def _held(folder: Path) -> list[str]:
    """The benchmarks of which a directory has files: of translation in two languages, of Self-Instruct's kind."""
    found = {benchmark: files(benchmark, folder) for benchmark in TITLES}
    found["translation"] = len(set(found["translation"].values()) - {None}) >= 2
    found["self-instruct"] = any(map(_has_instances, found["self-instruct"]))
    return [benchmark for benchmark in TITLES if found[benchmark]]


def _has_instances(file: Path) -> bool:
    try:
        return "instances" in next(read_objects(file))[1]
    except UserError:                                  # empty or damaged, it may be anything's
        return False
