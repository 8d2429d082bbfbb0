"""From predictions to the paper's tables: scores by language and tier, off-target rate, democratization, tests.

All that the tables say stands in results.json, from which they are drawn: the benchmarks of several runs so join one
report.
"""

import collections
import contextlib
import itertools
import json
from pathlib import Path

import numpy as np

from minixllm import languages, plots
from minixllm.errors import UserError
from minixllm.evaluation import scorers, significance
from minixllm.evaluation.predict import Prediction
from minixllm.evaluation.segmenters import word_segmenter
from minixllm.evaluation.significance import Score
from minixllm.files import atomic_write, read_json, write_json, write_json_lines

TIERS = ("low", "mid", "high")
MAIN = {"pawsx": "accuracy", "xcopa": "accuracy", "translation": "BLEU", "xlsum": "rouge1", "self-instruct": "rouge1"}
LEGEND = ("in brackets the 95 % interval: Wilson's for shares, by resampling items for other scores, by resampling "
          "languages and items for means",
          "p: exact McNemar test for shares, randomisation test for other scores, Student's t on the resampled means; "
          "corrected for all comparisons of its table (Holm)")
BLEU_TOKENIZERS = {"zho_simpl": "zh", "zho_trad": "zh"} | dict.fromkeys(("jpn", "tha", "lao", "khm", "mya"), "char")


def score(predictions: list[Prediction], bleu_tokenizer: str | None = None, segment: bool = False, identifier=None,
          choices: str = "both") -> dict[str, Score]:
    """{metric: Score} of one language or direction, the one that the tables show first.

    bleu_tokenizer: for all languages; None takes 13a, zh for Chinese and char where no spaces are written. identifier:
    as `language_id.identifier` gives it; None leaves off_target out. choices: how they were asked, see `predict.How`.
    """
    item = predictions[0].item
    parsed, references = [p.parsed for p in predictions], [p.item.reference for p in predictions]
    if item.choices:
        scores = {} if choices == "likelihood" else {"accuracy": scorers.accuracy(parsed, references)}
        return scores if choices == "answers" else scores | likelihood(predictions)
    if item.benchmark == "translation":
        tokenizer = bleu_tokenizer or BLEU_TOKENIZERS.get(item.target, "13a")
        scores = {"BLEU": scorers.bleu(parsed, references, tokenizer), "chrF++": scorers.chrf(parsed, references, 2)}
    else:
        scores = scorers.rouge(parsed, references, *(word_segmenter(item.target) if segment else ()))
        scores["exact_match"] = scorers.exact_match(parsed, references)
    if identifier and item.target in identifier.known:
        scores["off_target"] = scorers.off_target(parsed, item.target, identifier.is_in, identifier.name)
    return scores


def likelihood(predictions: list[Prediction]) -> dict[str, Score]:
    """acc: share of items whose likeliest choice is the right one; acc_char and acc_byte divide each choice's
    log-probability by its length in characters or UTF-8 bytes first."""
    lengths = {"acc": lambda text: 1, "acc_char": len, "acc_byte": lambda text: len(text.encode())}
    scores = {}
    for name, length in lengths.items():
        right = []
        for p in predictions:
            logps = p.logps and [logp / length(choice) for logp, choice in zip(p.logps, p.item.choices)]
            right.append(logps is not None and p.item.choices[int(np.argmax(logps))] == p.item.reference)
        scores[name] = significance.mean(right, significance.signed(name, choices="likelihood", ties="first"), True)
    return scores


def results(predictions: dict[str, list[Prediction]], **how) -> dict:
    """{column: {"main": metric, "models": {name: {"groups": {...}, "tiers": {...}, ...}}}}, as results.json has it.

    predictions: {name of a model: its predictions}, of the same items. Each model is tested against the one before it.
    how: as `score` takes it.
    """
    table, before, last = {}, {}, None
    for name, mine in predictions.items():
        members = {}
        for p in mine:
            members.setdefault((p.item.column, p.item.group), []).append(p)
        scores = {place: score(of, **how) for place, of in members.items()}
        for column in dict.fromkeys(column for column, _ in members):
            groups = {group: of for (where, group), of in members.items() if where == column}
            main = next(iter(scores[column, next(iter(groups))]))
            entry = table.setdefault(column, {"main": main, "models": {}})["models"][name] = {
                "against": last, "groups": {group: _group(of, scores[column, group], before.get((column, group)))
                                            for group, of in groups.items()}}
            entry["tiers"] = _tiers(entry["groups"], {group: scores[column, group] for group in groups},
                                    {group: before[column, group] for group in groups} if before else None)
            entry["democratization"] = significance.democratization(
                {group: cell["scores"][main]["value"] for group, cell in entry["groups"].items()})
        before, last = scores, name
    return table


def _group(members: list[Prediction], scores: dict[str, Score], before: dict[str, Score] | None) -> dict:
    """One language or direction: its counts, and its scores, of which the first is tested."""
    language = languages.find(members[0].item.language)
    cells = {name: dict(zip(("value", "low", "high"), (s.value, *s.interval))) | {"signature": s.signature}
             for name, s in scores.items()}
    if before:
        main = next(iter(scores))
        cells[main]["p"] = significance.p_value(before[main], scores[main])
    return {"language": language.code, "tier": language.tier, "items": len(members),
            "unparsed": sum(p.answer is not None and p.parsed is None for p in members),
            "cut": sum(bool(p.cut) for p in members), "too_long": sum(p.cut is None for p in members), "scores": cells}


def _tiers(groups: dict, scores: dict[str, dict[str, Score]], before: dict[str, dict[str, Score]] | None) -> dict:
    """{metric: {tier: as `over_languages` gives it, with "of", how many languages or directions the tier has here}}."""
    tiers = {}
    for tier in (*TIERS, "all"):
        members = [group for group, cell in groups.items() if tier in (cell["tier"], "all")]
        for name in dict.fromkeys(name for group in members for name in scores[group]):
            scored = [group for group in members if name in scores[group]]
            found = significance.over_languages([scores[group][name] for group in scored],
                                                before and [before[group][name] for group in scored])
            tiers.setdefault(name, {})[tier] = found | {"of": len(members)}
    return tiers


# ---- what is written ------------------------------------------------------------------------------------------------

def check_output(folder, names, items, settings: dict) -> None:
    """Refuse to replace a benchmark's report by one that lacks a model, language or items of it, or asked otherwise.

    Reports of other benchmarks stay beside the new one (see `write`); those of stand-ins may go.
    """
    path = Path(folder) / "results.json"
    now, columns = collections.Counter((item.column, item.group) for item in items), {item.column for item in items}
    lost = []
    try:
        for column, found in read_json(path).get("benchmarks", {"": {}} if path.exists() else {}).items():
            before, groups = found["settings"], [of["groups"] for of in found["models"].values()]
            if column not in columns or column.endswith("stand-in"):
                continue
            lost += [f"{name} on {column}" for name in sorted(found["models"].keys() - set(names))]
            lost += [f"{cell['items']} items of {column} {group} (now {now[column, group]})"
                     for group, cell in groups[0].items() if now[column, group] < cell["items"]]
            lost += [f"{column} with --{key} {before[key]!r}" for key in ("mode", "templates", "choices")
                     if before[key] != settings[key] and (key, settings[key]) != ("choices", "both")]
    except (AttributeError, KeyError, TypeError, IndexError):
        raise UserError(f"{path}: found no results of eval.py in it, expected another --output") from None
    if lost:
        raise UserError(f"{path}: found results of {', '.join(lost[:5])}{', ...' * (len(lost) > 5)}, which would be "
                        "lost; expected another --output, or settings that keep them")


def write(folder, table: dict, predictions: dict[str, list[Prediction]], settings: dict, notes: list[str]) -> str:
    """Write predictions.jsonl of each model, results.json, report.md and, with matplotlib, scores.png.

    table: as `results` gives it. Benchmarks that an older report in the folder has alone, stand-ins aside, stay in all
    of these. Returns the report's tables of all languages together.
    """
    folder = Path(folder)
    table = {column: {"main": entry["main"], "settings": settings, "notes": notes, "models": entry["models"]}
             for column, entry in table.items()}
    older = read_json(folder / "results.json").get("benchmarks", {})
    table = {column: entry for column, entry in older.items()
             if column not in table and not column.endswith("stand-in")} | table
    for name, mine in predictions.items():
        file, new = folder / name / "predictions.jsonl", {p.item.column for p in mine}
        with open(file, encoding="utf-8") if file.exists() else contextlib.nullcontext(()) as lines:
            kept = (line for line in map(json.loads, lines) if line["column"] in table.keys() - new)
            write_json_lines(file, itertools.chain(kept, (p.line() for p in mine)))
    summary = overview(table)
    remarks = dict.fromkeys(note for entry in table.values() for note in entry["notes"])
    report = "".join(f"- {note}\n" for note in remarks) + f"\n{summary}\n{details(table)}"
    write_json(folder / "results.json", {"benchmarks": table})
    with atomic_write(folder / "report.md") as file:
        file.write(report)
    plots.scores(folder / "scores.png", table)
    return summary


def _correct(cells: list[dict]) -> None:
    """Set "p_holm" in each cell of one table that has a "p"."""
    cells = [cell for cell in cells if "p" in cell]
    for cell, p in zip(cells, significance.holm([cell["p"] for cell in cells])):
        cell["p_holm"] = p


def _cell(of: dict) -> str:
    p = f", p {of['p_holm']:.3f}" if "p_holm" in of else ""
    return f"{of['value']:.2f} ({of['low']:.1f}-{of['high']:.1f}){p}"


def overview(table: dict) -> str:
    """Markdown: the paper's table (models side by side, low / mid / high) and the analyses."""
    parts = ["## Scores by resource tier (in brackets of how many languages or directions)",
              _tier_table(table, {column: entry["main"] for column, entry in table.items()})]
    if chosen := _having(table, "acc"):
        parts += ["## Likelihood of the given choices: acc / acc_char / acc_byte, all languages",
                  _model_table(table, [(column,) for column in chosen], lambda of, _: " / ".join(
                      f"{of['tiers'][metric]['all']['value']:.2f}" for metric in ("acc", "acc_char", "acc_byte")))]
    if placed := _having(table, "off_target"):
        parts += ["## Off-target rate (%, less is better)",
                  _tier_table(table, dict.fromkeys(placed, "off_target"))]
        for column in placed:
            groups = next(iter(table[column]["models"].values()))["groups"]
            if unknown := [group for group, cell in groups.items() if "off_target" not in cell["scores"]]:
                parts.append(f"Not in the means of {column}, for no identifier knows them: {', '.join(unknown)}")
    parts += ["## Language democratization (the mean over languages in % of the best one)",
              _model_table(table, [(column,) for column in table], lambda of, _: f"{of['democratization']:.2f}")]
    return "\n\n".join(parts) + "\n"


def details(table: dict) -> str:
    """Markdown: every language of each benchmark, and how they were scored."""
    parts = [_languages(table, column) for column in table]
    signatures, against = {}, {}
    for column, entry in table.items():
        for name, of in entry["models"].items():
            against |= {f"p: {name} against {of['against']}": None} if of.get("against") else {}
            for cell in (cell for group in of["groups"].values() for cell in group["scores"].values()):
                signatures.setdefault(cell["signature"], {})[column] = None
    lines = [*LEGEND, *against, *(f"{', '.join(columns)}: `{of}`" for of, columns in signatures.items())]
    return "\n\n".join([*parts, "## How it was scored", "\n".join(f"- {line}" for line in lines)]) + "\n"


def _having(table: dict, metric: str) -> list[str]:
    return [column for column, entry in table.items()
            if all(metric in of["tiers"] for of in entry["models"].values())]


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown that reads well in a terminal too: names to the left, all else to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _model_table(table: dict, rows: list[tuple], cell, head=" ".join) -> str:
    """A column a model: of these there are few, and a terminal is narrow. rows: (benchmark, ...), as head takes them.

    cell(what `results` gave for a model and benchmark, row) -> text.
    """
    names = dict.fromkeys(name for entry in table.values() for name in entry["models"])
    return _table(["", *names], [[head(row), *(cell(models[name], row) if name in models else "-" for name in names)]
                                 for row in rows for models in [table[row[0]]["models"]]])


def _tier_table(table: dict, metrics: dict[str, str]) -> str:
    """A row for each benchmark and tier it has; metrics: {benchmark: metric}."""
    tiers = {column: next(iter(table[column]["models"].values()))["tiers"][metrics[column]] for column in metrics}
    rows = [(column, tier) for column, of in tiers.items() for tier in of if tier != "all" or len(of) > 2]
    _correct([model["tiers"][metrics[column]][tier] for column, tier in rows
              for model in table[column]["models"].values()])

    def head(row):
        cell = tiers[row[0]][row[1]]
        missing = f" of {cell['of']}" if cell["of"] > cell["languages"] else ""
        return f"{row[0]} {row[1]} ({cell['languages']}{missing})"

    return _model_table(table, rows, lambda of, row: _cell(of["tiers"][metrics[row[0]]][row[1]]), head)


def _languages(table: dict, column: str) -> str:
    """Every language or direction of one benchmark: score, 95 % interval, what was not read, p."""
    main, models = table[column]["main"], table[column]["models"]
    _correct([cell["scores"][main] for of in models.values() for cell in of["groups"].values()])

    def cell(of):
        shares = [f", {100 * of[count] / of['items']:.0f} % {said}" for count, said in
                  (("unparsed", "unread"), ("cut", "cut"), ("too_long", "too long")) if of[count]]
        return _cell(of["scores"][main]) + "".join(shares)

    rows = [[f"{group} ({of['tier']}, {of['items']})", *(cell(model["groups"][group]) for model in models.values())]
            for group, of in next(iter(models.values()))["groups"].items()]
    return f"## {column}: {main}\n\n" + _table(["language (tier, items)", *models], rows)
