"""train_sft.py as a user runs it: on a model directory and files of records, and what it says to mistakes."""

import contextlib
import functools
import json
import random
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from minixllm.data.records import Instruction, record_files
from minixllm.demo.exact_match import describe, exact_match
from minixllm.errors import UserError
from minixllm.files import locked
from minixllm.generation import generate
from minixllm.models.llama import LlamaConfig
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.training import loop
from minixllm.weights.adapters import load
from minixllm.weights.hf_directory import build, initialise, save_model

import train_dpo
import train_sft

ANSWERS = {"deu": "Das ist die Zahl {}.", "fra": "Voici le nombre {}."}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model directory and a file of records that it can learn."""
    folder = tmp_path_factory.mktemp("files")
    rng = random.Random(0)
    records = [{"instruction": "Say the number.", "input": str(number), "output": answer.format(number),
                "language": language} for language, answer in ANSWERS.items() for number in rng.sample(range(1000), 60)]
    (folder / "data").mkdir()
    (folder / "data/records.jsonl").write_text("\n".join(map(json.dumps, records)))
    texts = [text for record in records for text in record.values()] + [train_sft.alpaca("", "x"), train_sft.alpaca("")]
    tokenizer = train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=400)
    model = build(LlamaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
                              num_hidden_layers=2, num_attention_heads=2))
    initialise(model, seed=0)
    save_model(model, folder / "model", tokenizer)
    return folder


def test_a_model_directory_and_records(files, tmp_path, capsys, torchrun):
    flags = ["--model", str(files / "model"), "--data", str(files / "data"), "--output", str(tmp_path / "run"),
             "--cache", str(tmp_path / "cache"), "--max-length", "256", "--batch-size", "4", "--micro-batch-size", "2",
             "--learning-rate", "0.01", "--warmup-steps", "2", "--eval-every", "4", "--dtype", "float32"]

    def held_out():
        rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        return [row["held_out"] for row in rows if "held_out" in row]

    train_sft.main([*flags, "--epochs", "2"])
    said = capsys.readouterr().out
    assert "memory: about" in said and "Say the number." in said and "tokens/character" in said
    start, (model, tokenizer) = load(files / "model")[0], load(tmp_path / "run/model")
    assert not torch.equal(model.embedding.weight, start.embedding.weight)
    assert {"loss", "loss/deu", "loss/fra"} == held_out()[0].keys()
    before = held_out()[-1]["loss"]
    assert before < held_out()[0]["loss"] - 0.5

    # two processes go on from there, and their samples are those of the model they leave
    done = torchrun(2, "train_sft.py", *flags, "--epochs", "3", "--resume")
    assert "resuming after step" in done.stdout and "epochs 2.0 -> 3.0" in done.stdout
    assert held_out()[-1]["loss"] < before
    model, tokenizer = load(tmp_path / "run/model")
    number, shown = re.search(r"Say the number\.\n(\d+)\n-> (.*)", done.stdout).groups()
    prompt = tokenizer.encode_prompt(train_sft.alpaca("Say the number.", number))
    answer = tokenizer.decode(generate(model, tokenizer, [prompt], 64)[0])
    assert answer and shown.startswith(answer.split("\n")[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_and_a_handful_of_records(files, tmp_path, dtype, capsys):
    """Sharded (bf16 over a bf16 base) or not, the merged model that answers at the end is the one saved."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((files / "data/records.jsonl").read_text().splitlines(True)[:8]))
    flags = ["--model", str(files / "model"), "--cache", str(tmp_path / "cache"), "--max-length", "256",
             "--lora-r", "4", "--batch-size", "1", "--learning-rate", "0.05", "--warmup-steps", "1", "--steps", "3",
             "--dtype", dtype]
    train_sft.main([*flags, "--data", str(few), "--output", str(tmp_path / "few")])  # too few to hold any out
    train_sft.main([*flags, "--data", str(files / "data"), "--output", str(tmp_path / "run")])
    model, tokenizer = load(tmp_path / "run/model", dtype=getattr(torch, dtype))
    shown = re.findall(r"Say the number\.\n(\d+)\n-> (.*)", capsys.readouterr().out)
    prompts = [tokenizer.encode_prompt(train_sft.alpaca("Say the number.", number)) for number, _ in shown]
    answers = [tokenizer.decode(ids) for ids in generate(model, tokenizer, prompts, 64, 128)]
    assert shown and all(text.startswith(answer.split("\n")[0]) for (_, text), answer in zip(shown, answers))


@pytest.mark.parametrize("argv, said", [
    (["--lora-r", "-1"], "--lora-r: found -1"),
    (["--seed", "-1"], "--seed: found -1, expected a whole number of at least 0 and at most 4,294,967,295"),
    (["--beta2", "1"], "--beta2: found 1"),
    (["--data", "x.json"], "--data without --model"),
    (["--model", "/nowhere", "--data", "x.json"], "/nowhere"),
    (["--model", "{files}/model"], "--model without --data"),
    (["--model", "{files}/model", "--data", "{files}"], "without .json or .jsonl files"),
    (["--model", "{files}/model", "--data", "/nowhere.json"], "/nowhere.json"),
    (["--held-out", "x.json"], "--held-out without --data"),
    (["--lr", "3"], "did you mean --learning-rate?"),
    (["--bach-size", "3"], "did you mean --batch-size?"),
])
def test_mistakes(files, tmp_path, argv, said):
    with pytest.raises(UserError) as error:
        train_sft.main([*(word.format(files=files) for word in argv), "--output", str(tmp_path)])
    assert said in str(error.value)


def test_what_a_run_does_not_replace_or_disturb(files, tmp_path):
    def refused(said, *flags, model=files / "model"):
        with pytest.raises(UserError, match=said):
            train_sft.main(["--model", str(model), "--data", str(files / "data"), *map(str, flags)])

    (tmp_path / "base").mkdir()
    (tmp_path / "base/model").symlink_to(files / "model")
    refused("is both --model and where --output .* leaves the trained model", "--output", tmp_path / "base",
            model=tmp_path / "base/model")
    refused("records.jsonl: found a file, expected --output to name a directory", "--output",
            files / "data/records.jsonl")
    refused("config.json: found a file, expected a Hugging Face model directory", "--output", tmp_path / "run",
            model=files / "model/config.json")
    (tmp_path / "arrow/train").mkdir(parents=True)
    (tmp_path / "arrow/dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "arrow/train/data-00000-of-00001.arrow").touch()
    refused("found an Arrow data set.* expected JSON", "--output", tmp_path / "run", "--data", tmp_path / "arrow")
    with locked(tmp_path / "alive/.lock"):
        refused("alive: another run is writing there", "--output", tmp_path / "alive", "--resume")
    (tmp_path / "arrow/dataset_dict.json").unlink()
    shutil.copy(files / "data/records.jsonl", tmp_path / "arrow")
    assert record_files([tmp_path / "arrow"]) == [tmp_path / "arrow/records.jsonl"]  # a cache below it matters not


def test_changed_weights_of_the_base_are_told(files, tmp_path, capsys):
    base = shutil.copytree(files / "model", tmp_path / "base")
    flags = ["--model", str(base), "--data", str(files / "data"), "--output", str(tmp_path / "run"), "--cache",
             str(tmp_path / "cache"), "--max-length", "256", "--batch-size", "4", "--lora-r", "2"]
    train_sft.main([*flags, "--steps", "1"])
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] += 0.01  # as merged adapters change it, neither first nor last
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    train_sft.main([*flags, "--steps", "2", "--resume"])
    assert re.search(r"resuming after step 1 .* base_weights [0-9a-f]{16} -> ", capsys.readouterr().out)


def test_lora_settings_without_a_rank_are_told(files, tmp_path, capsys):
    flags = ["--model", str(files / "model"), "--data", str(files / "data"), "--output", str(tmp_path / "run"),
             "--cache", str(tmp_path / "cache"), "--max-length", "256", "--batch-size", "4", "--steps", "1"]
    train_sft.main([*flags, "--lora-targets", "q_proj"])
    assert "every weight is trained: lora_alpha and lora_targets count only with --lora-r" in capsys.readouterr().out


@pytest.mark.parametrize("script, adapters, every_weight", [(train_sft, 1e-4, 2e-5), (train_dpo, 5e-4, 1e-6)])
def test_the_default_learning_rate_is_that_of_what_is_trained(script, adapters, every_weight):
    settings = functools.partial(script.Settings, model="m", data=["d"])
    assert settings(lora_r=8).learning_rate == adapters and settings().learning_rate == every_weight
    assert settings(lora_r=8, learning_rate=3e-3).learning_rate == settings(learning_rate=3e-3).learning_rate == 3e-3


def test_a_run_that_a_signal_ended_has_not_succeeded(files, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "stop_signals", lambda: contextlib.nullcontext([time.monotonic()]))
    flags = ["--model", str(files / "model"), "--data", str(files / "data"), "--output", str(tmp_path / "run"),
             "--cache", str(tmp_path / "cache"), "--max-length", "256", "--batch-size", "4", "--steps", "9"]
    assert train_sft.main(flags) == 130 and not (tmp_path / "run/model").exists()
    monkeypatch.undo()
    assert train_sft.main([*flags, "--resume"]) is None and (tmp_path / "run/model").exists()


def test_exact_match_is_a_mean_of_means():
    def record(language, kind, output):
        return Instruction("", "", output, language, {"kind": kind})

    records = [record("deu", "date", "a"), record("deu", "date", "b"), record("deu", "list", "c"),
               record("fra", "date", "d")]
    result = exact_match(records, ["a", "x", " c", "x"])
    assert result["by_language"] == {"deu": 75.0, "fra": 0.0}
    assert result["by_kind"] == {"date": 25.0, "list": 100.0}
    assert result["exact_match"] == 37.5 and result["languages"] == 2
    assert "37.5 % averaged over 2 languages (1 at 0)" in describe(result)
