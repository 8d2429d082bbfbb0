"""Pictures of a training run and of an evaluation, with matplotlib (the extra `plots`); without it, none."""

import contextlib
import json
from pathlib import Path

import numpy as np


def curves(folder) -> None:
    """Draw a run's metrics.jsonl into curves.png beside it: the loss, and what else is measured of held-out records.

    A training row is the mean of a batch; its curve is a running mean of them.
    """
    if (figure := _figure()) is None:
        return
    folder = Path(folder)
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    steps = [row for row in rows if "loss" in row]
    held_out = [(row["step"], row["held_out"]) for row in rows if row.get("held_out")]
    names = [name for name in (held_out[-1][1] if held_out else ["loss"]) if name in steps[-1]]
    across = min(4, len(names))
    down = -(-len(names) // across)
    figure.set_size_inches(4.5 * across, 3 * down)
    for number, name in enumerate(names):
        axes = figure.add_subplot(down, across, number + 1, title=name.replace("_", " "), xlabel="step")
        axes.plot([row["step"] for row in steps], _running_mean([row[name] for row in steps]), label="training")
        axes.plot([step for step, _ in held_out], [means[name] for _, means in held_out], "o-", markersize=3,
                  label="held out")
        axes.legend(frameon=False)
    with contextlib.suppress(OSError):  # a full disk: the run's own files will say so
        _save(figure, folder / "curves.png")


def scores(path: Path, models: dict[str, dict]) -> None:
    """Draw score by language, a panel a benchmark. models: {name: what `report.results` gave}."""
    if (figure := _figure()) is None:
        return
    columns = list(next(iter(models.values())))
    figure.set_size_inches(14, 2.6 * len(columns))
    for column, axes in zip(columns, np.atleast_1d(figure.subplots(len(columns)))):
        groups = list(next(iter(models.values()))[column]["groups"])
        for i, (name, table) in enumerate(models.items()):
            metric = table[column]["main"]
            values = [table[column]["groups"][group]["scores"][metric] for group in groups]
            heights = [value["value"] for value in values]
            errors = [[max(v["value"] - v["low"], 0) for v in values], [max(v["high"] - v["value"], 0) for v in values]]
            axes.bar(np.arange(len(groups)) + 0.8 * i / len(models), heights, 0.8 / len(models), yerr=errors,
                     label=name, error_kw={"linewidth": 0.6})
        axes.set(ylabel=metric, title=column, xlim=(-0.6, len(groups)))
        axes.set_xticks(np.arange(len(groups)) + 0.4 - 0.4 / len(models), groups, rotation=90, fontsize=6)
    figure.axes[0].legend()
    _save(figure, path)


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(layout="constrained")


def _save(figure, path: Path) -> None:
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


def _running_mean(values: list[float]) -> np.ndarray:
    """Over the last fiftieth of them, or as many as there are so far."""
    window, sums = max(1, len(values) // 50), np.cumsum([0.0, *values], dtype=float)
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
