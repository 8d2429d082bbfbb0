"""Checkpoints of a training run: sharded, whole or absent, readable at another world size.

`checkpoints/step-00000100/` holds what PyTorch's distributed checkpoint writes (every process its own shards of the
trained weights and of Adam's two moments) and run.json (the step; as facts, the settings and the data's key). Nothing
else is state: the order of the data and every random number follow from the seed and the step.

PyTorch pickles the metadata of a distributed checkpoint, so only the run's own output directory is ever read.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from minixllm.errors import UserError, expect
from minixllm.files import write_json

MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoints(folder) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one being written, or a user's copy of one, has another name."""
    return sorted(path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def latest(folder) -> Path | None:
    return max(checkpoints(folder), default=None)


def save(folder, model, optimizer, world, step: int, facts: dict, keep: int) -> None:
    """Write `folder`/step-N, then remove all but the last `keep`. A collective. UserError when the disk is full."""
    folder = Path(folder)
    final, partial = folder / f"step-{step:08}", folder / f".step-{step:08}.partial"
    failure = None
    if world.first:
        try:
            for left in folder.glob(".step-*.partial"):  # of a run killed while it wrote
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        except OSError as error:
            failure = str(error)
    failure = world.gather(failure)[0]
    try:
        if failure is None:
            dcp.save(_state(model, optimizer), checkpoint_id=partial)
        if failure is None and world.first:
            write_json(partial / "run.json", {"step": step, "facts": facts})
            os.rename(partial, final)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    except CheckpointException as error:  # raised on every rank, with what went wrong on each
        failure = "; ".join(str(reason) for reason, _ in error.failures.values())
        if "unexpected pos" in failure:  # how PyTorch's writer says that fewer bytes were written than given
            failure = f"the disk is full ({failure})"
    except OSError as error:
        failure = str(error)
    failure = next(filter(None, world.gather(failure)), None)
    if failure:
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{final}: checkpoint not written: {failure.splitlines()[0]}. "
                        f"The last whole one is {latest(folder) or 'none'}; --resume continues from it")


def changes(before: dict, facts: dict) -> list[str]:
    """Which facts differ from those of before, as "name: old -> new"."""
    return [f"{name} {before[name]} -> {value}" for name, value in facts.items()
            if name not in ("resume", "output", "steps_per_epoch") and before.get(name, value) != value]


def load(path, model, optimizer, facts: dict) -> tuple[int, dict]:
    """Fill model and optimizer from a checkpoint; (step, the facts that were saved with it). A collective.

    Raises UserError for a checkpoint that is not whole, of another kind of training, or of a model of other sizes.
    """
    with _whole(path):
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        step, before = expect(run["step"], int, "run.json: step", least=0, most=10**12), run["facts"]
        changed = changes(before, facts)
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        found = {name: [*of.size] for name, of in stored.items()}
    if before.get("training", facts["training"]) != facts["training"]:
        raise UserError(f"{path}: found a run of {before['training']}, expected one of {facts['training']}")
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        on = parameter.device if optimizer.defaults["fused"] else "cpu"
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=on),
                                      **{moment: torch.zeros_like(parameter) for moment in MOMENTS}}
    state = _state(model, optimizer)
    expected = {name: [*tensor.shape] for name, tensor in state.items()}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UserError(f"{path}: does not fit this model: {name}: found {found.get(name, 'none')}, "
                        f"expected {expected.get(name, 'none')}"
                        + f"; changed since it was saved: {', '.join(changed)}" * bool(changed))
    with _whole(path):
        dcp.load(state, checkpoint_id=path)
    return step, before


@contextlib.contextmanager
def _whole(path):
    """Turn what reading a damaged checkpoint raises into a UserError that says what --resume can do without it."""
    try:
        yield
    except (CheckpointException, OSError, EOFError, IndexError, MemoryError, RecursionError, pickle.UnpicklingError,
            ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        if isinstance(error, CheckpointException):
            error, _ = next(iter(error.failures.values()))
        before = max((other for other in checkpoints(path.parent) if other < path), default=None)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: not a whole checkpoint: {reason}. Without it, --resume "
                        f"{f'goes on from {before}' if before else 'begins anew'}") from None


def _state(model, optimizer) -> dict:
    """The trained tensors by name, and the moments of each: DTensors, which the checkpoint slices as it needs."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[name] = parameter.detach()
            state |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
    return state
