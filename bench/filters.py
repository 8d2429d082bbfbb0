"""What the filters of built records refuse of good translations, and what they let through of planted faults.

    python -m bench.filters NTREX [--languages CODE ...] [--every 5]

NTREX is a folder with {code}.txt for English and other languages, line for line translations by professionals. Every
line is a good pair, every fifth is spoilt in each way. One row a language, in percent: good pairs refused and why, then
for each fault how many of the spoilt answers pass.
"""

import argparse
import collections
import random
from pathlib import Path

from minixllm.building import filters, refusals
from minixllm.data.records import Instruction
from minixllm.evaluation import language_id

REFUSALS = Path(__file__).parent.parent / "tests/building/refusals.tsv"


def pieces(text: str) -> list[str]:
    """Words, or letters where spaces part none; they join to the text again."""
    words = text.split(" ")
    return [word + " " for word in words] if len(text) < 16 * len(words) else list(text)


def spoilt(english: list[str], lines: list[str], others: list[str], i: int) -> dict[str, tuple]:
    """For each kind of fault what filters.fault takes first, made of line i and the lines before it."""
    ours, theirs = pieces(lines[i]), pieces(english[i])
    question, answer = lines[i - 1], lines[i]
    record = Instruction(english[i - 1], "", english[i - 2])
    translated = Instruction(english[i - 1], "", english[i])
    half = "".join(ours[:len(ours) // 2]), "".join(theirs[len(theirs) // 2:])
    halves = " ".join(half if i % 2 else half[::-1])
    return {
        "sentence six times": (record, (question, "", " ".join([answer] * 6)), True),
        "phrase twelve times": (record, (question, "", answer + " " + "".join(
            ours[:4] if " " in ours[0] else ours[:8]) * 12), True),
        "question again": (record, (question, "", question), True),
        "half in English, translated": (translated, (question, "", halves), False),
        "half in English, generated": (record, (question, "", halves), True),
        "two sentences of four in English": (
            record, (question, "", " ".join([*lines[i - 4:i - 2], *english[i - 2:i]])), True),
        "all in English": (record, (question, "", english[i]), True),
        "in another language": (record, (question, "", others[i]), True),
        "cut to a third": (translated, (question, "", "".join(ours[:len(ours) // 3])), False),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--languages", nargs="+", help="codes; none: all there are")
    parser.add_argument("--every", type=int, default=5, help="every how manieth line is spoilt")
    args = parser.parse_args()
    texts = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in sorted(args.folder.glob("*.txt"))}
    english = texts.pop("eng")
    wordings = collections.defaultdict(list)
    for line in REFUSALS.read_text(encoding="utf-8").splitlines():
        wordings[line.split("\t")[0]].append(line.split("\t")[1])
    draw, rows = random.Random(0), {}
    for code in args.languages or texts:
        rows[code] = measure(code, texts, english, wordings[code], draw, args.every)
        refused, why, passed = rows[code]
        shares = ", ".join(f"{kind} {share:.0f}" for kind, share in passed.items())
        print(f"| {code} | {refused:.1f} | {why} | {shares} |", flush=True)
    most = max((refused, code) for code, (refused, _, _) in rows.items())
    average = sum(refused for refused, _, _ in rows.values()) / len(rows)
    print(f"\n{len(rows)} languages, good pairs refused: {average:.2f} on average, {most[0]:.1f} at most ({most[1]})\n\n"
          "| planted fault | passed, average | at most |\n|---|---|---|")
    for kind in dict.fromkeys(kind for _, _, passed in rows.values() for kind in passed):
        shares = [(passed[kind], code) for code, (_, _, passed) in rows.items() if kind in passed]
        average = sum(share for share, _ in shares) / len(shares)
        print(f"| {kind} | {average:.1f} | {max(shares)[0]:.0f} ({max(shares)[1]}) |")


def measure(code: str, texts: dict, english: list[str], wordings: list[str], draw, every: int):
    """(percent of good pairs refused, why, {planted fault: percent passed}) of a language."""
    lines, why, passed, tried = texts[code], collections.Counter(), collections.Counter(), collections.Counter()
    for source, target in zip(english, lines):
        why[filters.fault(Instruction(source, "", source), (target, "", target), False, code)] += 1
    relatives = set().union({code}, *(each for each in language_id.RELATIVES if code in each))
    others = [texts[draw.choice(sorted(texts.keys() - relatives))][i] for i in range(len(lines))]
    for i in range(every, len(lines), every):
        for kind, case in spoilt(english, lines, others, i).items():
            tried[kind] += 1
            passed[kind] += filters.fault(*case, code) is None
    for refusal in wordings:
        tried["refusal of tests/building"] += 1
        passed["refusal of tests/building"] += not refusals.refuses(refusal, code)
    refused = 100 * (len(lines) - why.pop(None, 0)) / len(lines)
    return (refused, ", ".join(f"{reason} {100 * count / len(lines):.1f}" for reason, count in why.most_common()),
            {kind: 100 * passed[kind] / count for kind, count in tried.items()})


if __name__ == "__main__":
    main()
