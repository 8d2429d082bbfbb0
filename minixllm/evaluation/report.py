"""From predictions to the paper's tables: scores by language and tier, off-target rate, democratization, tests."""

import collections
import functools
from pathlib import Path

import numpy as np

from minixllm import languages, plots
from minixllm.errors import UserError
from minixllm.evaluation import scorers, significance
from minixllm.files import atomic_write, read_json, write_json, write_json_lines

TIERS = ("low", "mid", "high")
MAIN = {"pawsx": "accuracy", "xcopa": "accuracy", "translation": "BLEU", "xlsum": "rouge1", "self-instruct": "rouge1"}
LEGEND = ("±: half of the 95 % interval, by resampling items", "p: paired bootstrap against the model before it")
BLEU_TOKENIZERS = {"zho_simpl": "zh", "zho_trad": "zh"} | dict.fromkeys(("jpn", "tha", "lao", "khm", "mya"), "char")


def score(predictions: list[dict], bleu_tokenizer: str | None = None, segment: bool = False, identifier=None) -> dict:
    """{metric: Score} of one language or direction, the paper's metric first.

    bleu_tokenizer: for all languages; None takes 13a, zh for Chinese and char where no spaces are written.
    identifier: as `language_id.identifier` gives it; None leaves off_target out.
    """
    benchmark, target = predictions[0]["benchmark"], predictions[0]["target"]
    parsed, references = [p["parsed"] for p in predictions], [p["reference"] for p in predictions]
    if "choices" in predictions[0]:
        return {"accuracy": scorers.accuracy(parsed, references)} | likelihood(predictions)
    if benchmark == "translation":
        tokenizer = bleu_tokenizer or BLEU_TOKENIZERS.get(target, "13a")
        scores = {"BLEU": scorers.bleu(parsed, references, tokenizer), "chrF++": scorers.chrf(parsed, references, 2)}
    else:
        scores = scorers.rouge(parsed, references, *(word_segmenter(target) if segment else ()))
        scores["exact_match"] = scorers.exact_match(parsed, references)
    if identifier and target in identifier.known:
        scores["off_target"] = scorers.off_target(parsed, target, identifier.is_in, identifier.name)
    return scores


def likelihood(predictions: list[dict]) -> dict:
    """acc: share of items whose likeliest choice is the right one; acc_char and acc_byte divide each choice's
    log-probability by its length in characters or UTF-8 bytes first."""
    lengths = {"acc": lambda text: 1, "acc_char": len, "acc_byte": lambda text: len(text.encode())}
    scores = {}
    for name, length in lengths.items():
        right = []
        for p in predictions:
            logps = p["logps"] and [logp / length(choice) for logp, choice in zip(p["logps"], p["choices"])]
            right.append(logps is not None and p["choices"][int(np.argmax(logps))] == p["reference"])
        scores[name] = significance.mean(right, significance.signed(name, choices="likelihood", ties="first"))
    return scores


def results(predictions: list[dict], before: dict | None = None, **how) -> dict:
    """{column: {"main": metric, "groups": {group: {...}}, "tiers": {metric: {tier: mean}}, "democratization": ...}}.

    before: this of another model on the same items, against which each main score is tested: its "p".
    how: as `score` takes it. Each group keeps its Scores under "_scores" for such tests; `write` leaves them out.
    """
    groups = {}
    for p in predictions:
        groups.setdefault((p["column"], p["group"]), []).append(p)
    table = {}
    for (column, group), members in groups.items():
        scores, main = score(members, **how), MAIN[members[0]["benchmark"]]
        language = languages.find(members[0]["language"])
        table.setdefault(column, {"main": main, "groups": {}})["groups"][group] = entry = {
            "language": language.code, "tier": language.tier, "items": len(members),
            "unparsed": sum(p["parsed"] is None for p in members), "cut": sum(bool(p["cut"]) for p in members),
            "too_long": sum(p["cut"] is None for p in members),
            "scores": {name: dict(zip(("value", "low", "high"), (s.value, *s.interval()))) | {"signature": s.signature}
                       for name, s in scores.items()},
            "_scores": scores}
        if before:
            entry["scores"][main]["p"] = significance.paired_bootstrap(
                before[column]["groups"][group]["_scores"][main], scores[main])
    for entry in table.values():
        metrics = dict.fromkeys(name for group in entry["groups"].values() for name in group["scores"])
        entry["tiers"] = {name: _tiers(entry["groups"].values(), name) for name in metrics}
        entry["democratization"] = significance.democratization(
            {name: group["scores"][entry["main"]]["value"] for name, group in entry["groups"].items()})
    return table


def _tiers(groups, metric: str) -> dict[str, float]:
    """The mean of the groups' scores in each tier that has any, and over all."""
    scored = [(group["tier"], group["scores"][metric]["value"]) for group in groups if metric in group["scores"]]
    values = {tier: [value for of, value in scored if of == tier] for tier in TIERS}
    values["all"] = [value for _, value in scored]
    return {tier: float(np.mean(v)) for tier, v in values.items() if v}


@functools.cache
def word_segmenter(code: str) -> tuple:
    """(text -> words, name) for a language written without spaces, as XL-Sum splits it; () for any other."""
    try:
        if code in ("zho_simpl", "zho_trad"):
            import jieba
            return lambda text: list(jieba.cut(text)), "jieba"
        if code == "tha":
            from pythainlp.tokenize import word_tokenize
            return lambda text: word_tokenize(text, engine="newmm"), "pythainlp"
        if code == "jpn":
            from fugashi import Tagger
            tagger = Tagger("-O wakati -b 50000")
            return lambda text: tagger.parse(text).split(), "fugashi"
    except (ImportError, RuntimeError) as error:
        raise UserError(f"segmenting {code} into words needs jieba (Chinese), pythainlp (Thai) or fugashi with a "
                        f"dictionary (Japanese): {error}") from None
    return ()


# ---- what is written ------------------------------------------------------------------------------------------------

def check_output(folder, names, items, settings: dict) -> None:
    """Refuse to replace a report by one that lacks a model, benchmark, language or items of it, or asked otherwise;
    stand-ins may go."""
    path = Path(folder) / "results.json"
    if not (found := read_json(path)):
        return
    now = collections.Counter((item.column, item.group) for item in items)
    try:
        before = {(column, group): entry["items"] for table in found["models"].values()
                  for column, of in table.items() if not column.endswith("stand-in")
                  for group, entry in of["groups"].items()}
        lost = sorted(found["models"].keys() - set(names))
        lost += sorted({column for column, _ in before} - {column for column, _ in now})
        lost += [f"{count} items of {column} {group} (now {now[column, group]})"
                 for (column, group), count in before.items() if now[column, group] < count and column not in lost]
        lost += [f"--{key} {found['settings'][key]!r}" for key in ("mode", "templates")
                 if before and found["settings"][key] != settings[key]]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: found no results of eval.py in it, expected another --output") from None
    if lost:
        raise UserError(f"{path}: found results of {', '.join(lost[:5])}{', ...' * (len(lost) > 5)}, which would be "
                        "lost; expected another --output, or settings that keep them")


def write(folder, models: dict[str, dict], predictions: dict[str, list[dict]], settings: dict, notes: list[str]) -> str:
    """Write predictions.jsonl of each model, results.json, report.md and, with matplotlib, scores.png.

    models: {name: what `results` gave}. Returns the report's tables of all languages together.
    """
    folder = Path(folder)
    for name, lines in predictions.items():
        write_json_lines(folder / name / "predictions.jsonl", lines)
    summary = overview(models, notes)
    report = f"{summary}\n{details(models)}"  # before what they need is taken out
    for name, table in models.items():
        for entry in table.values():
            for group in entry["groups"].values():
                group.pop("_scores")
    write_json(folder / "results.json", {"settings": settings, "notes": notes, "models": models})
    with atomic_write(folder / "report.md") as file:
        file.write(report)
    plots.scores(folder / "scores.png", models)
    return summary


def overview(models: dict[str, dict], notes: list[str]) -> str:
    """Markdown: the paper's table (models side by side, low / mid / high) and the analyses."""
    columns = list(dict.fromkeys(column for table in models.values() for column in table))

    def having(metric):
        return [column for column in columns
                if all(column in table and metric in table[column]["tiers"] for table in models.values())]

    parts = ["\n".join(f"- {note}" for note in notes)] if notes else []
    parts += ["## Scores by resource tier", _tier_table(models, columns, lambda entry: entry["main"])]
    if scored := having("acc"):
        parts += ["## Likelihood of the given choices: acc / acc_char / acc_byte, all languages",
                  _model_table(models, [(column,) for column in scored], lambda entry: " / ".join(
                      f"{entry['tiers'][metric]['all']:.2f}" for metric in ("acc", "acc_char", "acc_byte")))]
    if placed := having("off_target"):
        parts += ["## Off-target rate (%, less is better)", _tier_table(models, placed, lambda entry: "off_target")]
    parts += ["## Language democratization (the mean over languages in % of the best one)",
              _model_table(models, [(column,) for column in columns], lambda entry: f"{entry['democratization']:.2f}")]
    return "\n\n".join(parts) + "\n"


def details(models: dict[str, dict]) -> str:
    """Markdown: every language of each benchmark, and how they were scored."""
    columns = dict.fromkeys(column for table in models.values() for column in table)
    parts = [_languages(models, column) for column in columns]
    parts += ["## How it was scored", "\n".join(f"- {line}" for line in (*LEGEND, *_signatures(models)))]
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown that reads well in a terminal too: names to the left, all else to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _model_table(models, rows, cell) -> str:
    """A column a model: of these there are few, and a terminal is narrow. rows: (benchmark, what else `cell` takes)."""
    return _table(["", *models], [[" ".join(row), *(cell(table[row[0]], *row[1:]) for table in models.values())]
                                  for row in rows])


def _tier_table(models, columns, metric) -> str:
    """A row for each benchmark and tier it has."""
    first = next(iter(models.values()))
    heads = [(column, tier) for column in columns for tier in (*TIERS, "all")
             if tier in first[column]["tiers"][metric(first[column])]
             and (tier != "all" or len(first[column]["tiers"][metric(first[column])]) > 2)]
    return _model_table(models, heads, lambda entry, tier: f"{entry['tiers'][metric(entry)][tier]:.2f}")


def _languages(models, column) -> str:
    """Every language or direction of one benchmark: score, half its 95 % interval, p against the model before."""
    names = list(models)
    rows = []
    for group, entry in models[names[0]][column]["groups"].items():
        row = [f"{group} ({entry['tier']}, {entry['items']})"]
        for name in names:
            metric, mine = models[name][column]["main"], models[name][column]["groups"][group]
            result = mine["scores"][metric]
            cell = f"{result['value']:.2f} ± {(result['high'] - result['low']) / 2:.2f}"
            cell += "".join(f", {100 * mine[count] / mine['items']:.0f} % {said}" for count, said in
                            (("unparsed", "unread"), ("cut", "cut"), ("too_long", "too long")) if mine[count])
            row.append(cell + (f", p {result['p']:.3f}" if "p" in result else ""))
        rows.append(row)
    return f"## {column}: {models[names[0]][column]['main']}\n\n" + _table(["language (tier, items)", *names], rows)


def _signatures(models) -> list[str]:
    found = {}
    for table in models.values():
        for column, entry in table.items():
            for group in entry["groups"].values():
                for result in group["scores"].values():
                    found.setdefault(result["signature"], set()).add(column)
    return [f"{', '.join(sorted(columns))}: `{signature}`" for signature, columns in found.items()]
