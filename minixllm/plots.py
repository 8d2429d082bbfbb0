"""Pictures of a training run and of an evaluation, with matplotlib (the extra `plots`); without it, none."""

import contextlib
import itertools
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


TIERS, INKS = ("low", "mid", "high"), ("#2a7ab9", "#d9741a", "#3d9a50", "#b04a8f", "#7a7a7a", "#a8942a")


def scores(path: Path, table: dict) -> None:
    """Draw every benchmark of `table` (see `report.results`) as a row: scores by language, off-target, democratization.

    Languages are sorted by the first model's score within low, mid and high, in this order. Models stand side by side
    as points with their 95 % intervals. path: of the light picture; the dark one beside it is called {name}-dark.
    """
    try:
        from matplotlib import style
    except ImportError:
        return
    for look, file in (("default", path), ("dark_background", path.with_stem(f"{path.stem}-dark"))):
        with style.context(look):
            _save(_draw_scores(table), file)


def _draw_scores(table: dict):
    figure = _figure()
    longest = max(len(_sorted_groups(entry)) for entry in table.values())
    figure.set_size_inches(min(8 + 0.16 * longest, 26), 3.2 * len(table) + 0.6)
    panels = figure.subplots(len(table), 3, squeeze=False, width_ratios=[max(0.16 * longest, 3), 2.6, 1.6])
    names = list(dict.fromkeys(name for entry in table.values() for name in entry["models"]))
    ink = dict(zip(names, itertools.cycle(INKS)))
    for (column, entry), (by_language, off_target, democratization) in zip(table.items(), panels):
        _by_language(by_language, column, entry, ink)
        _off_target(off_target, entry, ink)
        values = {name: of["democratization"] for name, of in entry["models"].items()}
        bars = democratization.bar(range(len(values)), list(values.values()), color=[ink[name] for name in values])
        democratization.bar_label(bars, fmt="%.0f", fontsize=8)
        democratization.set(title="democratization, %", ylim=(0, 112), xticks=[])
    handles = [panels[0][0].plot([], [], "o", color=ink[name], label=name)[0] for name in names]
    figure.legend(handles=handles, loc="outside upper left", ncols=6, frameon=False)
    return figure


def _sorted_groups(entry: dict) -> list[str]:
    first = next(iter(entry["models"].values()))["groups"]
    return sorted(first, key=lambda group: (TIERS.index(first[group]["tier"]),
                                            first[group]["scores"][entry["main"]]["value"], group))


def _by_language(axes, column: str, entry: dict, ink: dict) -> None:
    groups, models = _sorted_groups(entry), entry["models"]
    spread = min(0.7, 0.1 + 0.02 * len(groups))            # few languages lie far apart: their models stay together
    tier = [next(iter(models.values()))["groups"][group]["tier"] for group in groups]
    for i, (name, of) in enumerate(models.items()):
        cells = [of["groups"][group]["scores"][entry["main"]] for group in groups]
        value, low, high = (np.array([cell[key] for cell in cells]) for key in ("value", "low", "high"))
        places = np.arange(len(groups)) + (i - (len(models) - 1) / 2) * spread / len(models)
        axes.errorbar(places, value, np.maximum([value - low, high - value], 0), fmt="o", markersize=3.5,
                      elinewidth=1, color=ink[name])
    for name in dict.fromkeys(tier):
        start = tier.index(name)
        if start:
            axes.axvline(start - 0.5, color="#808080", linewidth=0.8)
        axes.text(start - 0.4, 0.93, name, transform=axes.get_xaxis_transform(), fontsize=9, color="#808080")
    axes.set(title=column, ylabel=entry["main"], xlim=(-0.6, len(groups) - 0.4))
    axes.set_ylim(0, 1.15 * max(axes.get_ylim()[1], 1))
    axes.set_xticks(range(len(groups)), groups, rotation=90, fontsize=8)
    axes.grid(axis="y", alpha=0.3)


def _off_target(axes, entry: dict, ink: dict) -> None:
    """Means by tier with their intervals, or nothing where no answers are free texts."""
    tiers = {name: of["tiers"].get("off_target") for name, of in entry["models"].items()}
    if not all(tiers.values()):
        return axes.set_axis_off()
    shown = [tier for tier in (*TIERS, "all") if tier in next(iter(tiers.values()))]
    for i, (name, of) in enumerate(tiers.items()):
        value, low, high = (np.array([of[tier][key] for tier in shown]) for key in ("value", "low", "high"))
        axes.bar(np.arange(len(shown)) + 0.8 * (i + 0.5) / len(tiers) - 0.4, value, 0.8 / len(tiers), color=ink[name],
                 yerr=np.array([value - low, high - value]), error_kw={"linewidth": 1, "ecolor": "#808080"})
    axes.set(title="off-target, % (less is better)", xticks=range(len(shown)), xticklabels=shown)
    axes.set_ylim(bottom=0)


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
