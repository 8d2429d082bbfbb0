"""Intervals and tests: how often they are wrong, by simulation and by exact sums, and what they find."""

import math
import random

import numpy as np
import pytest

from minixllm.evaluation import scorers, significance
from minixllm.evaluation.significance import Score, holm, mean, over_languages, p_value, wilson


def shares(right, items=50):
    return [mean(row, "accuracy", is_share=True) for row in np.arange(items) < np.asarray(right)[:, None]]


def binomial(items: int, p: float) -> np.ndarray:
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, items + 1)))])
    k = np.arange(items + 1)
    return np.exp(logs[items] - logs[k] - logs[items - k] + k * math.log(p) + (items - k) * math.log(1 - p))


@pytest.mark.parametrize("items", [20, 50, 200, 1000])
def test_the_interval_of_a_share_covers_the_truth(items):
    """By exact sums over all outcomes; the interval is wrong in 8 % of cases at most, in 5 % on average."""
    intervals = np.array([wilson(k, items) for k in range(items + 1)]) / 100
    covered = []
    for p in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.96, 0.97, 0.98, 0.99, 0.9925, 0.995):
        inside = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
        covered.append(binomial(items, p)[inside].sum())
    assert min(covered) >= 0.92 and np.mean(covered) >= 0.945, (min(covered), np.mean(covered))


def test_wilson_as_published():
    assert wilson(200, 200) == pytest.approx((98.115, 100), abs=1e-3) and wilson(0, 30)[0] == 0
    assert wilson(10, 20) == pytest.approx((29.930, 70.070), abs=1e-3)   # statsmodels, method "wilson"
    assert wilson(0, 0) == (0, 0)
    for right in range(31):                                              # a mirror image
        assert wilson(right, 30) == pytest.approx([100 - side for side in wilson(30 - right, 30)[::-1]])
        low, high = wilson(right, 30)
        assert 0 <= low <= 100 * right / 30 <= high <= 100 and (low, high) != (100 * right / 30,) * 2


def test_mcnemar_is_the_exact_binomial_test():
    def p(first, second):
        return p_value(mean(first, "s", True), mean(second, "s", True))
    alike = [1] * 400 + [0] * 97
    assert p(alike + [0] * 3, alike + [1] * 3) == 0.25 and p(alike, alike) == 1
    assert p([1, 1, 1, 0], [0, 0, 0, 1]) == 0.625 and p([1, 0], [0, 1]) == 1
    scipy_stats = pytest.importorskip("scipy.stats")
    for gained, lost in ((14, 5), (40, 22), (0, 9), (300, 250)):
        expected = scipy_stats.binomtest(gained, gained + lost).pvalue
        assert p([0] * gained + [1] * lost, [1] * gained + [0] * lost) == pytest.approx(expected, rel=1e-9)


def test_equally_good_systems_are_told_apart_in_at_most_6_percent_of_2000_pairs():
    """Right or wrong, at accuracies of 60 %. Power against 60 and 75 %: see bench/significance.py."""
    draw, found = np.random.default_rng(1), {}
    for items in (20, 50, 200):
        both = draw.random((2000, 2, items)) < 0.6
        found[items] = np.mean([p_value(mean(a, "s", True), mean(b, "s", True)) < 0.05 for a, b in both])
    assert max(found.values()) <= 0.06 and found[200] >= 0.03, found


def corpus(seed: int, items: int = 400):
    """Statistics of two systems of one kind over the same sentences, {metric: (Score, Score)}."""
    draw = random.Random(seed)
    references = [" ".join(draw.choices("a one two red dog cat runs sleeps here now".split(), k=draw.randint(6, 16)))
                  for _ in range(items)]
    first, second = ([" ".join(word for word in r.split() if draw.random() > 0.25) for r in references]
                     for _ in range(2))
    return {"BLEU": [scorers.bleu(side, references) for side in (first, second)],
            "chrF": [scorers.chrf(side, references, 2) for side in (first, second)],
            "ROUGE": [scorers.rouge(side, references)["rougeL"] for side in (first, second)]}


@pytest.fixture(scope="module")
def population():
    return corpus(0)


@pytest.mark.parametrize("metric, items, pairs", [("BLEU", 20, 2000), ("BLEU", 200, 500), ("chrF", 50, 1000),
                                                  ("ROUGE", 20, 2000), ("ROUGE", 200, 2000)])
def test_the_randomisation_test_holds_its_level(population, metric, items, pairs, monkeypatch):
    """Which of two answers is whose is drawn, so that both systems are equally good. All sizes with 2,000 pairs, and
    the power: bench/significance.py."""
    monkeypatch.setattr(significance, "FLIPS", 200)
    both, draw = np.stack([score.statistics for score in population[metric]]), np.random.default_rng(2)
    rejected = 0
    for _ in range(pairs):
        chosen, swapped = draw.integers(both.shape[1], size=items), draw.integers(2, size=items)
        first, second = both[swapped, chosen], both[1 - swapped, chosen]
        rejected += p_value(*(Score("s", each, population[metric][0].reduce) for each in (first, second))) < 0.05
    assert 0.03 <= rejected / pairs <= max(0.06, 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / pairs)), rejected / pairs


@pytest.mark.parametrize("metric", ["BLEU", "chrF", "ROUGE"])
def test_intervals_of_corpus_scores_cover_the_truth(population, metric):
    """At 200 items of a large population, whose score is the truth: 93 to 97 %, give or take what 300 draws vary by."""
    score, draw = population[metric][0], np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        sample = Score("s", score.statistics[draw.integers(len(score.statistics), size=200)], score.reduce)
        covered += sample.interval[0] <= score.value <= sample.interval[1]
    assert 0.91 <= covered / 300 <= 0.985, covered / 300


def test_a_difference_is_found():
    few = [mean(f1, "f1") for f1 in ([0.125, 0.25, 0.5, 0.75], [0.25, 0.375, 0.625, 0.75])]
    assert p_value(*few) == 0.25 and p_value(few[0], few[0]) == 1           # 2 of the 8 swaps of three items
    better = mean(np.linspace(0.3, 0.8, 60), "f1")
    assert p_value(mean(np.linspace(0.1, 0.6, 60), "f1"), better) == 1 / (significance.FLIPS + 1)
    with pytest.raises(ValueError, match="same items"):
        p_value(scorers.bleu(["a"], ["a"]), scorers.chrf(["a"], ["a"]))


def test_means_over_languages_hold_their_level_and_cover_the_truth():
    """Six languages of 40 items whose true scores vary around 60 %, for both models alike."""
    draw, covered, rejected, runs = np.random.default_rng(4), 0, 0, 150
    for _ in range(runs):
        models = [[mean(draw.random(40) < p, "s", True) for p in np.clip(draw.normal(0.6, 0.12, 6), 0.02, 0.98)]
                  for _ in range(2)]
        found = over_languages(models[1], models[0])
        covered += found["low"] <= 60 <= found["high"]
        rejected += found["p"] < 0.05
    assert covered / runs >= 0.92 and rejected / runs <= 0.08, (covered / runs, rejected / runs)


def test_means_over_languages():
    found = over_languages(shares([40, 45, 50, 35]), shares([20, 25, 30, 15]))
    assert found["value"] == 85 and found["languages"] == 4 and found["p"] < 0.01
    assert found["low"] < 75 and 95 < found["high"] <= 100
    assert over_languages(shares([50, 50, 50]))["low"] < 99.9                # all right: doubt remains
    assert over_languages(shares([30]))["low"] == wilson(30, 50)[0]
    assert over_languages(shares([30]), shares([20]))["p"] == p_value(*shares([20, 30]))
    assert over_languages(shares([3, 5]), shares([3, 5]))["p"] == 1
    assert "p" not in over_languages(shares([3, 5]))
    wide, narrow = (over_languages(shares(right)) for right in ([5, 25, 45], [24, 25, 26]))
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])  # languages vary, not their items alone


def test_students_t_and_holm():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 4, 30):
        sizes = significance._student(freedom)
        assert sizes[950_000] == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.02)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])   # R, p.adjust
    assert holm([]) == [] and holm([0.9, 0.8]) == [1, 1]
