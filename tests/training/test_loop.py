"""The training loop: the same gradients however a batch is split, the same run however often it is killed.

Run by torchrun this file is a tiny training run of its own (see `main`).
"""

import contextlib
import copy
import dataclasses
import errno
import fcntl
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minixllm import distributed
from minixllm.data import stream as stream_module
from minixllm.data.stream import Stream
from minixllm.errors import UserError
from minixllm.files import locked
from minixllm.models.bloom import BloomConfig
from minixllm.models.llama import LlamaConfig
from minixllm.distributed import full_tensor
from minixllm.settings import parse, run, setting
from minixllm.training import checkpoints, held_out, loop, losses, run_directory
from minixllm.training.held_out import held_out_loss
from minixllm.training.loop import learning_rate, train, train_step
from minixllm.training.losses import sft_loss
from minixllm.training.meter import Meter, attending_pairs, memory_needed, peak_flops
from minixllm.training.run_directory import exclusive_output, log, start_or_resume
from minixllm.training.settings import TrainingSettings
from minixllm.weights.hf_directory import build, initialise

from conftest import PATIENCE, PYTHONPATH, ROOT

CONFIG = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, tie_word_embeddings=True)
CONFIGS = {"llama": CONFIG, "bloom": BloomConfig(97, 32, 2, 4)}


class Records:
    """Random token ids in two languages, as TokenCache gives them; the first half of each record is its prompt."""

    language_names = ["deu", "tha"]
    key = "tiny"

    def __init__(self, n, seed=0):
        rng = np.random.default_rng(seed)
        self.ids = [rng.integers(0, CONFIG.vocab_size, rng.integers(4, 25)) for _ in range(n)]
        self.lengths = np.array([len(ids) - 1 for ids in self.ids], np.int32)
        self.supervised = self.lengths - self.lengths // 2
        self.languages = np.arange(n) % 2

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index][1:].copy()
        labels[:len(labels) // 2] = -100
        return self.ids[index][:-1], labels

    def document(self, index):
        return int(self.lengths[index])

    def count(self, records):
        return int(self.supervised[records].sum())

    def where(self, index):
        return f"tiny.jsonl, line {index + 1}"


@dataclass
class Settings(TrainingSettings):
    pause: float = setting(0.0, "seconds a micro-batch takes, so that a test can hit a step")
    gradients: str | None = setting(None, "file for the loss and gradients of the first batch")
    fault: str | None = setting(None, "what goes wrong: die, nan, disk, signal, measure")
    fault_step: int = setting(5, "at which step")
    arch: str = setting("llama", "")
    batch_size: int = setting(6, "")
    micro_batch_size: int = setting(2, "")
    max_length: int = setting(32, "")
    steps: int = setting(12, "")
    warmup_steps: int = setting(3, "")
    learning_rate: float = setting(1e-2, "")
    weight_decay: float = setting(0.1, "")
    beta2: float = setting(0.98, "", least=0, most=0.99999)
    clip: float = setting(0.8, "", above=0)
    dtype: str = setting("float32", "")
    save_every: int = setting(3, "")
    eval_every: int = setting(4, "")


TIMINGS = ("seconds", "tokens_per_second", "mfu")  # the fields of metrics.jsonl that differ between two equal runs


def main(argv):
    settings = parse(Settings, argv)
    torch.set_num_threads(1)
    with mock.patch.object(loop, "PATIENCE", loop.PATIENCE), exclusive_output(settings, distributed.setup("cpu")):
        run_of(settings)


def run_of(settings):
    world, model = setup(settings)
    stream = make_stream(settings, world)
    if settings.gradients:
        save_gradients(model, world, stream, settings.gradients)
    measured = Records(9, seed=1)
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += 1
        time.sleep(settings.pause)
        loss, _ = sft_loss(model, batch)
        if settings.fault and calls == 1 + (settings.fault_step - 1) * len(
                stream.batch(0).micro_batches) and world.rank == world.size - 1:
            if settings.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if settings.fault == "signal":
                loop.PATIENCE = 0.0
                os.kill(os.getpid(), signal.SIGTERM)
            if settings.fault == "nan":
                loss = loss * math.nan
            if settings.fault == "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return loss, {"twice": 2 * loss}

    def answer_logps(*args):
        if settings.fault == "measure" and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses.answer_logps(*args)

    with mock.patch.object(held_out, "answer_logps", answer_logps):
        finished = train(model, world, settings, stream, loss_fn, lambda stopped: held_out_loss(
            model, world, measured, np.arange(9), tokens=40, stopped=stopped))
    weights = {name: full_tensor(p) for name, p in model.named_parameters()}
    if world.first and finished:
        torch.save(weights, Path(settings.output) / "weights.pt")

def setup(settings):
    world = distributed.setup("cpu")
    model = build(CONFIGS[settings.arch])
    distributed.shard(model, world, distributed.compute_dtype(settings.dtype, world.device))
    initialise(model, seed=1)
    return world, model


def make_stream(settings, world):
    return Stream(Records(100), settings.seed, settings.batch_size, settings.micro_batch_size, settings.max_length,
                  world.rank, world.size)


class Grab:
    """An optimiser that keeps the gradients and changes nothing."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{"params": list(model.parameters()), "lr": 0.0}]

    def step(self):
        self.gradients = {name: full_tensor(p.grad) for name, p in self.model.named_parameters()}

    def zero_grad(self):
        self.model.zero_grad()


def save_gradients(model, world, stream, path):
    """What the loop's own step makes of the first batch, short of the update."""
    settings, grab = TrainingSettings(clip=1e9), Grab(model)
    row = train_step(model, world, settings, stream, sft_loss, grab, Meter(model, world), 1, [])
    if world.first:
        torch.save({"loss": torch.tensor(row["loss"]), **grab.gradients}, path)


# ------------------------------------------------------------------------------------------------------ the tests


def plain_model(arch):
    """A plain model, no FSDP, with the weights that `setup` gives."""
    model = build(CONFIGS[arch])
    initialise(model, seed=1)
    return model


@pytest.fixture(scope="module")
def plain():
    return plain_model("llama")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run of one process that was never interrupted."""
    return run_here(tmp_path_factory.mktemp("reference"))


def run_here(folder, *flags):
    main(["--output", str(folder), *map(str, flags)])
    return folder


def metrics(folder, timings=False):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if timings or name not in TIMINGS} for row in rows]


def weights(folder):
    return torch.load(folder / "weights.pt")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(command, folder, *flags):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command, __file__, "--output", folder, *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def wait_for_steps(process, folder, lines):
    path = folder / "metrics.jsonl"
    deadline = time.time() + 120
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)


def mean_loss_and_gradients(model, stream):
    """The oracle: every record of the first batch by itself, through the logits and PyTorch's cross-entropy."""
    model.zero_grad()
    records = [record for m in stream.batch(0).micro_batches for record in m.records]
    count = sum((stream.data[record][1] != -100).sum() for record in records)
    total = 0
    for record in records:
        ids, labels = map(torch.from_numpy, stream.data[record])
        total = total + F.cross_entropy(model(ids[None])[0], labels, reduction="sum")
    loss = total / count
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def check_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert abs(found["loss"] - expected["loss"]) < 1e-5
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("micro_batch_size", [8, 5, 2])
def test_gradients_do_not_depend_on_packing_or_micro_batches(tmp_path, arch, micro_batch_size):
    settings = Settings(arch=arch, batch_size=8, micro_batch_size=micro_batch_size)
    world, model = setup(settings)
    stream = make_stream(settings, world)
    assert len(stream.batch(0).micro_batches) == -(-8 // micro_batch_size)
    save_gradients(model, world, stream, tmp_path / "gradients.pt")
    check_gradients(torch.load(tmp_path / "gradients.pt"), mean_loss_and_gradients(plain_model(arch), stream))


def test_tied_bloom_in_two_processes(torchrun, tmp_path):
    """Gradients of the first batch, four micro-batches in all, and the losses of the run."""
    flags = "--arch", "bloom", "--steps", 5
    run_here(tmp_path / "one", *flags)
    torchrun(2, __file__, "--output", tmp_path / "two", *flags, "--micro-batch-size", 1,
             "--gradients", tmp_path / "gradients.pt")
    check_gradients(torch.load(tmp_path / "gradients.pt"),
                    mean_loss_and_gradients(plain_model("bloom"), make_stream(Settings(), distributed.setup("cpu"))))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.get("loss", one.get("held_out")) == pytest.approx(two.get("loss", two.get("held_out")), abs=1e-5)


def test_equals_a_plain_loop(plain, reference):
    """AdamW, clipping, schedule and decay, against PyTorch's own on an unsharded model."""
    settings = Settings()
    model = copy.deepcopy(plain)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  betas=(0.9, 0.98))
    stream = make_stream(settings, distributed.setup("cpu"))
    for step in range(1, 13):
        peak = 1e-2 * min(1, step / 3)
        rate = peak * 0.5 * (1 + math.cos(math.pi * max(0, step - 3) / 9))
        batch = stream.batch(step - 1)
        loss = sum(sft_loss(model, m)[0] for m in batch.micro_batches) / batch.count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.8)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        row = next(row for row in metrics(reference) if row["step"] == step)
        assert (row["loss"], row["gradient_norm"], row["learning_rate"], row["twice"]) == pytest.approx(
            (loss.item(), norm.item(), rate, 2 * loss.item()), rel=1e-5)
    for name, value in weights(reference).items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-5), name


def test_the_smallest_part_of_an_epoch_is_a_step_and_the_last_is_measured(tmp_path):
    for steps in (None, 2):
        folder = tmp_path / str(steps)
        run_of(Settings(output=str(folder), steps=steps, epochs=1e-9, eval_every=0))
        measured = [row["step"] for row in metrics(folder) if "held_out" in row]
        assert measured == [metrics(folder)[-2]["step"]] == [steps or 1]


def test_killed_at_any_moment_and_resumed(reference, tmp_path):
    process = start([], tmp_path, "--resume", "--pause", 0.01)
    wait_for_steps(process, tmp_path, random.randint(1, 14))
    process.kill()
    process.communicate()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'7\n\xff\n{"step": 9, "lo')  # as if killed while writing, by a power cut
    run_here(tmp_path, "--resume")
    assert metrics(tmp_path) == metrics(reference)
    assert same(weights(tmp_path), weights(reference))


def test_two_processes(plain, reference, torchrun, tmp_path):
    """Two processes give what one gives; one that dies takes the other along, a signal saves, and both resume."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    torchrun(2, __file__, "--output", whole, "--gradients", tmp_path / "gradients.pt", "--keep", 9)
    check_gradients(torch.load(tmp_path / "gradients.pt"),
                    mean_loss_and_gradients(plain, make_stream(Settings(), distributed.setup("cpu"))))
    for one, two in zip(metrics(reference), metrics(whole), strict=True):
        assert one.get("loss", one.get("held_out")) == pytest.approx(two.get("loss", two.get("held_out")), abs=1e-5)

    # a signal that the second of them gets ends a long step in both
    ended = torchrun(2, __file__, "--output", broken, "--fault", "signal", "--fault-step", 2)
    assert "stopped by a signal: step 1 is saved" in ended.stdout
    began = time.time()
    step = random.randint(4, 5)  # with fewer lines of metrics than are waited for below
    dead = torchrun(2, __file__, "--output", broken, "--resume", "--fault", "die", "--fault-step", step - 1,
                    check=False)
    assert dead.returncode != 0 and time.time() - began < 60
    assert f"(rank 0): error: step {step}: another process died" in dead.stderr and "--resume continues" in dead.stderr
    assert checkpoints.latest(broken / "checkpoints").name == "step-00000003"

    # one that the second gets in the middle of a measurement: its step is saved, and it is made on resume
    ended = torchrun(2, __file__, "--output", broken, "--resume", "--fault", "measure")
    assert "stopped by a signal: step 4 is saved" in ended.stdout
    assert metrics(broken) == [row for row in metrics(whole) if row["step"] <= 4 and "held_out" not in row]

    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    process = start(launcher, broken, "--resume", "--pause", 0.02)
    wait_for_steps(process, broken, 6)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=PATIENCE)[0]
    assert "stopped by a signal: step" in said
    stopped = checkpoints.latest(broken / "checkpoints")
    assert int(stopped.name.split("-")[1]) == metrics(broken)[-1]["step"] < 12, said
    torchrun(2, __file__, "--output", broken, "--resume")
    assert metrics(broken) == metrics(whole)
    assert same(weights(broken), weights(whole))

    for checkpoint in sorted((whole / "checkpoints").iterdir())[1:]:  # go on from step 3, now in one process
        shutil.rmtree(checkpoint)
    two = metrics(whole)
    run_here(whole, "--resume")
    for mine, theirs in zip(metrics(whole), two, strict=True):
        assert mine.get("loss") == pytest.approx(theirs.get("loss"), abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(reference, tmp_path, number):
    process = start([], tmp_path, "--pause", 0.02)
    wait_for_steps(process, tmp_path, 4)
    process.send_signal(number)
    assert "stopped by a signal: step" in process.communicate(timeout=PATIENCE)[0] and process.returncode == 0
    assert int(checkpoints.latest(tmp_path / "checkpoints").name.split("-")[1]) == metrics(tmp_path)[-1]["step"] < 12
    run_here(tmp_path, "--resume")
    assert metrics(tmp_path) == metrics(reference) and same(weights(tmp_path), weights(reference))


@pytest.mark.parametrize("step, saved", [(6, 5), (4, 3), (1, 0)])
def test_a_long_step_is_given_up_after_a_signal(reference, tmp_path, capsys, step, saved):
    """Between its micro-batches; step 3 is saved anyhow, before the first there is nothing to save."""
    run_here(tmp_path, "--fault", "signal", "--fault-step", step)
    told = f"step {saved} is saved, --resume continues from it" if saved else "no step was done yet"
    assert f"stopped by a signal: {told}" in capsys.readouterr().out
    found = checkpoints.latest(tmp_path / "checkpoints")
    assert found.name == f"step-{saved:08}" if saved else found is None
    run_here(tmp_path, "--resume")
    assert metrics(tmp_path) == metrics(reference) and same(weights(tmp_path), weights(reference))


def test_a_signal_in_the_last_step_leaves_only_its_measurement_to_do(reference, tmp_path, capsys):
    run_here(tmp_path, "--micro-batch-size", 6, "--fault", "signal", "--fault-step", 12)
    assert "step 12 is saved, --resume continues" in capsys.readouterr().out and metrics(tmp_path)[-1]["step"] == 12
    assert "held_out" not in metrics(tmp_path)[-1]
    run_here(tmp_path, "--micro-batch-size", 6, "--resume")
    assert [row["step"] for row in metrics(tmp_path)][-2:] == [12, 12] and (tmp_path / "weights.pt").exists()
    assert "nothing is left" not in capsys.readouterr().out


@pytest.mark.parametrize("step, stop_at, saved", [(8, "first batch", 8), (8, "last batch", 8), (12, "first batch", 12)])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_stopped_while_it_measures(reference, tmp_path, capsys, monkeypatch, step, stop_at, saved, how):
    """The step is saved, and its measurement made on resume. Step 8 is no step at which a checkpoint is due."""
    means, module = held_out.held_out_means, sys.modules[__name__]
    seen = []

    def stopping(model, *args, stopped, **kwargs):
        seen.append(None)
        if len(seen) == step // 4:
            def measure(batch, calls=[]):
                calls.append(None)
                if len(calls) == (1 if stop_at == "first batch" else 4):
                    if how == "kill":
                        raise KeyboardInterrupt  # ends the run at once, as SIGKILL would
                    os.kill(os.getpid(), signal.SIGTERM)
                return {"loss": -held_out.answer_logps(model, batch)}
            return means(*args, measure=measure, stopped=stopped, **kwargs)
        return held_out.held_out_loss(model, *args, stopped=stopped, **kwargs)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(module, "held_out_loss", stopping)
        run_here(tmp_path)
    if how == "signal":
        assert f"stopped by a signal: step {saved} is saved" in capsys.readouterr().out
        assert checkpoints.latest(tmp_path / "checkpoints").name == f"step-{saved:08}"
        last = metrics(tmp_path)[-1]
        assert last["step"] == step and ("held_out" in last) == (stop_at == "last batch")
    else:
        assert checkpoints.latest(tmp_path / "checkpoints").name == f"step-{step // 3 * 3:08}"
    run_here(tmp_path, "--resume")
    assert metrics(tmp_path) == metrics(reference) and same(weights(tmp_path), weights(reference))


def test_a_second_signal_and_a_third_change_nothing(reference, tmp_path):
    """One while the run stops, one before the resumed run has done a step."""
    for step in (2, 4, 9):
        run_here(tmp_path, "--resume", "--fault", "signal", "--fault-step", step)
    run_here(tmp_path, "--resume")
    assert metrics(tmp_path) == metrics(reference) and same(weights(tmp_path), weights(reference))


@pytest.mark.parametrize("then", [3, 12])
def test_another_batch_size_says_which_records_come_twice_or_not_at_all(tmp_path, capsys, then):
    steps = make_stream(Settings(), distributed.setup("cpu")).steps_per_epoch
    run_here(tmp_path, "--steps", 5)
    capsys.readouterr()
    run_here(tmp_path, "--resume", "--batch-size", then, "--steps", 6)
    told = re.search(rf"an epoch now has (\d+) steps, it had {steps}: step 5 now stands at epoch (\S+), and stood at "
                     r"(\S+): (\d+) records (come once more|are passed over): (tiny.jsonl, line .*)",
                     capsys.readouterr().out)
    now, before = 5 / int(told[1]), 5 / steps
    assert (told[2], told[3]) == (f"{now:.2f}", f"{before:.2f}")
    assert told[5] == ("come once more" if now < before else "are passed over")
    assert int(told[4]) == pytest.approx(100 * abs(now - before), abs=8)  # a row is a few records


def test_what_is_told_of_records_is_what_the_stream_gives():
    """Of rows of one record, where the numbers are exact: the first 5 steps of 4, then the rest of one epoch."""
    def stream(batch_size):
        return Stream(Records(40), 0, batch_size, 2)

    def given(stream, first, last):
        return [record for step in range(first, last) for m in stream.batch(step).micro_batches for record in m.records]

    for size, said in ((8, "20 records are passed over"), (2, "10 records come once more"), (4, None)):
        told = run_directory.tell_repeated(stream(size), 5, {"steps_per_epoch": stream(4).steps_per_epoch})
        assert told is None if said is None else f": {said}: " in told
        seen = given(stream(4), 0, 5) + given(stream(size), 5, stream(size).steps_per_epoch)
        wrong = [record for record in range(40) if seen.count(record) != 1]
        places = sorted((5 / stream(size).steps_per_epoch, 0.5))
        assert sorted(stream(size).records_between(*places)) == wrong, size
    assert len(stream(4).records_between(0.25, 2.5)) == 90


def test_a_directory_that_goes_away_is_noticed_at_once(reference, tmp_path):
    """Its lock then holds nobody back, and its checkpoints would be written elsewhere."""
    for go in (lambda run: run.rename(tmp_path / "moved"), lambda run: shutil.rmtree(run),
               lambda run: (run / "metrics.jsonl").rename(run / "old")):
        run = tmp_path / "run"
        run.mkdir()
        with contextlib.closing(run_directory.open_metrics(run, distributed.setup("cpu"))) as file:
            log(file, {"step": 1})
            go(run)
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run/metrics.jsonl").touch()
            with pytest.raises(UserError, match="metrics.jsonl: was removed or replaced while the run was writing"):
                log(file, {"step": 2})
        shutil.rmtree(run)
        shutil.rmtree(tmp_path / "moved", ignore_errors=True)


@pytest.mark.parametrize("name", ["model", "adapter", "checkpoints"])
def test_a_file_where_the_run_would_write_a_directory_is_refused_before_it_begins(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name}: found a file, expected --output to name a directory"):
        run_here(tmp_path)


def test_the_last_few_checkpoints_are_kept(reference):
    assert sorted(path.name for path in (reference / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


DAMAGE = {
    "metadata cut": lambda path: (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:50]),
    "metadata empty": lambda path: (path / ".metadata").write_bytes(b""),
    "metadata of something else": lambda path: (path / ".metadata").write_bytes(pickle.dumps({})),
    "shard cut": lambda path: next(path.glob("*.distcp")).write_bytes(next(path.glob("*.distcp")).read_bytes()[:2000]),
    "shard cut a little": lambda path: next(path.glob("*.distcp")).write_bytes(
        next(path.glob("*.distcp")).read_bytes()[:-100]),
    "shard lost": lambda path: next(path.glob("*.distcp")).unlink(),
    "run.json empty": lambda path: (path / "run.json").write_text("{}"),
    "run.json an array": lambda path: (path / "run.json").write_text("[]"),
    "run.json too deep": lambda path: (path / "run.json").write_text("[" * 100_000),
    "run.json a step that is none": lambda path: (path / "run.json").write_text('{"step": [], "facts": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it(reference, tmp_path, damage):
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000006").mkdir()
    damage(tmp_path / "run/checkpoints/step-00000012")
    with pytest.raises(UserError, match="step-00000012: not a whole checkpoint: .*goes on from .*step-00000009"):
        run_here(tmp_path / "run", "--resume", "--steps", 13)


def test_what_is_announced(tmp_path, capsys):
    run_here(tmp_path, "--steps", 2)
    said = capsys.readouterr().out
    assert "warmup_steps 3 is more than the run's 2 steps" in said
    tokens = [row["tokens"] for row in metrics(tmp_path) if "tokens" in row]
    announced = re.search(r"2 steps of about (\d+) tokens: ([\d,]+) tokens", said)
    assert int(announced[1]) == pytest.approx(np.mean(tokens), rel=0.2)
    assert int(announced[2].replace(",", "")) == pytest.approx(sum(tokens), rel=0.2)


def test_announced_memory_follows_the_model():
    """16 bytes a trained weight, and the activations of a micro-batch."""
    settings = Settings()
    world, model = setup(settings)
    weights = 16 * sum(p.numel() for p in model.parameters())
    base = memory_needed(model, world, settings)
    assert base > 0.3e9 + weights
    more = memory_needed(model, world, dataclasses.replace(settings, micro_batch_size=200))
    fewer = memory_needed(model, world, dataclasses.replace(settings, micro_batch_size=200,
                                                            gradient_checkpointing=True))
    assert base < fewer < more


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(UserError) as error:
        run_here(tmp_path, "--fault", "nan")
    said = str(error.value)
    assert said.startswith("step 5: loss nan") and "tiny.jsonl, line " in said and "step-00000003" in said
    assert "is the learning rate too high?" in said
    bad = json.loads((tmp_path / "not-finite-step-5.json").read_text(), parse_constant=pytest.fail)
    micro_batches = make_stream(Settings(), distributed.setup("cpu")).batch(4).micro_batches
    assert [m["records"] for m in bad] == [[f"tiny.jsonl, line {record + 1}" for record in m.records]
                                           for m in micro_batches]
    assert bad[0]["loss"] is None and math.isfinite(bad[1]["loss"])
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step-00000003"
    assert metrics(tmp_path)[-1]["step"] == 4


def test_a_run_that_fails_at_once_has_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="step 1: loss nan .* Nothing was saved: there is no checkpoint yet$"):
        run_here(tmp_path, "--fault", "nan", "--fault-step", 1)


def test_a_disk_that_is_full_after_the_weights(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_json", full)
    with pytest.raises(UserError, match="step-00000003: checkpoint not written: .*No space left.*whole one is none"):
        run_here(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_full_disk_keeps_the_last_checkpoint(reference, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match="step-00000006: checkpoint not written: the disk is full .*last whole .*step-00000003"):
            run_here(tmp_path, "--fault", "disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    run_here(tmp_path, "--resume")
    assert same(weights(tmp_path), weights(reference))


def test_what_goes_wrong_in_one_of_two_processes(torchrun, tmp_path):
    """A loss that is not finite, a full disk: every process says what it is, none hangs, nothing is half there."""
    for fault, said in [("nan", "step 5: loss nan"), ("disk", "step-00000006: checkpoint not written")]:
        done = torchrun(2, __file__, "--output", tmp_path / fault, "--fault", fault, check=False)
        assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr.split("torch/")[0]
        assert [path.name for path in (tmp_path / fault / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_batch_that_is_all_masked():
    settings = Settings()
    world, model = setup(settings)
    stream = make_stream(settings, world)
    stream.data.supervised = np.zeros(100, int)
    with pytest.raises(UserError, match="step 1: every token of the batch is masked.*tiny.jsonl, line"):
        save_gradients(model, world, stream, None)


def test_weights_stay_fp32_under_bf16(tmp_path):
    """After a held-out loss, which has no backward to put them back, the weights are still the fp32 ones."""
    run_here(tmp_path, "--dtype", "bfloat16", "--steps", 4)
    for name, value in weights(tmp_path).items():
        assert value.dtype == torch.float32
        assert "norm" in name or not torch.equal(value, value.bfloat16().float()), name


def test_gradient_checkpointing_changes_nothing(reference, tmp_path):
    run_here(tmp_path / "fp32", "--gradient-checkpointing")
    assert same(weights(tmp_path / "fp32"), weights(reference))
    run_here(tmp_path / "plain", "--dtype", "bfloat16")  # FSDP2 shards it, for the weights are held in fp32
    run_here(tmp_path / "bf16", "--dtype", "bfloat16", "--gradient-checkpointing")
    assert same(weights(tmp_path / "bf16"), weights(tmp_path / "plain"))


def test_the_next_batch_is_made_before_this_step_is_waited_for(tmp_path, monkeypatch):
    settings = Settings(output=str(tmp_path), steps=3, gradient_checkpointing=True)
    world, model = setup(settings)
    stream, events = make_stream(settings, world), []
    collate, add_up = stream_module.collate, distributed.World.sum
    monkeypatch.setattr(stream_module, "collate", lambda *args: events.append("micro-batch") or collate(*args))
    monkeypatch.setattr(distributed.World, "sum", lambda *args: events.append("sum") or add_up(*args))
    train(model, world, settings, stream, sft_loss)
    a_step = ["micro-batch"] * 3 + ["sum"]
    assert events == ["micro-batch"] * 3 + 3 * a_step + ["sum"]  # the last is that of the weights to be saved
    assert model.gradient_checkpointing


def test_every_step_draws_its_own_dropout(tmp_path, monkeypatch):
    """As does every seed and process."""
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    run_here(tmp_path / "first")
    run_here(tmp_path / "second", "--seed", 1, "--steps", 1)
    settings = Settings()
    world, model = setup(settings)
    train_step(model, dataclasses.replace(world, rank=1), settings, make_stream(settings, world), sft_loss, Grab(model),
               Meter(model, world), 1, [])
    assert len(set(seeds)) == len(seeds) == 12 + 1 + 1


def test_what_a_killed_save_left_is_removed(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    left = tmp_path / "run/checkpoints/.step-00000005.partial"
    left.mkdir()
    run_here(tmp_path / "run", "--resume", "--steps", 13)
    assert not left.exists()


def test_devices_are_known_by_their_whole_names():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA L40") is peak_flops("NVIDIA RTX A4000") is None


def test_a_checkpoint_of_a_larger_model_is_refused(reference, tmp_path, monkeypatch):
    shutil.copytree(reference, tmp_path / "run")
    monkeypatch.setitem(CONFIGS, "llama", dataclasses.replace(CONFIG, num_hidden_layers=1))
    with pytest.raises(UserError, match=r"does not fit this model: exp_avg.model.layers.1.*found \[.*, expected none"):
        run_here(tmp_path / "run", "--resume", "--steps", 13)


def test_refusals(reference, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds a run already.*--resume"):
        run_here(reference)
    (tmp_path / "early").mkdir()
    (tmp_path / "early/metrics.jsonl").write_text('{"step": 1}\n')  # before its first checkpoint
    with pytest.raises(UserError, match="early: holds a run already"):
        run_here(tmp_path / "early")
    for flag, value in (("--clip", 0), ("--seed", 10**400), ("--keep", 0), ("--beta2", "nan"), ("--epochs", "inf")):
        with pytest.raises(UserError, match=f"{flag}: found {str(value)[:9]}.*, expected a (whole )?number"):
            run_here(tmp_path, flag, value)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="0.0 MB free on its disk, expected .* for 2"):
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        run_here(tmp_path)
    (tmp_path / "checkpoints/step-00000007").mkdir(parents=True)
    with pytest.raises(UserError, match="step-00000007: not a whole checkpoint"):
        run_here(tmp_path, "--resume")


def test_nothing_is_made_of_weights_that_the_last_update_broke(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 1e39)  # more than a flag may ask for
    with pytest.raises(UserError, match="step 1: its update left weights that are not finite.*there is no checkpoint"):
        run_here(tmp_path, "--steps", 2, "--eval-every", 1)
    with pytest.raises(UserError, match="step 1: its update left weights"):  # nor when a signal ends the next step
        run_here(tmp_path / "signal", "--fault", "signal", "--fault-step", 2)
    assert not (tmp_path / "weights.pt").exists() and "nan" not in (tmp_path / "metrics.jsonl").read_text().lower()


def test_one_run_at_a_time(reference, tmp_path):
    """From before the first look at the directory until the end; what an earlier process left is no obstacle."""
    shutil.copytree(reference, tmp_path / "run")
    with locked(tmp_path / "run/.lock"), pytest.raises(UserError, match=f"another run is.*process {os.getpid()} on "):
        run_here(tmp_path / "run", "--resume", "--steps", 13)
    with exclusive_output(Settings(output=str(tmp_path / "new")), distributed.setup("cpu")):
        with pytest.raises(UserError, match="another run is writing there"):
            run_here(tmp_path / "new")
    run_here(tmp_path / "run", "--resume", "--steps", 13)
    (tmp_path / "new/metrics.jsonl").touch()  # of a run that failed before its first step
    run_here(tmp_path / "new", "--steps", 1)


def test_a_directory_that_another_machine_does_not_see_is_refused(tmp_path, monkeypatch):
    """Its processes would write their parts of a checkpoint elsewhere, and only a resume would tell. What an earlier
    run left there, whole and with its lock, does not make it the same directory."""
    answers = iter([None, str(tmp_path / "elsewhere/.seen-1"), None])
    monkeypatch.setattr(distributed.World, "gather", lambda world, value: [next(answers), value])
    second = dataclasses.replace(distributed.setup("cpu"), rank=1, size=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    with pytest.raises(UserError, match="does not see what the first process made there.*all machines share"):
        with exclusive_output(Settings(output=str(tmp_path / "run")), second):
            pass


def test_where_the_file_system_has_no_locks_there_are_none(tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    run_here(tmp_path, "--steps", 1)
    assert f"{tmp_path}/.lock: cannot be locked (No locks available): see to it" in capsys.readouterr().err


def test_a_run_of_another_kind_is_not_resumed(reference, tmp_path, monkeypatch):
    shutil.copytree(reference, tmp_path / "run")
    monkeypatch.setattr(Settings, "training", "something else")
    with pytest.raises(UserError, match="step-00000012: found a run of any kind, expected one of something else"):
        run_here(tmp_path / "run", "--resume")


def test_a_copy_of_a_checkpoint_is_the_users(reference, tmp_path):
    checkpoints = shutil.copytree(reference, tmp_path / "run") / "checkpoints"
    shutil.copytree(checkpoints / "step-00000012", checkpoints / "step-00000012-good")
    run_here(tmp_path / "run", "--resume", "--steps", 14, "--save-every", 1)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000012-good", "step-00000013", "step-00000014"]


def test_all_processes_resume_from_the_checkpoint_that_the_first_sees(reference, tmp_path, monkeypatch):
    """Another machine's view of a shared directory may be older."""
    latest = checkpoints.latest
    shutil.copytree(reference, tmp_path / "run")
    world = SimpleNamespace(first=False, gather=lambda value: [latest(tmp_path / "run/checkpoints"), value])
    monkeypatch.setattr(checkpoints, "latest", lambda folder: None)
    loaded = []
    monkeypatch.setattr(checkpoints, "load", lambda path, *rest: loaded.append(path.name) or (12, {}))
    assert start_or_resume(tmp_path / "run", None, None, world, {})[0] == 12 and loaded == ["step-00000012"]


def test_resuming_nothing_says_so(tmp_path, capsys):
    run_here(tmp_path, "--resume", "--steps", 1)
    assert f"{tmp_path}: no checkpoint to resume from, the run starts at its beginning" in capsys.readouterr().out


def test_resuming_a_finished_run_says_so(reference, tmp_path, capsys):
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run/weights.pt").unlink()
    run_here(tmp_path / "run", "--resume")
    assert "nothing is left to do: all 12 steps were done before" in capsys.readouterr().out
    assert same(weights(tmp_path / "run"), weights(reference)) and metrics(tmp_path / "run") == metrics(reference)


def test_resuming_says_what_changed(reference, tmp_path, capsys, monkeypatch):
    shutil.copytree(reference, tmp_path / "run")
    monkeypatch.setattr(Records, "key", "other")
    path = tmp_path / "run/checkpoints/step-00000012/run.json"
    saved = json.loads(path.read_text())
    del saved["facts"]["dtype"], saved["facts"]["training"]  # as of a time that did not have these
    path.write_text(json.dumps(saved))
    run_here(tmp_path / "run", "--resume", "--steps", 13, "--learning-rate", 0.5, "--max-length", 3000)
    assert "resuming after step 12" in (said := capsys.readouterr().out) and "nothing is left" not in said
    assert "max_length 3000 is beyond the 2048 positions" in said and "--max-length 2048" in said
    assert not any(name in said for name in ("warmup_steps", "resume False", "dtype"))
    assert "learning_rate 0.01 -> 0.5" in said and "steps 12 -> 13" in said and "tokenised_data tiny -> other" in said


def test_held_out_loss_by_language(plain):
    data = Records(9, seed=1)
    expected = {}
    for record in range(9):
        ids, labels = map(torch.from_numpy, data[record])
        with torch.no_grad():
            losses = F.cross_entropy(plain(ids[None])[0], labels, reduction="none")[labels >= 0]
        for name in ("loss", f"loss/{data.language_names[data.languages[record]]}"):
            expected.setdefault(name, []).append(losses)
    expected = {name: torch.cat(losses).mean().item() for name, losses in expected.items()}
    found = held_out_loss(plain, distributed.setup("cpu"), data, np.arange(9), tokens=30)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_held_out_loss_that_is_not_finite_is_null(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "held_out_loss", lambda *_, **__: {"loss": math.nan, "loss/deu": 1.0})
    run_here(tmp_path)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["held_out"] for row in rows if "held_out" in row] == 3 * [{"loss": None, "loss/deu": 1.0}]


@pytest.mark.parametrize("training, measured, told", [
    (True, {"loss": 1.0, "loss/deu": 2.0}, "loss 1.0000"), (False, {}, "records: none")])
def test_dropout_is_off_while_held_out_records_are_measured(tmp_path, capsys, training, measured, told):
    """And before and after as the caller had it; what is measured by language is not told."""
    settings, modes = Settings(output=str(tmp_path), steps=2, eval_every=1), []
    world, model = setup(settings)
    model.train(training)
    train(model, world, settings, make_stream(settings, world),
          lambda *batch: modes.append(model.training) or sft_loss(*batch),
          lambda stopped: modes.append(model.training) or measured)
    assert modes == 2 * (3 * [training] + [False])
    assert f"step 2: held-out {told}\n" in capsys.readouterr().out


def test_metrics_on_a_full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with pytest.raises(UserError, match="/dev/full: cannot be written: No space left.*last checkpoint"):
        with contextlib.closing(open("/dev/full", "a")) as metrics:
            log(metrics, {"step": 1})


def test_learning_rate():
    settings = TrainingSettings(learning_rate=2.0, warmup_steps=4, final_learning_rate=0.1)
    rates = [learning_rate(step, 24, settings) for step in range(1, 25)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 0.2 + 0.9 * (1 + math.cos(math.pi / 20))])
    assert rates[13] == pytest.approx(1.1) and rates[-1] == pytest.approx(0.2)
    assert learning_rate(3, 3, settings) == 2.0  # all warm-up


def test_meter_counts_what_the_architecture_needs():
    """Two FLOPs a weight and token, and a pair of attending tokens; the backward twice the forward. CPUs: no MFU."""
    settings = Settings()
    world, model = setup(settings)
    batch = make_stream(settings, world).batch(0).micro_batches[0]
    meter = Meter(model, world)
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    pairs = sum(n * (n + 1) / 2 for n in batch.documents)
    forward = 2 * weights * len(batch.input_ids) + 2 * 97 * 32 * int((batch.labels >= 0).sum()) + 2 * 2 * 2 * 32 * pairs
    assert meter.flops([batch]) == pytest.approx(3 * forward)
    assert meter.lap(1e9, 100)["mfu"] is None
    assert attending_pairs((3, [2, 4])) == 6 + (2 * 3 + 3) + (4 * 3 + 10)


if __name__ == "__main__":
    run(main)
