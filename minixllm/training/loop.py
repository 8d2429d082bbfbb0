"""The one training loop that instruction tuning and preference optimisation share.

A step is a function from a micro-batch to a *sum* of losses. Each sum is divided by the count of the whole global
batch, known beforehand, so that any split of the batch over micro-batches and processes gives the same gradient.
"""

import contextlib
import json
import math
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minixllm import plots
from minixllm.data.stream import in_order
from minixllm.distributed import World, explain_lost_peers, local
from minixllm.errors import UserError
from minixllm.files import atomic_write, finite, locked, write_json
from minixllm.settings import setting
from minixllm.training import checkpoints
from minixllm.training.losses import answer_logps
from minixllm.training.meter import Meter, announce
from minixllm.weights.hf_directory import check_target
from minixllm.weights.safetensors_files import fingerprint

OUTPUT = "directory of the run: checkpoints, metrics.jsonl and the trained model"
LOST = "Nothing was saved since the last checkpoint; --resume continues from it"
PATIENCE = 10.0  # seconds that a step may still take after a signal: torchrun and SLURM kill 30 after it


@dataclass
class TrainingSettings:
    """What every training run has; the scripts add their own, and say what `training` it is."""

    training = "any kind"

    model: str | None = setting(None, "Hugging Face directory to start from (config.json, safetensors, tokenizer)")
    data: list[str] = setting([], "files of records, or directories of them")
    held_out: list[str] = setting([], "the same, for held-out measures")
    output: str = setting("runs/run", OUTPUT)
    resume: bool = setting(False, "continue from the latest checkpoint in --output, or start where there is none")
    epochs: float = setting(3.0, "passes over the data", above=0)
    steps: int | None = setting(None, "optimiser steps, instead of --epochs", least=1)
    batch_size: int = setting(256, "rows of --max-length tokens a step, over all processes", least=1)
    micro_batch_size: int = setting(8, "rows a process computes at once; more memory, fewer passes", least=1)
    max_length: int = setting(1024, "tokens of a row, and of the longest record", least=1, most=2**24)
    learning_rate: float = setting(1e-4, "peak learning rate; the default suits LoRA, all weights of a large model "
                                         "want about 2e-5", above=0)
    warmup_steps: int = setting(100, "steps over which the learning rate rises linearly", least=0)
    final_learning_rate: float = setting(0.0, "where the cosine ends, as a share of the peak", least=0, most=1)
    weight_decay: float = setting(0.05, "decoupled weight decay; matrices only, no biases or norms", least=0, most=1)
    beta2: float = setting(0.999, "AdamW's decay of squared gradients (beta1 is 0.9)", least=0, most=0.99999)
    clip: float = setting(1.0, "gradients whose global norm is larger are scaled down to it", above=0)
    seed: int = setting(0, "of the initial weights, the order of the data and dropout", least=0, most=2**32 - 1)
    dtype: str = setting("auto", "what the forward and backward compute in; the trained weights are fp32; "
                                 "auto is bfloat16 where the processor has it", ("auto", "bfloat16", "float32"))
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward: less memory, a third more work")
    eval_every: int = setting(500, "steps between held-out losses; 0 for only the last", least=0)
    save_every: int = setting(500, "steps between checkpoints", least=1)
    keep: int = setting(2, "how many checkpoints are kept, the latest ones", least=1)

    def __post_init__(self):
        if bool(self.model) != bool(self.data):
            given, lacking = ("--model", "--data") if self.model else ("--data", "--model")
            raise UserError(f"{given} without {lacking}: expected both, or neither for the embedded default")
        if self.held_out and not self.data:
            raise UserError("--held-out without --data: expected both, or neither for the embedded default")


def train(model, world: World, settings: TrainingSettings, stream, loss_fn, evaluate=None) -> bool:
    """Train `model` (sharded, weights loaded) to the last step; False when a signal ended it earlier.

    stream.batch(step) -> Step(micro_batches of this process, count of the global batch), a pure function of the step
    that keeps its last result: each is asked for a step ahead.
    loss_fn(model, micro_batch) -> (summed loss, {name: summed quantity}); both are logged divided by the count.
    evaluate() -> {name: value} is logged every `eval_every` steps and at the end.

    Writes metrics.jsonl, with matplotlib curves.png, and checkpoints below settings.output. After SIGTERM or Ctrl-C
    saves at the next step boundary and returns; a step that goes on for longer than PATIENCE is given up before its
    next micro-batch, and what was before it saved. Raises UserError on a loss, gradient or weight that is not finite,
    a full disk, a lost process.
    """
    output = Path(settings.output)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(trained, settings)
    steps = settings.steps or max(1, round(settings.epochs * stream.steps_per_epoch))
    tokens_per_step = stream.data.lengths[stream.records].sum() / stream.steps_per_epoch
    announce(model, world, settings, steps, tokens_per_step)
    facts = asdict(settings) | {"training": settings.training, "tokenised_data": stream.data.key}
    if settings.model:
        facts["base_weights"] = fingerprint(settings.model)
    first = start_or_resume(output, model, optimizer, world, facts)
    if first >= steps and world.first:  # the model is saved anew all the same: one that is there may be of another step
        print(f"nothing is left to do: all {steps} steps were done before; the model of step {first} is saved anew")
    model.gradient_checkpointing = settings.gradient_checkpointing
    training = model.training  # whether there is dropout is the caller's choice
    meter, average = Meter(model, world, settings), None
    metrics = (output / "metrics.jsonl").open("a", encoding="utf-8") if world.first else None
    bar = tqdm(total=steps, initial=first, unit="step", disable=not world.first, mininterval=0.5, dynamic_ncols=True)

    def save(step):
        log(metrics, synced=True)
        checkpoints.save(output / "checkpoints", model, optimizer, world, step, facts, settings.keep)

    def tell_stopped(step):
        if world.first:
            saved = f"step {step} is saved, --resume continues from it" if step else "no step was done yet"
            bar.write(f"stopped by a signal: {saved}")

    with bar, contextlib.closing(metrics) if metrics else contextlib.nullcontext(), stop_signals() as stopped:
        for step in range(first + 1, steps + 1):
            with explain_lost_peers(f"step {step}", LOST):
                rate = learning_rate(step, steps, settings)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                row = train_step(model, world, settings, stream, loss_fn, optimizer, meter, step, stopped)
                if row is None:
                    if step - 1 > first and (step - 1) % settings.save_every:
                        check_weights(trained, world, step - 1, output)
                        save(step - 1)
                    tell_stopped(step - 1)
                    return False
                stop = world.any(stopped)
                row = {"step": step, **row, "learning_rate": rate} | meter.lap(row.pop("flops"), row["tokens"])
                log(metrics, row)
                average = row["loss"] if average is None else 0.95 * average + 0.05 * row["loss"]
                mfu = "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}"
                bar.set_postfix_str(f"loss {average:.3f}, {row['tokens_per_second']:,.0f} tokens/s, MFU {mfu}", False)
                bar.update()
                measured = evaluate and (step == steps or settings.eval_every and step % settings.eval_every == 0)
                saved = stop or step == steps or step % settings.save_every == 0
                if measured or saved:
                    check_weights(trained, world, step, output)
                if measured:
                    model.eval()
                    held_out = evaluate()
                    model.train(training)
                    log(metrics, {"step": step, "held_out": held_out})
                    if world.first:
                        told = (f"{name} {value:.4f}" for name, value in held_out.items() if "/" not in name)
                        bar.write(f"step {step}: held-out {', '.join(told) or 'records: none'}")
                        plots.curves(output)
                    meter.restart()
                if saved:
                    save(step)
                    meter.restart()
            if stop and step < steps:
                tell_stopped(step)
                return False
    return True


def adamw(parameters, settings):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) that decays matrices, no biases or norms."""
    return torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ], lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=True)


def train_step(model, world, settings, stream, loss_fn, optimizer, meter, step, stopped) -> dict | None:
    """One optimiser step. Returns the global batch's mean loss and other means, gradient norm, tokens, FLOPs; None for
    a step given up PATIENCE after a signal, which changed nothing.
    """
    batch = stream.batch(step - 1)
    if batch.count == 0:
        raise UserError(f"step {step}: every token of the batch is masked, nothing can be learnt from its records: "
                        + first_few(where(stream, batch.micro_batches)))
    # dropout, the same after a resume; a CPU's generator takes 32 bits of its seed
    torch.manual_seed(int(np.random.SeedSequence([settings.seed, step, world.rank]).generate_state(1)[0]))
    losses, sums = [], {}
    for micro_batch in batch.micro_batches:
        if world.any(stopped and time.monotonic() - stopped[0] > PATIENCE):
            optimizer.zero_grad()
            return None
        loss, extras = loss_fn(model, micro_batch)
        (loss / batch.count).backward()
        losses.append(loss.detach())
        for name, value in extras.items():
            sums[name] = sums.get(name, 0.0) + value.detach()

    # Clipping works on the local shards: their squares are added over processes along with everything else that is
    # summed, so that a step has one small collective and one wait for the device.
    gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    tokens = sum(len(m.input_ids) for m in batch.micro_batches if m.records)
    totals = torch.stack([torch.stack(losses).double().sum(), squares, *(sums[name].double() for name in sorted(sums))])
    stream.batch(step)  # the next one, made and kept while a GPU is still at this one
    totals = torch.cat([totals, totals.new_tensor([tokens, meter.flops(batch.micro_batches)])])
    loss, squares, *values, tokens, flops = world.sum(totals).tolist()
    norm = math.sqrt(squares)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        report_not_finite(world, settings, step, loss / batch.count, norm, stream, batch, losses)
    torch._foreach_mul_(gradients, min(1.0, settings.clip / (norm + 1e-6)))
    optimizer.step()
    optimizer.zero_grad()
    means = {name: value / batch.count for name, value in zip(sorted(sums), values)}
    return {"loss": loss / batch.count, **means, "gradient_norm": norm, "tokens": int(tokens), "flops": flops}


def report_not_finite(world, settings, step, loss, norm, stream, batch, losses):
    """Write which records were in the batch (null for a loss that is not finite), and stop.

    Nothing is saved: the last checkpoint is from before.
    """
    mine = [{"loss": float(loss), "records": where(stream, [m])} for m, loss in zip(batch.micro_batches, losses)]
    micro_batches = sum(world.gather(mine), [])
    path = Path(settings.output) / f"not-finite-step-{step}.json"
    if world.first:
        write_json(path, micro_batches)
    bad = [m for m in micro_batches if not math.isfinite(m["loss"])] or micro_batches
    raise UserError(f"step {step}: loss {loss} and gradient norm {norm}, expected finite numbers: is the learning rate "
                    f"too high? Its records: {first_few(sum((m['records'] for m in bad), []))} (all in {path}). "
                    f"{_last(settings.output)}")


def check_weights(trained, world, step: int, output) -> None:
    """Raise UserError before anything is made of weights that the last update left not finite."""
    norms = torch.stack(torch._foreach_norm([local(parameter.detach()) for parameter in trained]))
    if world.sum((~norms.isfinite()).sum()).item():
        raise UserError(f"step {step}: its update left weights that are not finite numbers: is the learning rate too "
                        f"high? {_last(output)}")


def _last(output) -> str:
    latest = checkpoints.latest(Path(output) / "checkpoints")
    return f"Nothing was saved: {f'the last checkpoint is {latest}' if latest else 'there is no checkpoint yet'}"


def where(stream, micro_batches) -> list[str]:
    return [stream.data.where(record) for m in micro_batches for record in m.records]


def first_few(records, few=8) -> str:
    return "; ".join(records[:few]) + (f" and {len(records) - few} more" if len(records) > few else "")


def learning_rate(step: int, steps: int, settings) -> float:
    """Linear warm-up to the peak, then half a cosine down to `final_learning_rate` of it at the last step."""
    peak, floor = settings.learning_rate, settings.final_learning_rate
    warmup = min(settings.warmup_steps, steps)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@contextlib.contextmanager
def claimed(settings, world: World):
    """Hold the run's directory for this run alone, so that what it writes there neither mixes with another's nor
    replaces anything unasked. Raises UserError on every process where that cannot be.
    """
    output = Path(settings.output)
    model, metrics = output / "model", output / "metrics.jsonl"
    with contextlib.ExitStack() as held:
        with world.one_by_one():
            if output.exists() and not output.is_dir():
                raise UserError(f"{output}: found a file, expected --output to name a directory")
            if settings.model and Path(settings.model).resolve() == model.resolve():
                raise UserError(f"{settings.model}: is both --model and where --output {output} leaves the trained "
                                "model, which would replace it; expected another --output")
            if world.first:  # for all
                held.enter_context(locked(output / ".lock", f"{output}: another run is writing there"))
            elif not (output / ".lock").exists():
                raise UserError(f"{output}: {socket.gethostname()} does not see what the first process made there: "
                                "expected --output on a disk that all machines share, for the checkpoints")
            begun = checkpoints.latest(output / "checkpoints") or (metrics.exists() and metrics.stat().st_size > 0)
            if begun and not settings.resume:
                raise UserError(f"{output}: holds a run already, expected a new directory; "
                                "--resume continues it, --output names another")
            check_target(model)
        yield


def start_or_resume(output: Path, model, optimizer, world, facts: dict) -> int:
    """The step to continue after: 0, or that of the latest checkpoint, past which metrics.jsonl is cut."""
    # as the first process sees the directory: another machine's view of it may be older
    checkpoint = world.gather(checkpoints.latest(output / "checkpoints") if world.first else None)[0]
    metrics, step = output / "metrics.jsonl", 0
    if not checkpoint and facts.get("resume") and world.first:
        print(f"{output}: no checkpoint to resume from, the run starts at its beginning")
    if checkpoint:
        step, changed = checkpoints.load(checkpoint, model, optimizer, facts)
        if world.first:
            print(f"resuming after step {step} from {checkpoint}" + (f" with {', '.join(changed)}" if changed else ""))
    if world.first:
        kept = []
        for line in metrics.read_text("utf-8", "replace").splitlines() if metrics.exists() else []:
            with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):  # the last may be half written
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        with atomic_write(metrics) as file:
            file.writelines(kept)
    return step


def log(metrics, *rows: dict, synced: bool = False) -> None:
    """Write rows to metrics.jsonl, where this process has it open; synced: all of it to the disk itself."""
    if metrics:
        try:
            metrics.writelines(json.dumps(finite(row)) + "\n" for row in rows)
            metrics.flush()
            if synced:
                os.fsync(metrics.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # closing it writes once more, and is done once
                metrics.close()
            raise UserError(f"{metrics.name}: cannot be written: {error.strerror}. {LOST}") from None


@contextlib.contextmanager
def stop_signals():
    """A list that is empty until SIGTERM or Ctrl-C, then of their times; the loop looks at it where it can stop."""
    stopped = []
    before = {number: signal.signal(number, lambda *_: stopped.append(time.monotonic()))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.no_grad()
def held_out_means(world: World, data, records, tokens: int, measure) -> dict[str, float]:
    """Means over held-out records: {"loss": of all, "loss/deu": of one language, ...}. A collective.

    measure(batch) -> {"loss": of each record (R,), ...}. Sums over records are divided by `data.count`: the number of
    supervised tokens, or of pairs. tokens: how many are computed at a time. {} where no record is held out.
    """
    if not len(records):
        return {}
    totals = torch.zeros(())
    for batch in in_order(data, records, tokens, world.rank, world.size):
        quantities = measure(batch)
        rows = torch.stack([*quantities.values()], dim=1).double().cpu()  # (R, quantities)
        languages = torch.as_tensor(data.languages[batch.records], dtype=torch.long)
        totals = totals + rows.new_zeros(len(data.language_names), rows.shape[1]).index_add_(0, languages, rows)
    totals = world.sum(totals.to(world.device)).cpu()
    means = dict(zip(quantities, (totals.sum(0) / data.count(records)).tolist()))
    for row, name in sorted(enumerate(data.language_names), key=lambda language: language[1]):
        if len(own := records[data.languages[records] == row]):
            means |= {f"{quantity}/{name}": total / data.count(own)
                      for quantity, total in zip(quantities, totals[row].tolist())}
    return means


def held_out_loss(model, world: World, data, records, tokens: int) -> dict[str, float]:
    """Mean loss per supervised token, as `held_out_means` gives it."""
    return held_out_means(world, data, records, tokens, lambda batch: {"loss": -answer_logps(model, batch)})
