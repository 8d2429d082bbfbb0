"""How often tests and intervals are wrong, and what they find: python -m bench.significance [pairs]

Two systems leave out words of NTREX's first 500 Norwegian sentences (MINIXLLM_TEST_DATA names the folder that holds
ntrex/), 30 % each. Equal pairs: which system gave which of the two texts is drawn for each sentence, so that neither is
better. Unequal: the second leaves out 34 %. Right-or-wrong items: 60 % right both, and 60 against 70 %.
"""

import os
import random
import sys
from pathlib import Path

import numpy as np

from minixllm.evaluation import scorers, significance
from minixllm.evaluation.significance import Score, mean, p_value


def main() -> None:
    pairs, significance.FLIPS = int(sys.argv[1]) if len(sys.argv) > 1 else 2000, 500
    references = (Path(os.environ["MINIXLLM_TEST_DATA"]) / "ntrex/nob.txt").read_text("utf-8").splitlines()[:500]

    def without(rate, seed):
        draw = random.Random(seed)
        return [" ".join(word for word in line.split() if draw.random() > rate) for line in references]

    systems = [without(0.3, 1), without(0.3, 2), without(0.34, 3)]
    metrics = {"BLEU": lambda texts: scorers.bleu(texts, references),
               "chrF++": lambda texts: scorers.chrf(texts, references, 2),
               "ROUGE-1": lambda texts: scorers.rouge(texts, references)["rouge1"]}
    draw = np.random.default_rng(0)
    print(f"{'':10}{'items':>6}{'equal pairs told apart':>24}{'unequal':>10}{'interval covers':>17}")
    for name, metric in metrics.items():
        first, second, worse = (metric(texts) for texts in systems)
        both = np.stack([first.statistics, second.statistics])

        def sample(statistics):
            return Score("sample", statistics, first.reduce)

        for items in (20, 50, 200):
            level, power, covered = [], [], []
            for number in range(pairs):
                chosen, swapped = draw.integers(len(references), size=items), draw.integers(2, size=items)
                one = sample(both[swapped, chosen])
                level.append(p_value(one, sample(both[1 - swapped, chosen])) < 0.05)
                if number % 4 == 0:
                    power.append(p_value(sample(first.statistics[chosen]), sample(worse.statistics[chosen])) < 0.05)
                    low, high = sample(first.statistics[chosen]).interval
                    covered.append(low <= first.value <= high)
            print(f"{name:10}{items:6}{np.mean(level):24.1%}{np.mean(power):10.0%}{np.mean(covered):17.1%}", flush=True)
    for items in (20, 50, 200, 1000):
        def share(right):
            return mean(draw.random(items) < right, "sample", is_share=True)

        level = np.mean([p_value(share(0.6), share(0.6)) < 0.05 for _ in range(pairs)])
        power = np.mean([p_value(share(0.6), share(0.7)) < 0.05 for _ in range(pairs)])
        covered = {p: np.mean([low <= 100 * p <= high for low, high in (share(p).interval for _ in range(pairs))])
                   for p in (0.5, 0.9, 0.99, 0.995)}
        print(f"{'accuracy':10}{items:6}{level:24.1%}{power:10.0%}  "
              + ", ".join(f"{of:.1%} at {p}" for p, of in covered.items()), flush=True)


if __name__ == "__main__":
    main()
