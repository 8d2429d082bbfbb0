"""Stand-ins for the five benchmarks, in their five file formats, from the held-out part of the embedded data.

They are small, and about dates, times, quantities and lists, as the embedded training data is; where that has a task of
the kind, the stand-in asks for it in the same words (`instructions.toml`), elsewhere in the paper's.

- PAWS-X: do a date in full and one in ISO form name the same day? (in the paper's words, which training never had)
- XCOPA: which of two dates in full is the given ISO date?
- translation: dates, quantities and lists, from and to English, in one wording for all three, new to training
- XL-Sum: the short form of a date in full
- Self-Instruct: any instruction of the embedded data
"""

import datetime
import json
import random
from pathlib import Path

from minixllm import languages
from minixllm.demo import cldr
from minixllm.files import atomic_write
from minixllm.languages import FEEDBACK_LANGUAGES

ITEMS = {"pawsx": 20, "xcopa": 20, "translation": 9, "xlsum": 12, "self-instruct": 21}  # a language
XLSUM = ("amharic arabic bengali burmese chinese_simplified french gujarati hausa hindi igbo indonesian japanese "
         "korean kyrgyz marathi nepali persian portuguese punjabi russian somali spanish swahili tamil telugu thai "
         "turkish ukrainian urdu vietnamese welsh yoruba").split()
INSTRUCTIONS = f"""\
[xcopa.eng]
instruction = "{cldr.KINDS["date"][1]} Please return the results in {{language}}."
input = "{{premise}}"
cause = "cause"
effect = "effect"

[translation.eng]
instruction = "Write this in full. Please return the results in {{target_language}}."
input = "{{source}}"

[xlsum.eng]
instruction = "{cldr.KINDS["read"][1]}"
input = "{{article}}"
"""


def build(folder: Path, seed: int = 0) -> tuple[list[str], Path]:
    """Write the stand-ins below `folder`: (their five directories, the file of instructions)."""
    rng, folder = random.Random(seed), Path(folder)
    files = {}
    for tag in "de en es fr ja ko zh".split():
        files[f"pawsx/{tag}/test_2k.tsv"] = _pawsx(tag, rng)
    for tag in "et id it qu sw ta th tr vi zh".split():
        if cldr.speaks(tag, "date"):
            files[f"xcopa/test.{tag}.jsonl"] = _xcopa(tag, rng)
    subjects = ("date", "quantity", "list")
    contents = [_held_out(subject, rng) for subject in subjects for _ in range(ITEMS["translation"] // len(subjects))]
    for code in ["eng", *FEEDBACK_LANGUAGES]:
        tag = languages.find(code).tag
        if tag == "en" or all(cldr.speaks(tag, subject) for subject in subjects):
            files[f"translation/{code}.devtest"] = "".join(cldr.render(content, tag) + "\n" for content in contents)
    for name in XLSUM:
        tag = "zh" if name == "chinese_simplified" else languages.find(name).tag
        if cldr.speaks(tag, "date"):
            files[f"xlsum/{name}_test.jsonl"] = _xlsum(tag, rng)
    for tag in "ar cs de zh hi hy ky yo ta mn".split():
        files[f"self-instruct/{tag}.jsonl"] = _self_instruct(languages.find(tag).code, rng)
    files["instructions.toml"] = INSTRUCTIONS
    for name, text in files.items():
        with atomic_write(folder / name) as file:
            file.write(text)
    return [str(folder / name) for name in ITEMS], folder / "instructions.toml"


def _held_out(subject: str, rng: random.Random) -> tuple:
    while cldr.split(content := cldr.draw(subject, rng)) != "test":
        pass
    return content


def _iso(content: tuple) -> str:
    return datetime.date(*content[1:]).isoformat()


def _other(content: tuple, rng: random.Random) -> tuple:
    """The same date but for the month, or the day."""
    _, year, month, day = content
    if rng.random() < 0.5:
        return "date", year, rng.choice([m for m in range(1, 13) if m != month]), min(day, 28)
    return "date", year, month, rng.choice([d for d in range(1, 29) if d != day])


def _pawsx(tag: str, rng) -> str:
    rows = ["id\tsentence1\tsentence2\tlabel"]
    for number in range(ITEMS["pawsx"]):
        content, same = _held_out("date", rng), number % 2
        other = content if same else _other(content, rng)
        rows.append(f"{number + 1}\t{cldr.render(content, tag)}\t{_iso(other)}\t{same}")
    return "\n".join(rows) + "\n"


def _xcopa(tag: str, rng) -> str:
    lines = []
    for number in range(ITEMS["xcopa"]):
        content, label = _held_out("date", rng), number % 2
        choices = [cldr.render(content, tag), cldr.render(_other(content, rng), tag)]
        lines.append({"premise": _iso(content), "choice1": choices[label], "choice2": choices[1 - label],
                      "question": "effect", "label": label, "idx": number, "changed": False})
    return _jsonl(lines)


def _xlsum(tag: str, rng) -> str:
    contents = [_held_out("date", rng) for _ in range(ITEMS["xlsum"])]
    return _jsonl([{"id": f"{tag}-{number}", "url": "", "title": "", "summary": _iso(content),
                    "text": cldr.render(content, tag)} for number, content in enumerate(contents)])


def _self_instruct(code: str, rng) -> str:
    lines = []
    for number in range(ITEMS["self-instruct"]):
        kind = list(cldr.KINDS)[number % len(cldr.KINDS)]
        record = cldr.record(kind, _held_out(cldr.KINDS[kind][0], rng), code)
        if record:
            lines.append({"id": f"{code}-{number}", "instruction": record["instruction"],
                          "instances": [{"input": record["input"], "output": record["output"]}]})
    return _jsonl(lines)


def _jsonl(lines: list[dict]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
