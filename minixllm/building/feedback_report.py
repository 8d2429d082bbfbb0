"""report.md of the build of feedback."""

import dataclasses

from minixllm.errors import shortened
from minixllm.languages import LANGUAGES


def report_tables(report: dict, settings, total: int) -> str:
    """report.md: what was compared, who won, what was left out, with examples, the settings and the cost."""
    compared = report["comparisons"]
    readable = sum(compared.values()) - compared.get("not readable", 0)
    share = compared.get("orders disagree", 0) / max(1, readable)
    cost = ", ".join(f"{amount:,.0f} {unit}" for unit, amount in report["cost of all stored answers"].items())
    lines = [f"{report['records']:,} pairs out of {total:,} instructions; {report['failed']:,} failed, "
             f"{report['markup']:,} answers had markup cut out. All stored answers: {cost}.", "",
             f"Of {sum(compared.values()):,} comparisons, {compared.get('not readable', 0):,} could not be read; in "
             f"{share:.1%} of the readable ones the judge's two orders disagree (position bias), which makes a tie."]
    lines += _table(["comparisons", "number"], compared.items())
    lines += _table(["generator", "answers", "chosen", "rejected"], [
        (name, *(counts[key] for key in ("answers", "chosen", "rejected"))) for name, counts in
        report["generators"].items()])
    lines += _table(["no candidate because of", "answers"], report["unusable"].items())
    lines += _table(["asked for", "answers", "wrong language", "refusals", "loops"], [
        (f"{LANGUAGES[code].name} ({code})", counts["answers"], *(
            f"{sum(counts[name] for name in names) / counts['answers']:.1%}" for names in (
                [name for name in counts if name not in ("answers", "refusal", "loop")], ["refusal"], ["loop"])))
        for code, counts in report["by_language"].items()])
    lines += _table(["margin, points of 10", "pairs"], [
        (f"{low} to {low + 1}", count) for low, count in report["margins"].items()])
    lines += _table(["left out", "instructions"], report["left_out"].items())
    shown = ("instruction", "chosen", "rejected", "margin")
    lines += _table(["written, for example", *shown[1:]], [
        [record[name] for name in shown] for record in report["written"]])
    lines += _table(["left out, for example", "instruction and answers"], [
        (reason, " / ".join(example["texts"])) for reason, examples in report["examples"].items()
        for example in examples])
    lines += _table(["setting", "value"], [
        (name, value) for name, value in dataclasses.asdict(settings).items() if name not in ("output", "dry_run")])
    return "\n".join(lines) + "\n"


def _table(heads: list[str], rows) -> list[str]:
    """A Markdown table, nothing where it would be empty; long texts are cut."""
    def cell(value) -> str:
        text = f"{value:,}" if type(value) is int else shortened(str(value), 200)
        return " ".join(text.split()).replace("|", "\\|")

    cells = [[*map(cell, row)] for row in rows]
    return ["", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells))] if cells else []
