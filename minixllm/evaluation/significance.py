"""A score that carries its evidence: value, signature, 95 % interval, and tests of two systems on the same items.

Every corpus score here is a function of sums over items (matched n-grams, right answers, ...). A `Score` keeps each
item's summands. Resampling items then costs one matrix product, and no text is read twice. `python -m
bench.significance` measures how often these tests and intervals are wrong.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minixllm import __version__

SAMPLES, FLIPS, SEED = 1000, 10_000, 12345  # draws of the bootstrap and of the randomisation test
Z = 1.959963984540054                       # a normal variable is between -Z and Z with probability 95 %


@dataclass(frozen=True, eq=False)
class Score:
    """A corpus score in points from 0 to 100.

    signature: how it was computed. statistics: (items, K), the summands of each item. reduce: sums (..., K) -> scores
    (...). is_share: whether it is a share of items, with summands (1 or 0, 1).
    """

    signature: str
    statistics: np.ndarray
    reduce: Callable[[np.ndarray], np.ndarray]
    is_share: bool = False

    @functools.cached_property
    def value(self) -> float:
        return float(self.reduce(self.statistics.sum(0)))

    @functools.cached_property
    def draws(self) -> np.ndarray:
        """(SAMPLES,) scores of as many items drawn with replacement (bootstrap: Koehn 2004).

        A share gets two right and two wrong items more (Agresti and Coull 1998). If all its items are right, all draws
        would otherwise be 100, as if there were no doubt.
        """
        more = np.array([[1, 1], [1, 1], [0, 1], [0, 1]] if self.is_share else np.zeros((0, self.statistics.shape[1])))
        return self.reduce(_resample(len(self.statistics) + len(more)) @ np.concatenate([self.statistics, more]))

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval: Wilson's of a share; of every other score the middle 95 % of `draws`."""
        if self.is_share:
            return wilson(int(self.statistics[:, 0].sum()), len(self.statistics))
        scores, cut = np.sort(self.draws), SAMPLES // 40
        return float(scores[cut]), float(scores[-cut - 1])


def wilson(right: int, items: int) -> tuple[float, float]:
    """The 95 % interval of a share, in percent (Wilson 1927); (0, 0) of no items.

    Where one to three items are right, or wrong, it reaches to Poisson's limit: Wilson's own covers the truth there in
    as few as 84 % of cases (Brown, Cai and DasGupta 2001, section 4.1.1).
    """
    if 2 * right > items:
        low, high = wilson(items - right, items)
        return 100 - high, 100 - low
    share, spread = right / max(items, 1), Z * Z / max(items, 1)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = ((share + spread / 2 + side) / (1 + spread) for side in (-half, half))
    few = (0.0, 0.05129, 0.35536, 0.81769)  # means of Poisson variables that reach this index in 5 % of cases
    if right < len(few) and 6 * right <= items:
        low = min(low, few[right] / max(items, 1))
    return (100 * low, 100 * high) if items else (0.0, 0.0)


def signed(name: str, **choices) -> str:
    """"BLEU", tok="13a" -> "BLEU|tok:13a|minixllm:0.1.0", after sacreBLEU's signatures."""
    return "|".join([name, *(f"{key}:{value}" for key, value in choices.items()), f"minixllm:{__version__}"])


def _percentage(sums: np.ndarray) -> np.ndarray:
    return 100 * sums[..., 0] / np.maximum(sums[..., 1], 1)


def mean(values, signature: str, is_share: bool = False) -> Score:
    """The mean of per-item values in [0, 1], in percent; 0 of no items. is_share: each value is 0 or 1."""
    values = np.asarray(values, dtype=np.float64)
    return Score(signature, np.stack([values, np.ones_like(values)], 1), _percentage, is_share)


def p_value(baseline: Score, system: Score) -> float:
    """The probability of a difference at least this large, either way, if both systems are equally good.

    Both answered the same items. Shares: McNemar's exact test (1947), for an item that only one system gets right is
    as likely the one's as the other's. Other scores: approximate randomisation (Noreen 1989; Riezler and Maxwell 2005),
    which swaps the two systems' statistics for a random half of the items; where few differ, for each of their subsets.
    """
    if len(baseline.statistics) != len(system.statistics) or baseline.signature != system.signature:
        raise ValueError(f"a paired test compares the same items scored the same way: {len(baseline.statistics)} items "
                         f"of {baseline.signature} against {len(system.statistics)} of {system.signature}")
    gap = baseline.statistics - system.statistics
    gap = gap[gap.any(1)]                                         # swapping equal statistics changes nothing
    subsets = 2 ** len(gap)
    if system.is_share:
        fewer = min(np.count_nonzero(gap[:, 0] > 0), np.count_nonzero(gap[:, 0] < 0))
        return min(1.0, 2 * sum(math.comb(len(gap), k) for k in range(fewer + 1)) / subsets)

    def as_large(swapped: np.ndarray) -> int:
        moved = swapped @ gap
        found = system.reduce(system.statistics.sum(0) + moved) - system.reduce(baseline.statistics.sum(0) - moved)
        return np.count_nonzero(np.abs(found) >= abs(system.value - baseline.value) - 1e-9)

    if subsets <= FLIPS:
        return as_large(np.arange(subsets)[:, None] >> np.arange(len(gap)) & 1) / subsets
    random, size = np.random.default_rng(SEED), min(FLIPS, 1000)  # in blocks, to need little memory
    found = sum(as_large(random.integers(0, 2, (size, len(gap))).astype(float)) for _ in range(FLIPS // size))
    return (found + 1) / (FLIPS + 1)


@functools.lru_cache(maxsize=4)
def _resample(items: int) -> np.ndarray:
    """(SAMPLES, items) how often each draw holds each item: the same for all scores of as many items, so in pairs."""
    if not items:
        return np.zeros((SAMPLES, 0))
    draws = np.random.default_rng(SEED).choice(items, size=(SAMPLES, items), replace=True)  # as sacreBLEU draws
    draws += items * np.arange(SAMPLES)[:, None]
    return np.bincount(draws.ravel(), minlength=SAMPLES * items).reshape(SAMPLES, items).astype(float)


def over_languages(scores: list[Score], baseline: list[Score] | None = None) -> dict:
    """{"value", "low", "high", "languages", "p"}: the mean over languages, its 95 % interval, p against `baseline`'s.

    The languages stand for others like them, as their items do. The standard error is the bootstrap's in two stages,
    over languages and then over each one's items (Davison and Hinkley 1997, section 3.8), times sqrt(L / (L - 1)): L
    languages drawn from themselves vary by that much less. Interval and p take Student's t with L - 1 degrees of
    freedom, by a million draws. One language alone has its own interval and p.
    """
    count, value = len(scores), float(np.mean([score.value for score in scores]))
    found = {"value": value, "low": scores[0].interval[0], "high": scores[0].interval[1], "languages": count}
    if count == 1:
        return found | ({"p": p_value(baseline[0], scores[0])} if baseline else {})
    sizes = _student(count - 1)
    half = sizes[len(sizes) * 95 // 100] * _standard_error([score.draws for score in scores])
    found |= {"low": max(value - half, 0.0), "high": min(value + half, 100.0)}
    if baseline:
        gap = abs(value - float(np.mean([score.value for score in baseline])))
        error = _standard_error([a.draws - b.draws for a, b in zip(scores, baseline, strict=True)])
        larger = len(sizes) - np.searchsorted(sizes, gap / max(error, 1e-9))
        found["p"] = 1.0 if gap < 1e-9 else float((larger + 1) / (len(sizes) + 1))
    return found


def _standard_error(draws: list[np.ndarray]) -> float:
    """draws: for each of L languages SAMPLES scores, or differences of two models' scores."""
    random, size = np.random.default_rng(SEED), (SAMPLES, len(draws))
    means = np.stack(draws)[random.integers(len(draws), size=size), random.integers(SAMPLES, size=size)].mean(1)
    return float(means.std() * math.sqrt(len(draws) / (len(draws) - 1)))


@functools.lru_cache(maxsize=8)
def _student(freedom: int) -> np.ndarray:
    return np.sort(np.abs(np.random.default_rng(SEED).standard_t(freedom, 10**6)))


def holm(p_values: list[float]) -> list[float]:
    """p-values of one table, corrected (Holm 1979): below 0.05, in 95 % of tables none is a false alarm."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = adjusted[i] = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


def democratization(scores: dict[str, float]) -> float:
    """Mean over languages as a percentage of the best language (Huang et al. 2023): 100 mean(M) / max(M).

    100 means that every language is served alike. 0 where no language scores at all.
    """
    best = max(scores.values(), default=0.0)
    return 100 * sum(scores.values()) / len(scores) / best if best > 0 else 0.0
