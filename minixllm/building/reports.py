"""What a build did, in tables: report.json and report.md."""

import dataclasses
from pathlib import Path

from minixllm.errors import shortened
from minixllm.files import atomic_write, write_json
from minixllm.languages import LANGUAGES


def write(folder: Path, report: dict, text: str) -> None:
    write_json(folder / "report.json", report)
    with atomic_write(folder / "report.md") as file:
        file.write(text)


def instructions_report(report: dict, min_bleu: float) -> str:
    """report.md: the paper's table of how many languages have a quality in each interval, then a row for each."""
    intervals = [(low, [code for code, entry in report.items() if low <= min(entry["bleu"], 99.9) < low + 10])
                 for low in range(90, -10, -10)]
    lines = table(["BLEU there and back", "languages", "which"], [
        (f"{low} to {low + 10}", len(codes), " ".join(codes)) for low, codes in intervals if codes])
    lines += ["", f"The last build generated answers from {min_bleu:g} on, and translated them below."]
    lines += table(["language", "BLEU", "chrF", "answers", "records", "left out", "failed", "markup cut out"], [
        (f"{LANGUAGES[code].name} ({code})", f"{entry['bleu']:.1f}", f"{entry['chrf']:.1f}", entry["answers"],
         f"{entry['records']:,}", ", ".join(f"{reason} {count:,}" for reason, count in entry["left_out"].items())
         or "none", f"{entry['failed']:,}", entry.get("markup", 0)) for code, entry in report.items()])
    return "\n".join(lines[1:]) + "\n"


def feedback_report(report: dict, settings, total: int) -> str:
    """report.md: what was compared, who won, what was left out, with examples, the settings and the cost."""
    compared = report["comparisons"]
    readable = sum(compared.values()) - compared.get("not readable", 0)
    share = compared.get("orders disagree", 0) / max(1, readable)
    cost = ", ".join(f"{amount:,.0f} {unit}" for unit, amount in report["cost of all stored answers"].items())
    lines = [f"{report['records']:,} pairs out of {total:,} instructions; {report['failed']:,} failed, "
             f"{report['markup']:,} answers had markup cut out. All stored answers: {cost}.", "",
             f"Of {sum(compared.values()):,} comparisons, {compared.get('not readable', 0):,} could not be read; in "
             f"{share:.1%} of the readable ones the judge's two orders disagree (position bias), which makes a tie."]
    lines += table(["comparisons", "number"], compared.items())
    lines += table(["generator", "answers", "chosen", "rejected"], [
        (name, *(counts[key] for key in ("answers", "chosen", "rejected"))) for name, counts in
        report["generators"].items()])
    lines += table(["no candidate because of", "answers"], report["unusable"].items())
    lines += table(["asked for", "answers", "wrong language", "refusals", "loops"], [
        (f"{LANGUAGES[code].name} ({code})", counts["answers"], *(
            f"{sum(counts[name] for name in names) / counts['answers']:.1%}" for names in (
                [name for name in counts if name not in ("answers", "refusal", "loop")], ["refusal"], ["loop"])))
        for code, counts in report["by_language"].items()])
    lines += table(["margin, points of 10", "pairs"], [
        (f"{low} to {low + 1}", count) for low, count in report["margins"].items()])
    lines += table(["left out", "instructions"], report["left_out"].items())
    shown = ("instruction", "chosen", "rejected", "margin")
    lines += table(["written, for example", *shown[1:]], [
        [shortened(str(record[name]), 200) for name in shown] for record in report["written"]])
    lines += table(["left out, for example", "instruction and answers"], [
        (reason, shortened(" / ".join(example["texts"]), 200)) for reason, examples in report["examples"].items()
        for example in examples])
    lines += table(["setting", "value"], [
        (name, value) for name, value in dataclasses.asdict(settings).items() if name not in ("output", "dry_run")])
    return "\n".join(lines) + "\n"


def table(heads: list[str], rows) -> list[str]:
    """The lines of a Markdown table with an empty line before it; none where it has no rows."""
    def cell(value) -> str:
        return " ".join((f"{value:,}" if type(value) is int else str(value)).split()).replace("|", "\\|")

    cells = [[*map(cell, row)] for row in rows]
    return ["", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells))] if cells else []
