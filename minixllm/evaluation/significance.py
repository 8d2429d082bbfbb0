"""A score that carries its evidence: the value, its signature, its 95 % interval, and tests between two systems.

Every corpus score here is a function of sums over items (matched n-grams, right answers, ...). A `Score` keeps the
summands of each item, so that resampling items (Koehn 2004) costs one matrix product and no second pass over text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minixllm import __version__

SAMPLES, SEED = 1000, 12345  # of the bootstrap: sacreBLEU's


@dataclass(frozen=True)
class Score:
    """A corpus score in points from 0 to 100.

    statistics: (items, K) summands of each item. reduce: sums (..., K) -> scores (...). signature: how it was taken.
    """

    signature: str
    statistics: np.ndarray
    reduce: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        return float(self.reduce(self.statistics.sum(0)))

    def interval(self) -> tuple[float, float]:
        """The middle 95 % of the scores of sets of items drawn with replacement."""
        scores = np.sort(self.reduce(_resample(len(self.statistics)) @ self.statistics))
        cut = SAMPLES // 40
        return float(scores[cut]), float(scores[SAMPLES - cut - 1])


def signed(name: str, **choices) -> str:
    """bleu, tok="13a" -> "bleu|tok:13a|minixllm:0.1.0", after sacreBLEU's signatures."""
    return "|".join([name, *(f"{key}:{value}" for key, value in choices.items()), f"minixllm:{__version__}"])


def _percentage(sums: np.ndarray) -> np.ndarray:
    return 100 * sums[..., 0] / np.maximum(sums[..., 1], 1)


def mean(values, signature: str) -> Score:
    """The mean of per-item values in [0, 1], in percent; 0 of no items."""
    values = np.asarray(values, dtype=np.float64)
    return Score(signature, np.stack([values, np.ones_like(values)], 1), _percentage)


def paired_bootstrap(baseline: Score, system: Score) -> float:
    """p-value of |system - baseline| under paired resampling of the same items, as sacreBLEU's `--paired-bs` gives it.

    Koehn 2004, "Statistical significance tests for machine translation evaluation", shifted to the null hypothesis.
    Ties count as no difference, so that two systems that answer alike get 1 (sacreBLEU gives them 0.001).
    """
    if len(baseline.statistics) != len(system.statistics) or baseline.signature != system.signature:
        raise ValueError(f"a paired test compares the same items scored the same way: {len(baseline.statistics)} items "
                         f"of {baseline.signature} against {len(system.statistics)} of {system.signature}")
    draws = _resample(len(system.statistics))
    gaps = np.abs(system.reduce(draws @ system.statistics) - baseline.reduce(draws @ baseline.statistics))
    observed = abs(system.value - baseline.value)
    return float((np.sum(gaps - gaps.mean() >= observed) + 1) / (SAMPLES + 1))


def _resample(items: int) -> np.ndarray:
    """(SAMPLES, items) how often each draw holds each item; the draws are those of sacreBLEU for the same seed."""
    if items == 0:
        return np.zeros((SAMPLES, 0))
    draws = np.random.default_rng(SEED).choice(items, size=(SAMPLES, items), replace=True)
    draws += np.arange(SAMPLES)[:, None] * items
    return np.bincount(draws.ravel(), minlength=SAMPLES * items).reshape(SAMPLES, items).astype(np.float64)


def democratization(scores: dict[str, float]) -> float:
    """Mean over languages as a percentage of the best language (Huang et al. 2023): 100 mean(M) / max(M).

    100 means that every language is served alike. 0 where no language scores at all.
    """
    best = max(scores.values(), default=0.0)
    return 100 * sum(scores.values()) / len(scores) / best if best > 0 else 0.0
