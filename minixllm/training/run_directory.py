"""The directory of a run: one run at a time writes there, metrics.jsonl grows there, and --resume finds its place."""

import contextlib
import json
import os
import socket
import tempfile
from pathlib import Path

from minixllm.errors import UserError
from minixllm.files import atomic_write, finite, locked
from minixllm.training import checkpoints
from minixllm.weights.hf_directory import check_target

LOST = "Nothing was saved since the last checkpoint; --resume continues from it"


@contextlib.contextmanager
def exclusive_output(settings, world):
    """Hold settings.output for this run alone: nothing there is mixed with another run's, or replaced unasked.

    Raises UserError on every process if the directory is in use, holds a run already, or could not take what the run
    will write at its end.
    """
    output = Path(settings.output)
    model, metrics = output / "model", output / "metrics.jsonl"
    with contextlib.ExitStack() as held:
        with world.one_by_one():
            for folder in (output, model, output / "adapter", output / "checkpoints"):
                if folder.exists() and not folder.is_dir():
                    raise UserError(f"{folder}: found a file, expected --output to name a directory for the run")
            if settings.model and Path(settings.model).resolve() == model.resolve():
                raise UserError(f"{settings.model}: is both --model and where --output {output} leaves the trained "
                                "model, which would replace it; expected another --output")
            if world.first:  # for all
                held.enter_context(locked(output / ".lock", f"{output}: another run is writing there"))
            begun = checkpoints.latest(output / "checkpoints") or (metrics.exists() and metrics.stat().st_size > 0)
            if begun and not settings.resume:
                raise UserError(f"{output}: holds a run already, expected a new directory; "
                                "--resume continues it, --output names another")
            check_target(model)
        _check_shared(output, world)
        yield


def _check_shared(output: Path, world) -> None:
    """Raise UserError on every process if one of them sees another directory of that name, however like this one.

    The first makes a file of a new name, which no machine can know from an earlier run or have in a cache.
    """
    if world.size == 1:
        return
    with tempfile.NamedTemporaryFile(dir=output, prefix=".seen-") if world.first else contextlib.nullcontext() as probe:
        name = world.gather(probe and probe.name)[0]
        blind = [host for host in world.gather(None if os.path.exists(name) else socket.gethostname()) if host]
    if blind:
        raise UserError(f"{output}: {blind[0]} does not see what the first process made there: "
                        "expected --output on a disk that all machines share, for the checkpoints")


def start_or_resume(output: Path, model, optimizer, world, facts: dict) -> tuple[int, int, dict]:
    """(the step to continue after, the last step that was measured, the facts at that time); (0, 0, {}) at the start.

    The step is that of the latest checkpoint. metrics.jsonl is cut after it.
    """
    # The first process's view counts: another machine's view of the directory may be older.
    checkpoint = world.gather(checkpoints.latest(output / "checkpoints") if world.first else None)[0]
    metrics, step, before, kept, measured = output / "metrics.jsonl", 0, {}, [], 0
    if not checkpoint and facts.get("resume") and world.first:
        print(f"{output}: no checkpoint to resume from, the run starts at its beginning")
    if checkpoint:
        step, before = checkpoints.load(checkpoint, model, optimizer, facts)
        if world.first:
            changed = checkpoints.changes(before, facts)
            print(f"resuming after step {step} from {checkpoint}" + (f" with {', '.join(changed)}" if changed else ""))
    if world.first:
        for line in metrics.read_text("utf-8", "replace").splitlines() if metrics.exists() else []:
            with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):  # the last may be half written
                if (row := json.loads(line))["step"] <= step:
                    kept.append(line + "\n")
                    measured = row["step"] if "held_out" in row else measured
        with atomic_write(metrics) as file:
            file.writelines(kept)
    return step, world.gather(measured)[0], before


def open_metrics(output: Path, world):
    """metrics.jsonl, to add to, in the first process; nothing in the others."""
    return (output / "metrics.jsonl").open("a", encoding="utf-8") if world.first else contextlib.nullcontext()


def log(metrics, *rows: dict, synced: bool = False) -> None:
    """Write rows to metrics.jsonl in the one process that has it open; synced: wait until all of it is on the disk.

    Raises UserError if the disk is full, or if the file is no longer at its place: the run's directory was then moved
    or removed, its lock holds nobody back any more, and its checkpoints would be written somewhere else.
    """
    if metrics is None:
        return
    try:
        metrics.writelines(json.dumps(finite(row)) + "\n" for row in rows)
        metrics.flush()
        if synced:
            os.fsync(metrics.fileno())
        moved = not os.path.exists(metrics.name) or not os.path.samestat(os.stat(metrics.name),
                                                                         os.fstat(metrics.fileno()))
    except OSError as error:
        with contextlib.suppress(OSError):  # closing it tries to write once more
            metrics.close()
        raise UserError(f"{metrics.name}: cannot be written: {error.strerror}. {LOST}") from None
    if moved:
        raise UserError(f"{metrics.name}: was removed or replaced while the run was writing it; expected --output to "
                        f"be left alone. {LOST}")


def tell_repeated(stream, step: int, before: dict) -> str | None:
    """What to say of records that come twice or not at all, where an epoch now has another number of steps.

    The order of an epoch does not depend on the batch size, but where step `step` stands in it does: before it stood at
    step / before["steps_per_epoch"] epochs. None where it is the same.
    """
    old, new = (step / each for each in (before.get("steps_per_epoch", stream.steps_per_epoch), stream.steps_per_epoch))
    records = stream.records_between(min(old, new), max(old, new))
    if not records:
        return None
    shown = "; ".join(map(stream.data.where, records[:3])) + f" and {len(records) - 3} more" * (len(records) > 3)
    return (f"an epoch now has {stream.steps_per_epoch} steps, it had {before['steps_per_epoch']}: step {step} now "
            f"stands at epoch {new:.2f}, and stood at {old:.2f}: {len(records)} records "
            f"{'come once more' if new < old else 'are passed over'}: {shown}")
