"""Draw the implicit rewards of preference runs from their metrics.jsonl (needs the extra `plots`).

    python bench/plot_rewards.py docs/dpo-rewards.png runs/dpo="with the likelihood term" runs/dpo-plain="DPO alone"
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def smooth(values, window=20):
    return [sum(values[max(0, i - window):i + 1]) / len(values[max(0, i - window):i + 1]) for i in range(len(values))]


def main(target, *runs):
    figure, axes = plt.subplots(1, len(runs), figsize=(4.5 * len(runs), 3), sharey=True, squeeze=False)
    for axis, run in zip(axes[0], runs):
        folder, _, title = run.partition("=")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "loss" in row]
        for name in ("chosen_reward", "rejected_reward"):
            axis.plot([row["step"] for row in rows], smooth([row[name] for row in rows]), label=name.replace("_", " "))
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set(title=title or folder, xlabel="step")
        axis.legend(frameon=False)
    axes[0][0].set_ylabel("beta (log pi - log ref)")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
