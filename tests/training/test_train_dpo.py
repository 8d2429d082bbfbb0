"""Preference optimisation end to end on tiny models: where it starts, its references, its resume."""

import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from minixllm import distributed
from minixllm.data.datasets import Preferences
from minixllm.data.stream import collate
from minixllm.data.token_cache import TokenCache
from minixllm.errors import UserError
from minixllm.models.bloom import Bloom, BloomConfig
from minixllm.models.llama import Llama, LlamaConfig
from minixllm.tokenizers import load_tokenizer
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.training import losses
from minixllm.training.losses import pair_logps, pair_measures
from minixllm.weights import adapters
from minixllm.training.model import open_model
from minixllm.weights.hf_directory import (
    initialise,
    read_directory,
    read_generation_config,
    save_model,
)

import train_dpo
import train_sft
from conftest import ROOT
from opened import load_model

WORDS = "red green blue one two three four five cat dog bird fish runs sleeps sings".split()
FLAGS = ["--batch-size", 6, "--micro-batch-size", 2, "--steps", 4, "--warmup-steps", 1, "--learning-rate", 0.01,
         "--held-out-per-language", 2, "--dtype", "float32"]
MODES = {"full": [], "lora": ["--lora-r", 4], "cached": ["--reference", "cached"],
         "ipo": ["--loss", "ipo"], "lora cached": ["--lora-r", 4, "--reference", "cached"],
         "lora bf16": ["--lora-r", 4, "--dtype", "bfloat16", "--save-every", 1]}
# for torchrun: a run after another; what is given first of a run is the step after whose checkpoint it is killed
SEVERAL = """
import json, os, signal, sys, train_dpo
from minixllm import distributed, settings
from minixllm.training import checkpoints
save, close = checkpoints.save, distributed.close
distributed.close = lambda: None  # a second group under torchrun would find the first one's keys and hang
def save_and_die(*args):
    save(*args)
    if args[4] == die_after:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save = save_and_die
def main(argv):
    global die_after
    for die_after, flags in json.load(open(argv[0])):
        train_dpo.main([flag.replace("{rank}", os.environ["RANK"]) for flag in flags])
    close()
settings.run(main)  # which ends the process before gloo's threads can abort it
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with open(path, "w") as file:
        for i in range(60):
            say = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(2)]
            record = {"instruction": " ".join(rng.choices(WORDS, k=3)), "input": "", "chosen": say[0] + " a",
                      "rejected": say[1] + " b", "language": "deu" if i % 2 else "fra", "response_language": "spa"}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny random LLaMA and a tiny random BLOOM, with one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    texts = [" ".join(random.Random(i).choices(WORDS, k=9)) for i in range(300)]
    tokenizer = train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=300)
    size = {"vocab_size": tokenizer.vocab_size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
            "initializer_range": 0.2}
    for name, model in (("llama", Llama(LlamaConfig(intermediate_size=24, num_key_value_heads=2, **size))),
                        ("bloom", Bloom(BloomConfig(**size)))):
        initialise(model, seed=1)
        save_model(model, folder / name, tokenizer, {"temperature": 0.6})
    return folder


def flags(models, pairs, arch, output, mode):
    given = [*FLAGS, "--model", models / arch, "--data", pairs, "--output", output, "--cache", models / "cache",
             *MODES[mode]]
    return list(map(str, given))


def metrics(output):
    """(training rows, held-out rows), timings left out."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("seconds", "tokens_per_second", "mfu", "tokens", "flops"):  # an empty batch counts in the latter
            row.pop(name, None)
    return [row for row in rows if "loss" in row], [row["held_out"] for row in rows if "held_out" in row]


@pytest.fixture(scope="module")
def runs(models, pairs, tmp_path_factory):
    """Finished runs of one process, made when first asked for."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def get(arch, mode):
        if (arch, mode) not in done:
            done[arch, mode] = folder / f"{arch} {mode}"
            train_dpo.main(flags(models, pairs, arch, done[arch, mode], mode))
        return done[arch, mode]

    torch.set_num_threads(1)
    return get


@pytest.mark.parametrize("mode", ["full", "lora", "cached", "lora cached"])
@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_training_starts_at_ln_2_with_no_reward(arch, mode, runs):
    first, *_, last = metrics(runs(arch, mode))[0]
    tolerance = 1e-5 if "cached" in mode else 1e-7  # of a live reference, of the same shapes, only the sum's rounding
    assert first["loss"] == pytest.approx(math.log(2), abs=tolerance)
    for name in ("chosen_reward", "rejected_reward", "margin"):
        assert abs(first[name]) <= (1e-5 if "cached" in mode else 0)
    assert last["loss"] < first["loss"] and last["margin"] > 0


def test_two_processes_give_what_one_gives_and_resume_bit_equal(runs, models, pairs, torchrun, tmp_path):
    """In one launch, for time, and without a disk that both see for what is cached. The last run is killed; a second
    launch goes on with it, over a base held in bf16."""
    (tmp_path / "several.py").write_text(SEVERAL)
    ours = [(arch, mode) for arch in ("llama", "bloom") for mode in MODES if mode != "ipo"]

    def launch(*plan, **options):
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        return torchrun(2, tmp_path / "several.py", tmp_path / "plan.json", **options)

    def of(output, arch, mode):
        return flags(models, pairs, arch, tmp_path / output, mode) + ["--cache", str(tmp_path / "cache{rank}")]

    killed = of("killed", "llama", "lora bf16")
    launch(*((None, of(f"{arch} {mode}", arch, mode)) for arch, mode in ours), (2, killed), check=False)
    assert len(list(tmp_path.glob("killed/checkpoints/step-*2"))) == 1 and not (tmp_path / "killed/model").exists()
    launch((None, [*killed, "--resume"]))
    assert len(list(tmp_path.glob("cache0/reference-*.npy"))) == 2 and not list(tmp_path.glob("cache1/reference-*"))
    assert_same_weights(tmp_path / "killed", tmp_path / "llama lora bf16")
    for arch, mode in ours:
        two, held_out_two = metrics(tmp_path / f"{arch} {mode}")
        tolerance = 1e-5 if "cached" in mode else 0
        assert len(two) == 4 and two[0]["margin"] == pytest.approx(0, abs=tolerance), (arch, mode)
        assert two[0]["loss"] == pytest.approx(math.log(2), abs=tolerance or 1e-7)
        if mode != "lora bf16":  # that rounds as the shapes of a micro-batch have it
            one, held_out = metrics(runs(arch, mode))
            for a, b in zip(one + held_out, two + held_out_two, strict=True):
                assert a == pytest.approx(b, rel=1e-5, abs=1e-5), (arch, mode)


def assert_same_weights(one, other):
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_cached_reference_equals_a_live_one(mode, runs):
    live, cached = runs("llama", mode), runs("llama", "cached" if mode == "full" else "lora cached")
    for a, b in zip(sum(metrics(live), []), sum(metrics(cached), [])):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-5)


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_a_frozen_reference_is_held_as_it_is_computed_in(arch, models, pairs, tmp_path):
    """Half of fp32 in bf16, and the policy's numbers all the same."""
    config, tokenizer = read_directory(models / arch)
    world, settings = distributed.setup("cpu"), train_dpo.Settings(dtype="bfloat16", model=".", data=["."])
    policy, reference = (open_model(config, world, settings, models / arch, frozen) for frozen in (0, 1))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    batch = collate(TokenCache([pairs], tokenizer, tmp_path, Preferences(200)), range(5))
    assert torch.equal(losses.second_model(reference)(None, batch), pair_logps(policy, batch))


def test_a_reference_of_weights_held_in_bf16_is_another(models, pairs, tmp_path):
    model, tokenizer = adapters.load(models / "llama")
    data, world = TokenCache([pairs], tokenizer, tmp_path, Preferences(200)), distributed.setup("cpu")
    for held in (torch.float32, torch.bfloat16, torch.float32):
        losses.stored_logps(model.to(held), world, data, models / "llama", tmp_path, "torch.float32", 400)
    assert len(list(tmp_path.glob("reference-*.npy"))) == 2


def test_a_cached_reference_is_read_again_and_made_anew_for_other_pairs_or_when_damaged(models, pairs, tmp_path,
                                                                                      monkeypatch):
    model, tokenizer = adapters.load(models / "llama")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(pairs.read_text().splitlines(True)[::2]))
    data, other = (TokenCache([path], tokenizer, tmp_path, Preferences(200)) for path in (pairs, fewer))
    world, batch, computed = distributed.setup("cpu"), collate(data, [3, 1]), []
    monkeypatch.setattr(losses, "pair_logps", lambda *args: computed.append(1) or pair_logps(*args))

    def reference(data):
        computed.clear()
        made = losses.stored_logps(model, world, data, models / "llama", tmp_path, "torch.float32", 400)
        return made, bool(computed)

    first, made = reference(data)
    assert made and torch.allclose(first(None, batch), pair_logps(model, batch), atol=1e-5)
    [file] = tmp_path.glob("reference-*.npy")
    again, made = reference(data)
    assert not made and torch.equal(again(None, batch), first(None, batch))
    assert reference(other)[1] and len(list(tmp_path.glob("reference-*.npy"))) == 2
    np.save(objects := io.BytesIO(), np.array([[None, None]] * 60))
    for damaged in (b"", file.read_bytes()[:-4], b"\x93NUMPY nonsense", objects.getvalue()):
        file.write_bytes(damaged)
        again, made = reference(data)
        assert made and torch.equal(again(None, batch), first(None, batch)) and not reference(data)[1]


def test_a_cached_reference_is_of_one_model_in_one_type(models, pairs, tmp_path, monkeypatch):
    model, tokenizer = adapters.load(models / "llama")
    data, world, computed = TokenCache([pairs], tokenizer, tmp_path, Preferences(200)), distributed.setup("cpu"), []
    monkeypatch.setattr(losses, "pair_logps", lambda *args: computed.append(1) or pair_logps(*args))
    directory = shutil.copytree(models / "llama", tmp_path / "copy")

    def made(directory, dtype="torch.float32"):
        computed.clear()
        losses.stored_logps(model, world, data, directory, tmp_path, dtype, 400)
        return bool(computed)

    assert made(models / "llama") and not made(directory) and made(directory, "torch.bfloat16")
    for name in ("config.json", "model.safetensors"):
        with open(directory / name, "ab") as file:
            file.write(b" ")
        assert made(directory), name


def test_dropout_is_off(runs, models, pairs, tmp_path):
    adapter = json.loads((runs("llama", "lora") / "adapter/adapter_config.json").read_text())
    assert adapter["lora_dropout"] == 0
    with pytest.raises(UserError, match="unknown flag --lora-dropout"):
        train_dpo.main([*flags(models, pairs, "llama", tmp_path, "lora"), "--lora-dropout", "0.9"])


def test_held_out_measures_come_by_pair_of_languages(runs):
    _, (held_out,) = metrics(runs("llama", "full"))
    for name in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps"):
        mean = (held_out[f"{name}/deu>spa"] + held_out[f"{name}/fra>spa"]) / 2
        assert held_out[name] == pytest.approx(mean, abs=1e-6)


def test_no_pair_held_out_measures_nothing(models, pairs, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(pairs.read_text().splitlines(True)[:6]))
    train_dpo.main(flags(models, few, "llama", tmp_path / "out", "lora"))
    assert metrics(tmp_path / "out")[1] == [{}]
    assert "6 pairs to train on, 0 held out" in capsys.readouterr().out


def test_what_was_left_out_is_said_of_held_out_files_too(models, pairs, tmp_path, capsys):
    lines = pairs.read_text().splitlines(True)
    equal = json.dumps(json.loads(lines[0]) | {"chosen": "red", "rejected": "red"}) + "\n"
    (tmp_path / "train.jsonl").write_text("".join(lines[:12]) + 2 * equal)
    (tmp_path / "valid.jsonl").write_text("".join(lines[12:19]) + equal)
    train_dpo.main([*flags(models, tmp_path / "train.jsonl", "llama", tmp_path / "out", "lora"), "--steps", "1",
                    "--held-out", str(tmp_path / "valid.jsonl")])
    said = capsys.readouterr().out
    for kept, equal in ((12, 2), (7, 1)):
        assert f"pairs: {kept} kept; left out 0 too long, 0 empty, {equal} equal; 0 truncated" in said
    assert "12 pairs to train on, 7 held out" in said and said.count("tokens/character") == 2


def test_lora_settings_without_a_rank_are_told_once(models, pairs, tmp_path, capsys):
    train_dpo.main([*flags(models, pairs, "llama", tmp_path / "run", "full"), "--lora-alpha", "8"])
    said = capsys.readouterr().out
    assert said.count("lora_alpha and lora_targets count only with --lora-r") == 1 and "this default suits" not in said


def test_ipo_starts_at_its_own_loss(runs):
    assert metrics(runs("llama", "ipo"))[0][0]["loss"] == pytest.approx((1 / (2 * 0.1)) ** 2)


def test_ipo_averages_over_each_answers_tokens(models, pairs, tmp_path):
    data = TokenCache([pairs], load_tokenizer(models / "llama"), tmp_path, Preferences(256))
    model, batch = load_model(models / "llama"), collate(data, range(8))
    found = pair_measures(model, batch, lambda *_: torch.zeros(8, 2), "ipo", 0.1, 0.0, 0.0)["loss"]
    lengths = torch.tensor([[len(answer) for answer in data.read(i)[1:]] for i in range(8)])  # with EOS
    chosen, rejected = (pair_logps(model, batch) / lengths).unbind(1)
    torch.testing.assert_close(found, (chosen - rejected - 5) ** 2)


def test_what_is_known_of_a_pair(models, pairs, tmp_path):
    """Its rewards are beta times what the policy adds to the reference."""
    data = TokenCache([pairs], load_tokenizer(models / "llama"), tmp_path, Preferences(256))
    model, batch = load_model(models / "llama"), collate(data, range(8))
    logps, reference = pair_logps(model, batch), -torch.arange(16.0).view(8, 2)
    reference[0] = logps[0].detach()  # of equal rewards none is the larger
    found = pair_measures(model, batch, lambda *_: reference, "sigmoid", 0.1, 0.0, 0.0)
    rewards = 0.1 * (logps - reference)
    expected = {"accuracy": (rewards[:, 0] > rewards[:, 1]).float(), "margin": rewards[:, 0] - rewards[:, 1],
                "chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1],
                "chosen_logps": logps[:, 0], "rejected_logps": logps[:, 1]}
    assert found.pop("loss").requires_grad and found.keys() == expected.keys() and found["accuracy"][0] == 0
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name].detach(), msg=name)
        assert not values.requires_grad


def test_the_chosen_answers_likelihood_is_added(runs, models, pairs, tmp_path):
    train_dpo.main([*flags(models, pairs, "llama", tmp_path, "full"), "--nll-weight", "0.5"])
    plain, added = metrics(runs("llama", "full"))[0][0], metrics(tmp_path)[0][0]
    assert added["chosen_logps"] == plain["chosen_logps"]
    assert added["loss"] == pytest.approx(plain["loss"] - 0.5 * plain["chosen_logps"], rel=1e-6)


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_pair_log_probabilities_equal_transformers(arch, models, pairs, tmp_path):
    """Sums over the answer's tokens and EOS of each sequence by itself, prompt and answer in a row."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(models / arch).eval()
    data = TokenCache([pairs], load_tokenizer(models / arch), tmp_path, Preferences(256))
    found = pair_logps(load_model(models / arch), collate(data, range(8)))
    for i in range(8):
        prompt, *answers = data.read(i)
        for answer, logp in zip(answers, found[i]):
            ids = torch.tensor([*prompt, *answer])[None]
            logps = theirs(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            assert logp.item() == pytest.approx(logps[len(prompt) - 1:].sum().item(), rel=1e-5)


@pytest.mark.parametrize("script", [train_dpo, train_sft], ids=["dpo", "sft"])
def test_a_killed_adapter_run_resumes_bit_equal(script, runs, models, pairs, tmp_path):
    killed, whole, data, more = tmp_path / "killed", tmp_path / "whole", pairs, []
    if script is train_dpo:
        whole = runs("llama", "lora")
    else:  # with dropout, over a base held in bf16
        data, more = tmp_path / "records.jsonl", ["--max-length", "150", "--dtype", "bfloat16"]
        data.write_text(pairs.read_text().replace('"chosen"', '"output"'))
        script.main([*flags(models, data, "llama", whole, "lora"), *more])
    arguments = [*flags(models, data, "llama", killed, "lora"), *more, "--save-every", "1", "--resume"]
    process = subprocess.Popen([sys.executable, script.__file__, *arguments], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = killed / "checkpoints"
    while process.poll() is None and not list(steps.glob("step-*2")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model").exists()
    script.main(arguments)
    assert_same_weights(whole, killed)
    assert metrics(whole) == metrics(killed)
    state = dcp.FileSystemReader(max(steps.glob("step-*"))).read_metadata().state_dict_metadata
    assert state and all("lora_" in name for name in state)


@pytest.mark.parametrize("begun, resumed, said", [("full", "lora", "lora_r 0 -> 4"), ("lora", "full", "lora_r 4 -> 0"),
                                                  ("lora", "lora --lora-r 2", "lora_r 4 -> 2")])
def test_resuming_without_the_adapters_names_their_setting(begun, resumed, said, runs, models, pairs):
    mode, *more = resumed.split()
    with pytest.raises(UserError, match=f"does not fit this model: .*; changed since it was saved: .*{said}"):
        train_dpo.main([*flags(models, pairs, "llama", runs("llama", begun), mode), *more, "--resume"])


def test_the_adapter_beside_the_base_is_the_merged_model(runs, models):
    """Which keeps how its base generates."""
    import peft
    import transformers

    run, ids = runs("llama", "lora"), torch.arange(40).view(2, 20)
    base = transformers.AutoModelForCausalLM.from_pretrained(models / "llama")
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    torch.testing.assert_close(load_model(run / "model")(ids), adapted(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapters.load(run / "adapter")[0](ids), adapted(ids).logits, rtol=1e-5, atol=1e-5)
    assert read_generation_config(run / "model")["temperature"] == 0.6


def test_what_is_missing_is_named(models, pairs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--data without --model"):
        train_dpo.main(["--data", str(pairs), "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="label_smoothing: found 0.1 with --loss ipo, expected 0"):
        train_dpo.main([*flags(models, pairs, "llama", tmp_path / "out", "ipo"), "--label-smoothing", "0.1"])
    monkeypatch.setattr(train_dpo.feedback, "SFT_MODEL", tmp_path / "none")
    with pytest.raises(UserError, match="run torchrun train_sft.py first"):
        train_dpo.main(["--output", str(tmp_path / "out")])
