"""What runs on a GPU gives what a CPU gives. On a GPU where MINIXLLM_TEST_CUDA=1 asks for it,

    MINIXLLM_TEST_CUDA=1 python -m pytest tests/test_cuda.py

and otherwise on one that is pretended (`pretend_cuda`), which shows that every tensor is where it should be.
"""

import contextlib
import json
import random
import shutil
from unittest import mock

import pytest
import torch

from minixllm import distributed, generate, plots
from minixllm.data.datasets import Instructions
from minixllm.data.stream import collate
from minixllm.data.token_cache import TokenCache
from minixllm.models.bloom import Bloom, BloomConfig
from minixllm.models.llama import Llama, LlamaConfig
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.training.losses import sft_loss
from minixllm.weights.adapters import load
from minixllm.weights.hf_directory import initialise, save_model

import eval as evaluation_script
import train_dpo
import train_sft
from conftest import REAL_GPU
from pretend_cuda import pretend_cuda

WORDS = "red green blue one two three four five cat dog bird fish runs sleeps sings".split()
FLAGS = ["--batch-size", "6", "--micro-batch-size", "2", "--steps", "4", "--warmup-steps", "1",
         "--held-out-per-language", "3", "--save-every", "2", "--eval-every", "2", "--learning-rate", "0.01",
         "--dtype", "float32"]


@contextlib.contextmanager
def cpu():
    with mock.patch("torch.cuda.is_available", lambda: False):
        yield


gpu = contextlib.nullcontext if REAL_GPU else pretend_cuda


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tiny models that sit on one tokenizer, instructions and preferences."""
    assert torch.cuda.is_available() or not REAL_GPU
    folder, rng = tmp_path_factory.mktemp("files"), random.Random(0)

    def say(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    tokenizer = train_sentencepiece([say(9, 9) for _ in range(300)], folder / "tokenizer.model", vocab_size=300)
    size = {"vocab_size": tokenizer.vocab_size, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "initializer_range": 0.2}
    for name, model in (("llama", Llama(LlamaConfig(intermediate_size=96, num_key_value_heads=2, **size))),
                        ("bloom", Bloom(BloomConfig(**size)))):
        initialise(model, seed=1)
        save_model(model, folder / name, tokenizer)
    with (folder / "sft.jsonl").open("w") as sft, (folder / "pairs.jsonl").open("w") as pairs:
        for language in ["deu", "fra"] * 30:
            record = {"instruction": say(3, 9), "input": "", "output": say(1, 9), "language": language}
            sft.write(json.dumps(record) + "\n")
            pairs.write(json.dumps(record | {"chosen": say(1, 6), "rejected": say(1, 6)}) + "\n")
    return folder


def metrics(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timings = {"seconds", "tokens_per_second", "mfu"}
    return [{name: value for name, value in row.items() if name not in timings} for row in rows]


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        for row, wanted in ((one, other), (one.get("held_out", {}), other.get("held_out", {}))):
            assert row.keys() == wanted.keys()
            for name in row.keys() - {"held_out", "accuracy"}:  # the sign of what at first is nothing
                assert row[name] == pytest.approx(wanted[name], rel=2e-4, abs=2e-5)


TRAININGS = {
    "sft llama": (train_sft, "llama", ["--train-on-prompt"]),
    "sft bloom": (train_sft, "bloom", ["--gradient-checkpointing", "--no-packing"]),
    "sft adapters": (train_sft, "llama", ["--lora-r", "4", "--lora-dropout", "0",
                                          "--lora-targets", "q_proj", "down_proj"]),
    "dpo adapters": (train_dpo, "bloom", ["--lora-r", "4"]),
    "dpo cached": (train_dpo, "bloom", ["--reference", "cached", "--nll-weight", "0.1"]),
    "ipo": (train_dpo, "llama", ["--loss", "ipo", "--reference", "live"]),
}


@pytest.mark.parametrize("training", TRAININGS)
def test_a_training_and_its_answers(files, tmp_path, training, capsys, monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda folder: None)  # they take longer than the rest
    script, arch, more = TRAININGS[training]
    given = ["--model", str(files / arch), *FLAGS, *more, "--data"]
    given += [files / "pairs.jsonl"] if script is train_dpo else [files / "sft.jsonl", "--max-new-tokens", "4"]
    given = [*map(str, given)]
    with cpu():
        script.main([*given, "--output", str(tmp_path / "cpu"), "--cache", str(files / "cache")])
    answers = capsys.readouterr().out.partition("some of its answers")[2]
    given += ["--output", str(tmp_path / "gpu"), "--cache", str(tmp_path if "cached" in more else files / "cache")]
    with gpu():
        script.main(given)
        assert capsys.readouterr().out.partition("some of its answers")[2] == answers
        if training in ("sft llama", "dpo cached"):  # and from a checkpoint, with what was cached
            shutil.rmtree(tmp_path / "gpu/checkpoints/step-00000004")
            script.main([*given, "--resume"])
    same(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"))


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_a_micro_batch_waits_for_the_gpu_at_its_head_alone(files, arch):
    """Its inputs and masks are made and sent while the GPU is still at the micro-batch before."""
    with pretend_cuda() as moves:
        model, tokenizer = load(files / arch, device="cuda")
        batch = collate(TokenCache([files / "sft.jsonl"], tokenizer, files / "cache", Instructions(999)), range(3))
        moves.waits.clear()
        sft_loss(model, batch)[0].backward()
    assert +moves.waits == {"nonzero": 1, "__bool__": 1}


@pytest.mark.parametrize("arch", ["llama", "bloom"])
@pytest.mark.parametrize("how", [[], ["--temperature", "1"], ["--temperature", "0.7", "--top-k", "5"],
                                 ["--temperature", "1", "--top-p", "0.95"]])
def test_the_command_that_generates(files, arch, how, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "native_bf16", lambda device: False)
    given = ["--model", str(files / arch), "red cat", "--max-new-tokens", "20", *how]
    with cpu():
        generate.main(given)
    on_cpu = capsys.readouterr().out
    with gpu():
        generate.main(given)
    assert capsys.readouterr().out == on_cpu


def test_an_evaluation(files, tmp_path):
    """Answers by one prompt's and many prompts' cache rows, and likelihoods of choices by branches."""
    choices = [{"premise": "red cat", "choice1": "dog runs", "choice2": " ".join(WORDS[:i % 9 + 1]), "idx": i,
                "question": "cause", "label": 0, "changed": False} for i in range(12)]
    (tmp_path / "xcopa").mkdir()
    with (tmp_path / "xcopa/test.it.jsonl").open("w") as file:
        file.writelines(json.dumps(choice) + "\n" for choice in choices)
    (tmp_path / "flores").mkdir()
    for code in ("eng", "deu"):
        (tmp_path / f"flores/{code}.devtest").write_text("".join(f"{' '.join(WORDS[i:])}\n" for i in range(6)))
    given = ["--model", str(files / "llama"), "--benchmarks", str(tmp_path / "xcopa"), str(tmp_path / "flores"),
             "--max-new-tokens", "9", "--dtype", "float32", "--names", "tiny", "--output"]
    with cpu():
        evaluation_script.main([*given, str(tmp_path / "cpu")])
    with gpu():
        evaluation_script.main([*given, str(tmp_path / "gpu")])
    found, expected = (json.loads((tmp_path / place / "results.json").read_bytes()) for place in ("gpu", "cpu"))
    for results in (found, expected):
        assert all(of.pop("settings")["output"] for of in results["benchmarks"].values())
    assert found == expected


def test_what_meets_on_two_devices_is_refused():
    """Or these tests would show nothing."""
    with gpu():
        x = torch.ones(3, device="cuda")
        assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2] and x[torch.tensor([0])].device.type == "cuda"
        for mixed in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(1)]), lambda: torch.ones(3)[x.long()],
                      lambda: x.numpy(), lambda: torch.ones(2, 3) @ x):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
