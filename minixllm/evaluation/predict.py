"""Running a model over benchmark items: free answers and likelihoods, on any number of processes, resumable.

Whatever the model has computed for an item goes to a partial file at once, keyed by what it depends on: the model, the
prompt and the lengths allowed. An evaluation that was stopped goes on from there, also with other batches, on another
number of processes, or with more benchmarks. Items are sorted by length and cut into chunks, which are dealt to the
processes: the same items are computed together on any number of them, which in bf16 can decide a near tie.
"""

import hashlib
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minixllm import generation
from minixllm.errors import UserError
from minixllm.evaluation import answers
from minixllm.evaluation.benchmarks import Item

MAX_NEW_TOKENS = {"xlsum": 128}   # the paper's
CHOICE_TOKENS = 64                # of a free answer to a choice task; the paper's is 512
CHUNK = 128                       # items whose answers are generated in one call
SCORED, SCORED_TOKENS = 16, 4096  # items, and at most so many tokens, whose likelihoods one forward computes


@dataclass(frozen=True)
class Prediction:
    """What a model answered to an item, and how that is read."""

    item: Item
    prompt: str
    cut: int | None                   # characters of the item's body that did not fit; None: not even the rest fits
    answer: str | None                # raw; "" where nothing could be asked; None where no free answer was wanted
    parsed: str | None                # as `answers.parse` reads it
    logps: list[float] | None = None  # of each choice, where likelihoods were wanted and the prompt fits

    def line(self) -> dict:
        """What predictions.jsonl says of it."""
        item = self.item
        line = {"benchmark": item.benchmark, "column": item.column, "group": item.group, "language": item.language,
                "target": item.target, "id": item.id, "prompt": self.prompt, "answer": self.answer,
                "parsed": self.parsed, "reference": item.reference, "cut": self.cut}
        return line | ({"choices": list(item.choices), "logps": self.logps} if item.choices else {})


@dataclass(frozen=True)
class How:
    """How items are asked; None is told by the model, see `limits`. choices: "likelihood", "answers" or "both"."""

    choices: str = "both"
    max_new_tokens: int = 512
    choice_tokens: int = CHOICE_TOKENS
    max_length: int | None = None
    batch_tokens: int = generation.BATCH_TOKENS

    def answer_tokens(self, item: Item) -> int:
        """The longest answer to this item in tokens; 0 where none is generated."""
        if item.choices:
            return 0 if self.choices == "likelihood" else min(self.max_new_tokens, self.choice_tokens)
        return min(self.max_new_tokens, MAX_NEW_TOKENS.get(item.benchmark, self.max_new_tokens))


def limits(config, max_new_tokens: int, max_length: int | None = None) -> tuple[int, int]:
    """(the longest answer, the longest prompt and answer together), in tokens.

    Where max_length does not say, they are together as long as the model's max_position_embeddings, or 2048 where it
    has none (BLOOM), and an answer takes half of that at most: what is asked needs room too.
    """
    if max_length:
        return max_new_tokens, max_length
    room = getattr(config, "max_position_embeddings", 2048)
    return min(max_new_tokens, room // 2), room


def predict(model, tokenizer, items: list[Item], world, folder, how: How = How()) -> list[Prediction]:
    """A prediction for each item, in their order, on every process; the model is whole on each.

    folder: where partial results are kept until `forget`. Raises UserError for an item that cannot be asked, and says
    on KeyboardInterrupt how many are kept.
    """
    longest, room = limits(model.config, how.max_new_tokens, how.max_length)
    tokens = [min(longest, how.answer_tokens(item)) for item in items]
    keys = [_hash(item.prompt(), item.choices, new, room) for item, new in zip(items, tokens)]
    partial = Partial(folder, _fingerprint(model, tokenizer), world)
    work = dict(zip(keys, zip(items, tokens)))                    # items that are asked alike are asked once
    order = sorted(work, key=lambda key: (work[key][1], -len(work[key][0].prompt())))
    chunks = [order[start:start + CHUNK] for start in range(0, len(order), CHUNK)]
    left = [chunk for chunk in chunks
            if any(partial.lacks(key, what) for key in chunk for what in _wanted(*work[key], how.choices))]
    mine = left[world.rank::world.size]
    with partial, tqdm(total=sum(map(len, mine)), unit="item", disable=not world.first, desc=Path(folder).name) as bar:
        for chunk in mine:
            _chunk(model, tokenizer, {key: work[key] for key in chunk}, partial, room, how, bar)
    found = partial.gather()
    return [prediction(item, found[key], new) for item, key, new in zip(items, keys, tokens)]


def prediction(item: Item, found: dict, new: int) -> Prediction:
    """From what a partial file holds of an item whose answer has at most `new` tokens."""
    cut, body = found.get("cut", 0), len(item.fields[item.body]) if item.body else 0
    prompt = item.prompt(0 if cut is None else body - cut)
    answer = found.get("answer", "") if new else None
    parsed = None if answer is None else answers.parse(item, answer, prompt)
    return Prediction(item, prompt, cut, answer, parsed, found.get("logps"))


class Partial:
    """The partial results of one model: {key of an item: {"cut": ..., "answer": ..., "logps": ...}}, what there is.

    Every process appends to a file of its own, and reads those of all when it starts: a collective, as `gather` is.
    """

    def __init__(self, folder, fingerprint: tuple, world):
        self.folder, self.world, self.found = Path(folder), world, {}
        self.name = f".partial-{_hash(*fingerprint)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = [line for file in sorted(self.folder.glob(f"{self.name}-*.jsonl")) for line in _whole_lines(file)]
        for line in itertools.chain(*world.gather(mine)):
            self.found.setdefault(line.pop("key"), {}).update(line)

    def lacks(self, key: str, what: str) -> bool:
        found = self.found.get(key, {})
        return what not in found and found.get("cut", 0) is not None

    def keep(self, key: str, **found) -> None:
        self.found.setdefault(key, {}).update(found)
        self.file.write(json.dumps({"key": key, **found}) + "\n")
        self.file.flush()                                         # a kill can then take nothing of it

    def gather(self) -> dict[str, dict]:
        for share in self.world.gather(self.found):
            for key, found in share.items():
                self.found.setdefault(key, {}).update(found)
        return self.found

    def __enter__(self):
        self.file = open(self.folder / f"{self.name}-{self.world.rank}.jsonl", "a", encoding="utf-8")

    def __exit__(self, kind, *_):
        self.file.close()
        if kind is KeyboardInterrupt and self.world.first:
            kept = {line["key"] for file in self.folder.glob(f"{self.name}-*.jsonl") for line in _whole_lines(file)}
            print(f"\nstopped: {len(kept)} items of {self.folder.name} are kept, the same command goes on from there",
                  file=sys.stderr)


def forget(folder) -> None:
    """Remove the partial results of an evaluation whose report is written."""
    for file in Path(folder).glob(".partial-*.jsonl"):
        file.unlink()


def _whole_lines(file: Path) -> list[dict]:
    """The records of a partial file; a last line that a kill cut short is removed, or the next would be glued to it."""
    data = file.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(file, "r+b") as torn:
            torn.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _hash(*parts) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _fingerprint(model, tokenizer) -> tuple:
    """Changes with the weights: their sums cost little beside a forward. Raises UserError for weights with NaN."""
    weights = [(name, str(p.dtype), p.double().sum().item()) for name, p in model.named_parameters()]
    if broken := [name for name, _, total in weights if not math.isfinite(total)]:
        raise UserError(f"{broken[0]} holds infinite numbers or NaN: nothing that such a model answers counts")
    return tokenizer.fingerprint, repr(model.config), weights


def _wanted(item: Item, new: int, choices: str) -> list[str]:
    return ["answer"] * bool(new) + ["logps"] * bool(item.choices and choices != "answers")


def _chunk(model, tokenizer, work: dict[str, tuple[Item, int]], partial: Partial, room: int, how: How, bar) -> None:
    """Likelihoods and answers of one chunk, {key: (item, tokens of its answer)}, as far as `partial` lacks them."""
    contexts, scored, asked = {}, [], []
    for key, (item, new) in work.items():
        wanted = _wanted(item, new, how.choices)
        choices = [tokenizer.encode(choice) for choice in item.choices] if "logps" in wanted else []
        if not all(choices):
            raise UserError(f"{item.column} {item.group} {item.id}: a choice gives no token: it has no likelihood")
        context, _, cut = fit(tokenizer, item, room - max([new, *map(len, choices)]))
        partial.keep(key, cut=cut) if key not in partial.found else None
        contexts[key] = context, choices
        scored += [key] * ("logps" in wanted and cut is not None)
        asked += [key] * ("answer" in wanted and partial.lacks(key, "answer"))
    for start in range(0, len(scored), SCORED):                   # a batch is computed whole or not at all, see above
        batch = scored[start:start + SCORED]
        if any(partial.lacks(key, "logps") for key in batch):
            found = generation.choice_logps(model, [contexts[key] for key in batch],
                                            min(how.batch_tokens, SCORED_TOKENS))
            for key, logps in zip(batch, found):
                partial.keep(key, logps=logps)
    bar.update(len(work) - len(asked))
    for new, group in itertools.groupby(asked, lambda key: work[key][1]):
        group = list(group)

        def finished(i, ids):
            partial.keep(group[i], answer=tokenizer.decode(ids))
            bar.update()

        def until(i, ids):
            """Whether what may follow is no longer read: another turn has begun. (A repeated prompt, which is the
            exception, does not fit in what is left.)"""
            if not work[group[i]][0].choices or new - len(ids) >= len(contexts[group[i]][0]):
                return False
            answer = tokenizer.decode(ids)
            return answers.clean(answer) == answers.clean(f"{answer} x")

        generation.generate(model, tokenizer, [contexts[key][0] for key in group], new,
                            batch_tokens=how.batch_tokens, finished=finished, until=until)


def fit(tokenizer, item: Item, room: int) -> tuple[list[int], str, int | None]:
    """(prompt ids, prompt, characters cut): the body's end is cut until the prompt has `room` tokens or fewer.

    Never the instruction: where that alone is too long, the third is None.
    """
    def attempt(kept=None):
        prompt = item.prompt(kept)
        return tokenizer.encode_prompt(prompt), prompt

    ids, prompt = attempt()
    if len(ids) <= room:
        return ids, prompt, 0
    whole = len(item.fields[item.body]) if item.body else 0
    low, high = 0, whole                                # the longest body that fits is found by halving
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(attempt(middle)[0]) <= room else (low, middle - 1)
    ids, prompt = attempt(low)
    return ids, prompt, whole - low if len(ids) <= room else None
