"""What a dry run says: how much a build would ask of which service, counted on a sample of its records."""

import itertools
import random
from collections import Counter

from minixllm.building.services import Translate

SAMPLE = 500  # records


class Estimate:
    """What a build would ask, without asking: `ask` counts, and answers with a text of a likely length.

    Translations are taken to be as long as their originals, answers to have `answer` characters and all to differ, and
    tokens three characters: English has four to five of them, most other languages two to four.
    """

    def __init__(self, answer: int, times: float = 1):
        self.answers, self.times = (f"{i:{answer}}" for i in itertools.count()), times  # that one request stands for
        self.counts = Counter()  # {(service, unit): amount}

    def ask(self, service, request) -> str:
        if not request.text.strip():
            return ""
        cost, translated = service.cost(request), isinstance(request, Translate)
        answer = request.text if translated else next(self.answers)
        if "tokens" in cost:
            sent = len(request.text) if translated else len(request.text) + len(request.input) + len(request.system)
            cost["tokens"] = (sent + 60 + len(answer)) // 3
        self.counts.update({(service.name, unit): amount * self.times for unit, amount in cost.items()})
        return answer


def sampled(items, total: int, most: int, seed: int) -> list:
    """At most `most` of the `total` items, drawn by the seed, in their order."""
    chosen = set(random.Random(seed).sample(range(total), min(most, total)))
    return [item for number, item in enumerate(items) if number in chosen]


def amounts(low: Counter, high: Counter) -> list[str]:
    """A line for each service and unit of two counts: from the smaller to the larger."""
    lines = []
    for name, unit in low | high:
        least, most = sorted(round(counts[name, unit]) for counts in (low, high))
        lines.append(f"{name}: {least:,} to {most:,} {unit}" if least < most else f"{name}: {least:,} {unit}")
    return lines
