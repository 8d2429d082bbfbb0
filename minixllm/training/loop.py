"""The one training loop that instruction tuning and preference optimisation share.

A step is a function from a micro-batch to a *sum* of losses. Gradient accumulation: each sum is divided by the count of
the whole global batch, which is known beforehand, and the gradients of all micro-batches and processes are added. So
any split of the batch gives the same gradient, and a mean of means cannot weigh short batches too much.
"""

import contextlib
import math
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minixllm import plots
from minixllm.distributed import World, explain_lost_peers, local
from minixllm.errors import UserError
from minixllm.files import write_json
from minixllm.training import checkpoints
from minixllm.training.meter import Meter, announce
from minixllm.training.run_directory import LOST, log, open_metrics, start_or_resume, tell_repeated
from minixllm.weights.safetensors_files import fingerprint

PATIENCE = 10.0  # seconds that a step may still take after a signal: torchrun and SLURM kill 30 after it


def train(model, world: World, settings, stream, loss_fn, evaluate=None) -> bool:
    """Train `model` (sharded, weights loaded) to the last step; False if a signal ended it earlier.

    stream.batch(step) -> Step(micro_batches of this process, count of the global batch), a pure function of the step.
    loss_fn(model, micro_batch) -> (summed loss, {name: summed quantity}); both are logged divided by the count.
    evaluate(stopped) -> {name: value} is logged every `eval_every` steps and at the end; None if `stopped` came true.

    Writes metrics.jsonl, curves.png (with matplotlib) and checkpoints below settings.output. After SIGTERM or Ctrl-C
    the step under way is finished and saved; one that takes over PATIENCE more is given up, and what was before it
    saved. A measurement is given up at once, and made when the run is resumed. Raises UserError for a loss, gradient or
    weight that is not finite, a full disk, a lost process.
    """
    output, trained = Path(settings.output), [p for p in model.parameters() if p.requires_grad]
    optimizer, meter = adamw(trained, settings), Meter(model, world)
    steps = settings.steps or max(1, round(settings.epochs * stream.steps_per_epoch))
    announce(model, world, settings, steps, stream.data.lengths[stream.records].sum() / stream.steps_per_epoch)
    facts = facts_of(settings, stream, model)
    first, measured, before = start_or_resume(output, model, optimizer, world, facts)
    saved = first  # the last step that is
    model.gradient_checkpointing = settings.gradient_checkpointing

    def to_measure(step):
        due = step == steps or settings.eval_every and step % settings.eval_every == 0
        return evaluate and due and step > measured

    def save(step):
        nonlocal saved
        if step > saved:
            check_weights(trained, world, step, output)
            log(metrics, synced=True)
            checkpoints.save(output / "checkpoints", model, optimizer, world, step, facts, settings.keep)
            saved = step
            meter.restart()

    if world.first and first:
        tell_resumed(stream, first, steps, before, nothing_left=first >= steps and not to_measure(first))
    bar = tqdm(total=steps, initial=first, unit="step", disable=not world.first, mininterval=0.5, dynamic_ncols=True)
    with bar, stop_signals() as stopped, open_metrics(output, world) as metrics:
        for step in range(first, steps + 1):  # at step `first` only what a signal left undone: its measurement
            stop, whole = False, True
            with explain_lost_peers(f"step {step}", LOST):
                if step > first:
                    set_learning_rate(optimizer, learning_rate(step, steps, settings))
                    row = train_step(model, world, settings, stream, loss_fn, optimizer, meter, step, stopped)
                    if row is None:
                        save(step - 1)
                        return tell_stopped(bar, world, step - 1)
                    report(bar, metrics, row)
                    stop = world.any(stopped)
                if stop or step == steps or step % settings.save_every == 0:
                    save(step)  # before it is measured, for that may take long and fail
                if to_measure(step):
                    check_weights(trained, world, step, output)
                    whole = measure(model, evaluate, stopped, metrics, bar, step, output)
                    stop = world.any(stopped)
                    meter.restart()
                if not whole or stop and step < steps:
                    save(step)
                    return tell_stopped(bar, world, step)
    return True


def facts_of(settings, stream, model) -> dict:
    """What a checkpoint tells of its run, so that a resumed one can say what has changed."""
    facts = asdict(settings) | {"training": settings.training, "tokenised_data": stream.data.key,
                                "steps_per_epoch": stream.steps_per_epoch,
                                "computed_in": str(model.compute_dtype).removeprefix("torch.")}
    return facts | ({"base_weights": fingerprint(settings.model)} if settings.model else {})


def tell_resumed(stream, first: int, steps: int, before: dict, nothing_left: bool) -> None:
    if told := tell_repeated(stream, first, before):
        print(told)
    if nothing_left:  # the model is saved anew all the same: one that is there may be of another step
        print(f"nothing is left to do: all {steps} steps were done before; the model of step {first} is saved anew")


def tell_stopped(bar, world, step: int) -> bool:
    """Say where a signal ended the run; False, for `train` to return."""
    if world.first:
        bar.write("stopped by a signal: "
                  + (f"step {step} is saved, --resume continues from it" if step else "no step was done yet"))
    return False


def report(bar, metrics, row: dict) -> None:
    """Log a step and show it."""
    log(metrics, row)
    mfu = "unknown" if row["mfu"] is None else f"{row['mfu']:.1%}"
    bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s, MFU {mfu}", False)
    bar.update()


def measure(model, evaluate, stopped, metrics, bar, step: int, output) -> bool:
    """Log the held-out measures after a step, without dropout; False if a signal came before they were complete."""
    training = model.training  # whether there is dropout in training is the caller's choice
    model.eval()
    held_out = evaluate(stopped)
    model.train(training)
    if held_out is None:
        return False
    log(metrics, {"step": step, "held_out": held_out})
    if metrics:
        told = ", ".join(f"{name} {value:.4f}" for name, value in held_out.items() if "/" not in name)
        bar.write(f"step {step}: held-out {told or 'records: none'}")
        plots.curves(output)
    return True


def adamw(parameters, settings):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) that decays matrices, no biases or norms."""
    return torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ], lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=True)


def train_step(model, world, settings, stream, loss_fn, optimizer, meter, step, stopped) -> dict | None:
    """One optimiser step. Returns its row of metrics.jsonl: means over the global batch, and timings.

    None is returned for a step that was given up PATIENCE seconds after a signal; it has changed nothing.
    """
    batch = stream.batch(step - 1)
    if batch.count == 0:
        raise UserError(f"step {step}: every token of the batch is masked, nothing can be learnt from its records: "
                        + first_few(where(stream, batch.micro_batches)))
    # Dropout then draws the same numbers after a resume. A CPU's generator takes 32 bits of its seed.
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

    # Everything that is summed over processes goes into one small collective, for one wait for the device: the loss,
    # and for clipping the squares of each process's own part of the gradients.
    gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    tokens = sum(len(m.input_ids) for m in batch.micro_batches if m.records)
    totals = torch.stack([torch.stack(losses).double().sum(), squares, *(sums[name].double() for name in sorted(sums))])
    stream.batch(step)  # the next one is made and kept while a GPU still computes this one
    totals = torch.cat([totals, totals.new_tensor([tokens, meter.flops(batch.micro_batches)])])
    loss, squares, *values, tokens, flops = world.sum(totals).tolist()
    norm = math.sqrt(squares)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        report_not_finite(world, settings, step, loss / batch.count, norm, stream, batch, losses)
    # 1e-6 keeps a norm of 0 from dividing by 0; torch.nn.utils.clip_grad_norm_ has the same.
    torch._foreach_mul_(gradients, min(1.0, settings.clip / (norm + 1e-6)))
    optimizer.step()
    optimizer.zero_grad()
    means = {name: value / batch.count for name, value in zip(sorted(sums), values)}
    return {"step": step, "loss": loss / batch.count, **means, "gradient_norm": norm, "tokens": int(tokens),
            "learning_rate": optimizer.param_groups[0]["lr"], **meter.lap(flops, tokens)}


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


def set_learning_rate(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(step: int, steps: int, settings) -> float:
    """Linear warm-up to the peak, then half a cosine down to `final_learning_rate` of it at the last step."""
    peak, floor = settings.learning_rate, settings.final_learning_rate
    warmup = min(settings.warmup_steps, steps)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


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
