"""A GPU for machines that have none: `with pretend_cuda():` tensors said to be on "cuda" are kept on the CPU, but may
not meet others without being moved, which is what code that was only ever run on a CPU gets wrong.

What PyTorch allows on a GPU stays allowed: numbers (0-dim CPU tensors) in arithmetic, and CPU indices. FlexAttention is
computed as its definition says, from the block mask's rule; of a GPU's speed and kernels nothing is shown.
"""

import contextlib
import math
from collections import Counter
from unittest import mock

import torch
from torch.autograd.graph import _engine_run_backward
from torch.distributed.checkpoint import filesystem
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from minixllm import distributed
from minixllm.models import attention

CUDA, aten = torch.device("cuda", 0), torch.ops.aten


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU; its numbers are in `data_on_cpu`."""

    @staticmethod
    def __new__(cls, data_on_cpu):
        return torch.Tensor._make_wrapper_subclass(
            cls, data_on_cpu.shape, strides=data_on_cpu.stride(), storage_offset=data_on_cpu.storage_offset(),
            dtype=data_on_cpu.dtype, layout=data_on_cpu.layout, device="cpu")

    def __init__(self, data_on_cpu):
        self.data_on_cpu = data_on_cpu

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"OnGpu({self.data_on_cpu})"

    def __tensor_flatten__(self):
        return ["data_on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return OnGpu(inner["data_on_cpu"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        check_devices(func, args, kwargs or {})
        inner_args, inner_kwargs = tree_map_only(OnGpu, lambda x: x.data_on_cpu, (args, kwargs or {}))
        output = tree_map_only(torch.Tensor, OnGpu, func(*inner_args, **inner_kwargs))
        return return_and_correct_aliasing(func, args, kwargs or {}, output)


def check_devices(func, args, kwargs):
    """Raise what PyTorch raises on a GPU for tensors of two devices in one operation."""
    if func in (aten.copy_.default, aten._to_copy.default):
        return
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default):
        args = args[:1] + args[2:] if isinstance(args[0], OnGpu) else args  # indices may come from the CPU
    strangers = [x for x in tree_leaves((args, kwargs))
                 if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) and x.dim()]
    if strangers:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got a CPU tensor of shape "
                           f"{tuple(strangers[0].shape)} beside those on {CUDA}")


def is_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


WAITS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "nonzero", "new_tensor")


class _Moves(TorchFunctionMode):
    """Where tensors are made on a device, moved to one, or read; `waits` counts what would wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in WAITS and isinstance(args[0], OnGpu) or name == "tensor" and is_cuda(kwargs.get("device")):
            self.waits[name] += 1
        if name == "pin_memory":
            return args[0]
        if name == "numpy" and isinstance(args[0], OnGpu) and not kwargs.get("force"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if name in ("tolist", "numpy", "cpu") and isinstance(args[0], OnGpu):
            if name == "cpu" and args[0].requires_grad:
                return _ToCpu.apply(args[0])
            return func(args[0].detach().data_on_cpu, *args[1:], **kwargs)
        if name in ("to", "cuda"):
            asked = [*args[1:], *kwargs.values()] if name == "to" else [CUDA]
            asked = [y for x in asked for y in ((x.device, x.dtype) if isinstance(x, torch.Tensor) else (x,))]
            moved = args[0]
            for x in asked:
                if isinstance(x, torch.dtype):
                    moved = moved.to(x)
                elif isinstance(x, (str, torch.device)) and is_cuda(x) != isinstance(moved, OnGpu):
                    self.waits[name] += not kwargs.get("non_blocking")
                    moved = (_ToGpu if is_cuda(x) else _ToCpu).apply(moved)
            return moved
        if name == "backward":  # and for what its functions do
            with self:
                return _engine_run_backward((args[0],), (OnGpu(torch.tensor(1.0)),), False, False, (),
                                            allow_unreachable=True, accumulate_grad=True)
        if name == "new_tensor" and isinstance(args[0], OnGpu):
            return OnGpu(func(args[0].data_on_cpu, *args[1:], **kwargs))
        if "device" in kwargs and name != "__get__":
            if is_cuda(kwargs["device"]):
                return OnGpu(func(*map_cpu(args), **map_cpu({**kwargs, "device": "cpu"})))
            if any(isinstance(x, OnGpu) for x in args):  # such as empty_like(x, device="cpu")
                return func(*map_cpu(args), **kwargs)
        return func(*args, **kwargs)


def map_cpu(values):
    return tree_map_only(OnGpu, lambda x: x.data_on_cpu, values)


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return OnGpu(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.data_on_cpu


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.data_on_cpu.clone()

    @staticmethod
    def backward(ctx, grad):
        return OnGpu(grad)


def flex_attention(query, key, value, block_mask, score_mod, enable_gqa, kernel_options):
    """What FlexAttention computes: softmax of the scores of the pairs that the mask's rule lets pass."""
    N = query.shape[2]
    q, k = torch.arange(N, device=query.device)[:, None], torch.arange(N, device=query.device)
    repeated = [x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value)]
    scores = query.float() @ repeated[0].float().transpose(2, 3) / math.sqrt(query.shape[-1])
    if score_mod is not None:
        heads = torch.arange(query.shape[1], device=query.device)[:, None, None]
        scores = score_mod(scores, 0, heads, q, k)
    scores = scores.masked_fill(~block_mask.mask_mod(0, 0, q, k), -math.inf)
    return (scores.softmax(-1) @ repeated[1].float()).to(query.dtype)


gloo = distributed.dist.init_process_group  # there is no NCCL without GPUs


@contextlib.contextmanager
def pretend_cuda():
    with (_Moves() as moves, mock.patch.object(attention, "_compiled_flex", lambda: flex_attention),
          mock.patch.object(distributed, "init_device_mesh", lambda kind, shape: init_device_mesh("cpu", shape)),
          mock.patch.object(distributed.dist, "init_process_group", lambda backend, **rest: gloo("gloo", **rest)),
          # writing a checkpoint would wait for a GPU's streams
          mock.patch.object(filesystem, "_OverlappingCpuLoader", lambda f, **_: filesystem._SerialCpuLoader(f)),
          mock.patch("torch.cuda.is_available", lambda: True), mock.patch("torch.cuda.device_count", lambda: 1),
          mock.patch("torch.cuda.set_device", lambda device: None),
          mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
          mock.patch("torch.cuda.get_device_name", lambda device: "NVIDIA H200"),
          mock.patch("torch.cuda.get_device_capability", lambda device: (9, 0)),
          mock.patch("torch.cuda.mem_get_info", lambda device: (140 * 10**9, 141 * 10**9))):
        yield moves
