"""Mutated inputs for every reader of files: each must be read, or refused by one line for the user.

    python -m bench.fuzz [--cases 10000] [--seed 0] [--readers NAME ...]

Good files are made, and one of them is changed for each case: bytes flipped, cut out, doubled or put in, or a value of
its JSON replaced by an odd one. What is read from a model's directory must also be saved again, for a training that
ends with it. Cases run in processes of their own: a crash or 20 seconds without an end count as faults, too. The same
seed gives the same cases. Prints a row a reader, and the first case of each kind of fault.
"""

import argparse
import collections
import json
import multiprocessing
import random
import shutil
import signal
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from minixllm import settings
from minixllm.building import instructions
from minixllm.data import records
from minixllm.errors import UserError
from minixllm.evaluation import benchmarks, report, templates
from minixllm.models.llama import LlamaConfig
from minixllm.models.lora import LoraSettings, add_lora, initialise
from minixllm.tokenizers import load_tokenizer
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.training import checkpoints
from minixllm.training.loop import adamw
from minixllm.training.settings import TrainingSettings
from minixllm.weights import adapters, hf_directory, safetensors_files

SIZE = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64)
TEXTS = ["The river flows past the old house.", "Der Fluss fließt am Haus vorbei.", "नदी बहती है।", "河水流过。"] * 5
ODD = [None, True, -1, 0, 1, 1.5, 1e308, 10**400, float("nan"), float("inf"), "", "x", "\ud83d", "\x00", "a" * 5000, [],
       {}, [[]], [1, "a", None], {"a": {"b": []}}, "DEEP", "DEEPER"]
ASKED = {"mode": "generating", "templates": "as shipped", "choices": "both"}
SNIPPETS = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n\n", b'"', b"{", b"]", b"\\ud800", b"1e999", b"NaN",
            b"\xed\xa0\x80", b"[" * 2000, b"9" * 5000, b"\t", b"\xe2\x80\xa8"]


# -- good files -----------------------------------------------------------------------------------------------------


def good_files(folder: Path) -> None:
    """A directory of good files for each reader."""
    pair = {"instruction": "Say it.", "input": "", "output": "Ja."}
    write(folder / "records/a.jsonl", *[json.dumps(pair | {"language": code, "id": code}) for code in ("deu", "pt-BR")])
    write(folder / "records/b.json", json.dumps([pair, {"messages": [{"role": "user", "content": "a"},
                                                                     {"role": "assistant", "content": "b"}]}]))
    write(folder / "preferences/a.jsonl", *[json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})] * 2,
          json.dumps({"instruction": "a", "input": "", "prefered_output": "b", "rejected_output": "c"}))
    write(folder / "recipe/r.toml", "data = ['a.jsonl']", "max_new_tokens = 5", "temperature = 0.5",
          "languages = ['deu']")
    own = Path(templates.__file__).with_name("instructions.toml")
    write(folder / "templates/t.toml", own.read_text(encoding="utf-8"))
    write(folder / "pawsx/de/test_2k.tsv", "id\tsentence1\tsentence2\tlabel",
          *[f"{i}\ta b\tb a\t{i % 2}" for i in range(3)])
    write(folder / "xcopa/test.et.jsonl", *[json.dumps({"premise": "A.", "choice1": "b", "choice2": "c", "label": 1,
                                                        "question": "cause", "idx": i}) for i in range(3)])
    write(folder / "flores/eng.devtest", *TEXTS[:3])
    write(folder / "flores/deu.devtest", *TEXTS[:3])
    write(folder / "xlsum/german_test.jsonl", json.dumps({"id": "1", "url": "u", "title": "t", "summary": "s",
                                                          "text": "x"}))
    entry = {"bleu": 50.0, "chrf": 60.0, "answers": "translated", "records": 3, "failed": 0, "left_out": {"loop": 1}}
    write(folder / "report/report.json", json.dumps({"deu": entry, "mri": entry}))
    model, lora = folder / "directory", LoraSettings(lora_r=2)
    tokenizer = train_sentencepiece(TEXTS, folder / "sp.model", 400)
    network = hf_directory.build(LlamaConfig(vocab_size=tokenizer.vocab_size, **SIZE))
    hf_directory.initialise(network, 0)
    hf_directory.save_model(network, model, tokenizer)
    add_lora(network, lora)
    initialise(network, 0)
    adapters.save_adapter(network, folder / "adapter", lora, base=str(model))
    shutil.copytree(model, folder / "header")
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(TEXTS, BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    write(folder / "tokenizer/tokenizer.json", bpe.to_str())
    write(folder / "tokenizer/tokenizer_config.json", json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    cells = {"de": {"items": 3, "metrics": {"acc": [50.0, 40.0, 60.0]}}}
    write(folder / "results/results.json", json.dumps({"benchmarks": {"XCOPA": {
        "main": "acc", "settings": ASKED, "notes": [], "models": {"m": {"groups": cells}}}}}))
    world = SimpleNamespace(first=True, gather=lambda value: [value])
    checkpoints.save(folder / "run", *model_in_training(), world, 1, {"training": "SFT", "batch_size": 8}, keep=1)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def model_in_training():
    model = hf_directory.build(LlamaConfig(vocab_size=97, **SIZE))
    hf_directory.initialise(model, 0)
    optimizer = adamw([*model.parameters()], TrainingSettings())
    for parameter in model.parameters():
        optimizer.state[parameter] = {moment: torch.zeros_like(parameter) for moment in checkpoints.MOMENTS}
    return model, optimizer


# -- readers --------------------------------------------------------------------------------------------------------


def read_directory(folder: Path) -> None:
    model, tokenizer = adapters.load(folder)
    tokenizer.decode(tokenizer.encode("Ja, नदी 1."))
    with tempfile.TemporaryDirectory() as target:
        hf_directory.save_model(model, Path(target) / "saved", tokenizer, hf_directory.read_generation_config(folder))


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("Ja, नदी 1."))


READERS = {
    "records": lambda folder: [list(records.read_instructions(file)) for file in records.record_files([folder])],
    "preferences": lambda folder: [list(records.read_preferences(file)) for file in records.record_files([folder])],
    "recipe": lambda folder: settings.parse(instructions.InstructionSettings, ["--config", str(folder / "r.toml")]),
    "templates": lambda folder: templates.read_templates(folder / "t.toml"),
    **dict.fromkeys(("pawsx", "xcopa", "flores", "xlsum"), lambda folder: benchmarks.read(folder, benchmarks.Wanted())),
    "report": instructions.earlier_report,
    "directory": read_directory,
    "adapter": adapters.load,
    "tokenizer": read_tokenizer,
    "results": lambda folder: report.check_output(folder, [], [], ASKED),
    "run": lambda folder: checkpoints.load(checkpoints.latest(folder), *model_in_training(), {"training": "SFT"}),
    "header": lambda folder: [stored.read() for stored in safetensors_files.find_tensors(folder).values()],
}
ONLY = {"header": ("*.safetensors",), "directory": ("*.json", "tokenizer.model"), "adapter": ("adapter_*",),
        "run": ("run.json",)}


# -- mutations ------------------------------------------------------------------------------------------------------


def mutate(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        try:
            return mutated_json(content, rng)
        except (ValueError, UnicodeDecodeError, RecursionError):
            pass
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        i, j = sorted(rng.randrange(min(len(content), rng.choice((64, 4096, 1 << 30))) + 1) for _ in range(2))
        content = rng.choice((
            content[:i] + bytes([rng.randrange(256)]) + content[i + 1:], content[:i] + content[j:], content[:i],
            content[:j] + content[i:], content[:i] + rng.choice(SNIPPETS) + content[i:]))
    return content


def mutated_json(content: bytes, rng: random.Random) -> bytes:
    """With one value of one of its lines replaced, taken out, doubled or under another key."""
    lines = content.decode().splitlines()
    try:
        at, value = 0, json.loads(content)
        lines = [""]
    except ValueError:
        at = rng.randrange(len(lines))
        value = json.loads(lines[at])
    parents, stack = [], [value]
    while stack:
        node = stack.pop()
        if isinstance(node, (dict, list)) and node:
            parents.append(node)
            stack.extend(node.values() if isinstance(node, dict) else node)
    if not parents:
        raise ValueError
    node = rng.choice(parents)
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    odd = rng.choice(ODD)
    if (what := rng.random()) < 0.75:
        node[key] = odd
    elif what < 0.9:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(("", "\n", "x" * 3000, "id", "language"))] = odd
    text = json.dumps(value)
    for name, depth in (("DEEPER", 100_000), ("DEEP", 400)):
        text = text.replace(f'"{name}"', "[" * depth + "]" * depth)
    lines[at] = text
    return "\n".join(lines).encode()


# -- the campaign ---------------------------------------------------------------------------------------------------


def case(name: str, good: Path, scratch: Path, seed: int, number: int) -> tuple[str, str]:
    """("read" | "refused" | "fault", where and what) of one case."""
    rng = random.Random(f"{seed} {name} {number}")
    folder = scratch / str(number)  # each case has its own path, for a reader may remember what it read
    shutil.copytree(good / name, folder)
    found = [file for pattern in ONLY.get(name, ("*",)) for file in folder.rglob(pattern)]
    file = rng.choice(sorted(file for file in found if file.is_file()))
    file.write_bytes(mutate(file.read_bytes(), rng))
    try:
        READERS[name](folder)
    except UserError as error:
        short = "\n" not in str(error) and len(str(error)) <= 300
        return ("refused", "") if short else ("fault", f"{file.name}: message {str(error)[:300]!r}")
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if "minixllm" in frame.filename), frames[-1])
        return "fault", f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno} ({str(error)[:100]!r})"
    finally:
        shutil.rmtree(folder)
    return "read", ""


def work(name: str, good: Path, seed: int, numbers: range, channel) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for number in numbers:
            channel.send((number, "start", ""))
            signal.alarm(20)
            channel.send((number, *case(name, good, Path(scratch), seed, number)))
            signal.alarm(0)


def campaign(name: str, good: Path, seed: int, count: int) -> list[tuple[int, str, str]]:
    """(number, outcome, what) of all cases; a process that dies is a fault, and another goes on behind it."""
    outcomes, first = [], 0
    while first < count:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.Process(target=work, args=(name, good, seed, range(first, count), theirs))
        child.start()
        theirs.close()
        try:
            while True:
                number, outcome, what = ours.recv()
                first = number + 1
                if outcome != "start":
                    outcomes.append((number, outcome, what))
        except EOFError:
            child.join()
        if child.exitcode:
            outcomes.append((first - 1, "fault", f"the process ended with {child.exitcode}"))
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="in all, alike for all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    args = parser.parse_args()
    kinds = collections.defaultdict(list)
    print("| reader | cases | read | refused | faults |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as good:
        good_files(Path(good))
        for name in args.readers:
            outcomes = campaign(name, Path(good), args.seed, -(-args.cases // len(args.readers)))
            counts = collections.Counter(outcome for _, outcome, _ in outcomes)
            print(f"| {name} | {len(outcomes):,} | {counts['read']:,} | {counts['refused']:,} | {counts['fault']} |",
                  flush=True)
            for number, outcome, what in outcomes:
                if outcome == "fault":
                    kinds[name, what.split(" (")[0]].append((number, what))
    for (name, _), found in kinds.items():
        print(f"{name}, {len(found)} times, first case {found[0][0]}: {found[0][1]}")
    raise SystemExit(bool(kinds))


if __name__ == "__main__":
    main()
