"""Running a model over benchmark items: free answers and likelihoods, on any number of processes, resumable.

Items are sorted by length and cut into chunks, which are dealt to the processes. A finished chunk is one line of a
partial file, so that an evaluation killed at any moment goes on with the chunks it lacks. As a chunk always holds the
same items, the predictions come out the same.
"""

import hashlib
import json
import math
from pathlib import Path

from tqdm import tqdm

from minixllm import generation
from minixllm.errors import UserError
from minixllm.evaluation import answers
from minixllm.evaluation.benchmarks import Item

MAX_NEW_TOKENS = {"xlsum": 128}   # the paper's; 512 for all others
CHUNK = 128                       # items; at most one chunk a process is lost by a kill


def predict(model, tokenizer, items: list[Item], world, folder, batch_tokens: int = generation.BATCH_TOKENS,
            max_new_tokens: int = 512, max_length: int | None = None) -> list[dict]:
    """A prediction for each item, in their order, on every process; the model is whole on each.

    max_new_tokens, max_length: see `limits`.
    folder: where partial results are kept until `forget`. Raises UserError for an item that cannot be asked.
    A prediction holds what the item is, `prompt`, `answer` (raw), `parsed`, `cut` (characters of the body that did not
    fit max_length; None where the prompt does not fit even without) and for choices `logps` of each.
    """
    folder = Path(folder)
    max_new_tokens, room = limits(model.config, max_new_tokens, max_length)
    settings = repr((_fingerprint(model, tokenizer), batch_tokens, max_new_tokens, room, items))
    key = hashlib.sha256(settings.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    done = {}
    for share in world.gather(_read_partial(folder, key)):
        done |= share
    order = sorted(range(len(items)), key=lambda i: (items[i].benchmark in MAX_NEW_TOKENS, -len(items[i].prompt())))
    chunks = [order[start:start + CHUNK] for start in range(0, len(order), CHUNK)]
    mine = [chunk for chunk in chunks if not done.keys() >= set(chunk)][world.rank::world.size]
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / f".partial-{key}-{world.rank}.jsonl", "a", encoding="utf-8") as partial,
          tqdm(total=sum(map(len, mine)), unit="item", disable=not world.first, desc=folder.name) as progress):
        for chunk in mine:
            predictions = _answer(model, tokenizer, [items[i] for i in chunk], batch_tokens, max_new_tokens, room,
                                  progress)
            found = dict(zip(chunk, predictions))
            partial.write(json.dumps(found, ensure_ascii=False) + "\n")
            partial.flush()
            done |= found
    for share in world.gather({i: done[i] for chunk in mine for i in chunk}):
        done |= share
    return [done[i] for i in range(len(items))]


def limits(config, max_new_tokens: int, max_length: int | None = None) -> tuple[int, int]:
    """(the longest answer, the longest prompt and answer together), in tokens.

    Where max_length does not say, they are together as long as the model's max_position_embeddings, or 2048 where it
    has none (BLOOM), and an answer takes half of that at most: what is asked needs room too.
    """
    if max_length:
        return max_new_tokens, max_length
    room = getattr(config, "max_position_embeddings", 2048)
    return min(max_new_tokens, room // 2), room


def forget(folder) -> None:
    """Remove the partial results of an evaluation whose report is written."""
    for file in Path(folder).glob(".partial-*.jsonl"):
        file.unlink()


def _read_partial(folder: Path, key: str) -> dict[int, dict]:
    done = {}
    for file in sorted(folder.glob(f".partial-{key}-*.jsonl")):
        whole = file.read_bytes()
        whole = whole[:whole.rfind(b"\n") + 1]
        if len(whole) < file.stat().st_size:           # a chunk cut short by a kill
            with open(file, "r+b") as torn:
                torn.truncate(len(whole))
        for line in whole.decode("utf-8").split("\n")[:-1]:        # splitlines would cut at U+2028 in an answer
            done |= {int(i): prediction for i, prediction in json.loads(line).items()}
    return done


def _fingerprint(model, tokenizer) -> tuple:
    """Changes with the weights: their sums are cheap beside one forward. Raises UserError for what no numbers are."""
    weights = [(name, str(p.dtype), p.double().sum().item()) for name, p in model.named_parameters()]
    if broken := [name for name, _, total in weights if not math.isfinite(total)]:
        raise UserError(f"{broken[0]} holds infinite numbers or NaN: nothing that such a model answers counts")
    return tokenizer.fingerprint, repr(model.config), weights


def _answer(model, tokenizer, items: list[Item], batch_tokens: int, max_new_tokens: int, room: int,
            progress) -> list[dict]:
    """The predictions of one chunk."""
    new_tokens = [min(max_new_tokens, MAX_NEW_TOKENS.get(item.benchmark, max_new_tokens)) for item in items]
    predictions, contexts = [], []
    for item, new in zip(items, new_tokens):
        choices = [tokenizer.encode(choice) for choice in item.choices]
        if not all(choices):
            raise UserError(f"{item.column} {item.group} {item.id}: a choice gives no token: it has no likelihood")
        context, prompt, cut = fit(tokenizer, item, room - max([new, *map(len, choices)]))
        contexts.append((context, choices))
        predictions.append({
            "benchmark": item.benchmark, "column": item.column, "group": item.group, "language": item.language,
            "target": item.target, "id": item.id, "prompt": prompt, "answer": "", "parsed": None,
            "reference": item.reference, "cut": cut})
        if item.choices:
            predictions[-1] |= {"choices": list(item.choices), "logps": None}

    asked = [i for i, prediction in enumerate(predictions) if prediction["cut"] is not None]
    progress.update(len(items) - len(asked))
    for new in sorted(set(new_tokens)):
        group = [i for i in asked if new_tokens[i] == new]
        continuations = generation.generate(model, tokenizer, [contexts[i][0] for i in group], new,
                                            batch_tokens=batch_tokens, finished=lambda *_: progress.update())
        for i, ids in zip(group, continuations):
            predictions[i]["answer"] = tokenizer.decode(ids)
    scored = [i for i in asked if items[i].choices]
    for i, logps in zip(scored, generation.choice_logps(model, [contexts[i] for i in scored])):
        predictions[i]["logps"] = logps
    for item, prediction in zip(items, predictions):
        prediction["parsed"] = answers.parse(item, prediction["answer"], prediction["prompt"])
    return predictions


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
