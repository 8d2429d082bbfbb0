"""Seconds to score a whole benchmark file, against sacrebleu and XL-Sum's ROUGE: python -m bench.scoring [sentences]

Needs the packages of the extra `test`. Both sides score the same texts in one process, interleaved; the best of three.
"""

import random
import sys
import time

import sacrebleu
from multilingual_rouge.rouge_scorer import RougeScorer

from minixllm.evaluation import scorers


def texts(count: int, words: int, seed: int) -> tuple[list[str], list[str]]:
    """References over a vocabulary with Zipf's frequencies, and hypotheses with a third of the words changed."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    references = [draw.choices(vocabulary, weights, k=draw.randint(words // 2, words * 3 // 2)) for _ in range(count)]
    hypotheses = [[draw.choice(vocabulary) if draw.random() < 1 / 3 else word for word in r] for r in references]
    return [" ".join(h) + "." for h in hypotheses], [" ".join(r) + "." for r in references]


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1012            # the sentences of FLORES' devtest
    sentences, summaries = texts(count, 24, 0), texts(count, 60, 1)
    xlsum = RougeScorer(["rouge1", "rouge2", "rougeL"])

    def rouge_1(hypotheses, references):
        return scorers.rouge(hypotheses, references)["rouge1"].value

    def their_rouge_1(hypotheses, references):
        return 100 * sum(xlsum.score(r, h)["rouge1"].fmeasure for h, r in zip(hypotheses, references)) / len(hypotheses)

    def half_width(hypotheses, references):
        low, high = scorers.bleu(hypotheses, references).interval
        return (high - low) / 2

    def their_half_width(hypotheses, references):
        return sacrebleu.BLEU(force=True).corpus_score(hypotheses, [references], n_bootstrap=1000)._ci

    def fresh_bleu(h, r):                       # sacrebleu caches tokenised lines: a new object has nothing cached
        return sacrebleu.BLEU(force=True).corpus_score(h, [r]).score

    rows = {
        "BLEU 13a": (lambda h, r: scorers.bleu(h, r).value, fresh_bleu, sentences),
        "chrF++": (lambda h, r: scorers.chrf(h, r, 2).value,
                   lambda h, r: sacrebleu.CHRF(word_order=2).corpus_score(h, [r]).score, sentences),
        "BLEU, 95 % interval": (half_width, their_half_width, sentences),
        "ROUGE-1, 2 and L": (rouge_1, their_rouge_1, summaries),
    }
    print(f"{count} sentences of 24 words, summaries of 60")
    print(f"{'':22}{'ours, s':>10}{'theirs, s':>11}{'ratio':>8}{'ours':>9}{'theirs':>9}")
    for name, (ours, theirs, pair) in rows.items():
        best, values = [float("inf")] * 2, [0.0, 0.0]
        for _ in range(3):
            for side, function in enumerate((ours, theirs)):
                start = time.perf_counter()
                values[side] = function(*pair)
                best[side] = min(best[side], time.perf_counter() - start)
        print(f"{name:22}{best[0]:10.3f}{best[1]:11.3f}{best[1] / best[0]:8.1f}{values[0]:9.4f}{values[1]:9.4f}")


if __name__ == "__main__":
    main()
