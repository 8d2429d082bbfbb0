"""Processes and devices: torchrun or plain python, FSDP2 on any number of them, and what happens when one dies."""

import contextlib
import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minixllm.errors import UserError

HANG = timedelta(hours=1)  # a collective that takes longer has lost a peer; a peer that dies is noticed at once


@dataclass(frozen=True)
class World:
    """The processes of a run, and which one this is. `sum`, `any` and `gather` are collectives: all call them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum of a small tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag) -> bool:
        """Whether it holds in any process; asked on the CPU, so that a GPU is not waited for."""
        return bool(flag if self.size == 1 else self.sum(torch.tensor(float(bool(flag)))))

    def gather(self, value) -> list:
        """Every process's `value` (any object), in the order of ranks, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def one_by_one(self):
        """The first process runs the block before the others do, which then find what it made.

        If it fails, the others raise a UserError that says so.
        """
        failure = None
        if not self.first and (failure := self.gather(None)[0]):
            raise UserError(f"the first process failed: {failure}")
        try:
            yield
        except Exception as error:
            failure = str(error)
            raise
        finally:
            if self.first:
                self.gather(failure)


def setup(device: str | None = None) -> World:
    """This process's place in the world: torchrun's, or a world of one under plain python.

    `device`: "cpu" or "cuda"; None takes CUDA where there is one. One process a GPU; gloo between CPU processes.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found, "
                            "expected one for each process (torchrun --nproc-per-node)")
        torch.cuda.set_device(local_rank)
        place = torch.device("cuda", local_rank)
    else:
        place = torch.device("cpu")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=HANG)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=HANG)
    size = dist.get_world_size()
    return World(dist.get_rank(), size, place, init_device_mesh(kind, (size,)))


def is_first() -> bool:
    """Whether this is the process that writes and prints, where no `World` is at hand."""
    return not dist.is_initialized() or dist.get_rank() == 0


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model, world: World, dtype: torch.dtype):
    """FSDP2 over `model` in place: one group a block, and a root group for embedding, head and last norm together.
    With one process nothing is sharded, and the same numbers are computed without FSDP2. The exception is a base held
    in bf16 but computed with in fp32, whose layers FSDP2 converts one at a time.

    Weights, gradients and their reduction stay in the parameters' own type (fp32); the forward and backward compute in
    `dtype`. Gradients are *summed* over processes, for the loss is already divided by the global count.
    """
    model.compute_dtype, model.is_gathered = dtype, False
    if world.size == 1 and all(parameter.dtype in (dtype, torch.float32) for parameter in model.parameters()):
        # Nothing to shard. FSDP2 would copy every weight and gradient whole, the embedding's too: a third of a step.
        _cast_when_called(model, dtype)
        return model
    # Imported here, because that takes a second, which one process does without.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Inputs are not cast: blocks receive fp32 rotary angles and integer positions that must stay what they are.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        # The root is needed again at once: the backward begins with the head.
        fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=module is not model)
        if world.size > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # or a factor of 1 asks for an operation only NCCL has
    embedding = model.embedding
    if dtype != torch.float32 and world.device.type == "cpu" and embedding.weight.requires_grad:
        # A CPU sums the gradients of a token's rows in the table's type, and sums of bf16 stagnate: of those of 8,000
        # equal tokens nine tenths are lost. So they are summed in the rows that are looked up, held in fp32.
        def look_up(ids):
            rows, places = ids.unique(return_inverse=True)
            return F.embedding(places, embedding.weight[rows].float()).to(dtype)

        embedding.forward = look_up
    model.register_forward_hook(_reshard_without_backward)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # a loss never changes it in place
    return model


def _cast_when_called(model, dtype: torch.dtype) -> None:
    """FSDP2's mixed precision for a world of one: each layer sees its weights in `dtype` while it is called.

    The head's, in a forward with labels, is left to `losses.token_logps`, which keeps its gradient in fp32.
    """
    def before(module, inputs):
        if not model.is_gathered:
            _show_weights(module, dtype)

    def after(module, inputs, output):
        if not model.is_gathered:
            _hide_weights(module)

    for module in model.modules():
        if isinstance(module, nn.Embedding):  # rows are cast once looked up, not the table
            module.register_forward_hook(lambda module, inputs, output: output.to(dtype))
        elif any(parameter.dtype != dtype for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after, always_call=True)


def _show_weights(module, dtype) -> None:
    """Cast copies as plain attributes, which hide the parameters of the same names."""
    vars(module).update({name: parameter.to(dtype) for name, parameter in module.named_parameters(recurse=False)})


def _hide_weights(module) -> None:
    for name, _ in module.named_parameters(recurse=False):
        vars(module).pop(name, None)


def is_sharded(thing: torch.Tensor | nn.Module) -> bool:
    """Whether FSDP2 holds this tensor (a DTensor) or this module in parts.

    Told by a method that only those have: importing their classes takes a second, which generation does without.
    """
    return hasattr(thing, "full_tensor" if isinstance(thing, torch.Tensor) else "unshard")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter or gradient, sharded or not."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor (then a collective), or the tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`full`, which every rank holds, sharded as `parameter` is."""
    if not is_sharded(parameter):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _reshard_without_backward(model, inputs, output) -> None:
    """Put the sharded weights back where no backward will: a save would otherwise see the computing copy."""
    if not torch.is_grad_enabled() and not model.is_gathered:
        for module in _sharded(model):
            module.reshard()


def _sharded(model) -> list[nn.Module]:
    return [module for module in model.modules() if is_sharded(module)]


@contextlib.contextmanager
def gathered(model):
    """Hold the whole weights (in the computing type) on every process: forwards then need no communication.

    So each process may run its own number of them, as generation does. Without gradients only. Nothing changes for a
    model that is gathered already, or was never given to `shard`.
    """
    if getattr(model, "is_gathered", True):
        yield
        return
    for module in _sharded(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    # an embedding's rows are cast once looked up: a second copy of a tied head's would be for nothing
    plain = [] if is_sharded(model) else [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    model.is_gathered = True
    try:
        for module in plain:
            _show_weights(module, model.compute_dtype)
        yield
    finally:
        model.is_gathered = False
        for module in plain:
            _hide_weights(module)
        for module in _sharded(model):
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def native_bf16(device) -> bool:
    """Whether `device` multiplies bf16 in hardware (emulated bf16 is slower than fp32)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    return False


def compute_dtype(name: str, device, width: int | None = None) -> torch.dtype:
    """The torch type of "bfloat16", "float32" or "auto": bf16 where it is native, but on a CPU only for a hidden size
    of 256 or more. A training step of 950 tokens, on two cores with AMX, takes in fp32 0.12 s at width 128 and 0.50 s
    at 384, and in bf16 0.17 s and 0.43 s: small products gain less than the casts of their weights cost.
    """
    if name == "auto":
        small = torch.device(device).type == "cpu" and width is not None and width < 256
        return torch.bfloat16 if native_bf16(device) and not small else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


@contextlib.contextmanager
def explain_lost_peers(doing: str, remedy: str = ""):
    """Turn the failure of a collective into one line that says what happened, when, and what to do."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        text = str(error)
        lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "imed out", "gloo/transport",
                "NCCL", "Connection refused")
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if alone or not (isinstance(error, dist.DistError) or any(part in text for part in lost)):
            raise
        told = " ".join(text.split()).split("] ", 1)[-1][-200:]  # no place in gloo's sources; NCCL ends with the cause
        raise UserError(f"{doing}: another process died or hangs, see its own message "
                        f"(rank {dist.get_rank()} on {socket.gethostname()} was told: {told}). {remedy}") from None
