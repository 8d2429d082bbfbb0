"""What a run needs beforehand, and how fast it goes: memory, disk, tokens a second, model FLOP/s utilisation."""

import math
import os
import re
import shutil
import time
from pathlib import Path

import torch
from torch import nn

from minixllm.distributed import is_sharded, local
from minixllm.errors import UserError
from minixllm.models.nf4 import nf4_layers

# Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets; the first that fits counts.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
              "A100": 312e12, "A10G": 70e12, "A10": 125e12, "A40": 150e12, "L40S": 362e12, "L4": 121e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12}


class Meter:
    """Tokens a second and model FLOP/s utilisation (Chowdhery et al. 2022, PaLM, appendix B) from step to step."""

    def __init__(self, model, world):
        config, head = model.config, model.lm_head.weight
        # A weight costs 2 FLOPs a token in the forward, 2 in the backward for the activations, and 2 if it is trained.
        linear = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]  # adapters are layers of their own
        self.per_token = sum((6 if any(p.requires_grad for p in m.parameters(recurse=False)) else 4)
                             * m.in_features * m.out_features for m in linear)
        self.per_label = (6 if head.requires_grad else 4) * head.numel()
        self.per_pair = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        peak = peak_flops(name)
        # the table knows bf16 alone
        self.peak = peak * world.size if peak and model.compute_dtype == torch.bfloat16 else None
        self.restart()

    def flops(self, micro_batches) -> float:
        """What the model's arithmetic needs for these micro-batches; recomputation is not counted."""
        return sum(self.per_token * len(m.input_ids) + self.per_label * int((m.labels >= 0).sum())
                   + self.per_pair * sum(map(attending_pairs, m.documents)) for m in micro_batches)

    def restart(self):
        self.start = time.perf_counter()

    def lap(self, flops: float, tokens: int) -> dict:
        """Timings since the last lap or restart; mfu is None on hardware whose peak is not known."""
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return {"seconds": seconds, "tokens_per_second": tokens / seconds,
                "mfu": flops / seconds / self.peak if self.peak else None}


def peak_flops(name: str) -> float | None:
    """The dense bf16 FLOP/s of the device of this name; None for one that is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def attending_pairs(document) -> float:
    """Pairs of a token and one that it attends to, in a document as `Packed` takes it."""
    trunk, branches = (document, []) if isinstance(document, int) else document
    return trunk * (trunk + 1) / 2 + sum(branch * trunk + branch * (branch + 1) / 2 for branch in branches)


def announce(model, world, settings, steps: int, tokens_per_step: float):
    """Print the steps, tokens, memory and disk a run will need; UserError when the disk is clearly too small."""
    everything = sum(p.numel() for p in model.parameters()) + sum(
        layer.in_features * layer.out_features for layer in nf4_layers(model).values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    output = Path(settings.output)
    written = sum(file.stat().st_size for file in (output / "checkpoints").rglob("*") if file.is_file())
    # weights and two moments in fp32; while one checkpoint is written the last `keep` are still there
    checkpoints = min(settings.keep + 1, math.ceil(steps / settings.save_every))
    disk = checkpoints * 12 * trained + model.embedding.weight.element_size() * everything - written
    free = shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.exists())).free
    if world.first:
        held = sum(local(p).numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))  # a part of it
        memory, available = memory_needed(model, world, settings), memory_available(world.device) + held
        print(f"{everything:,} parameters, {trained:,} trained, over {world.size} process{'es' * (world.size > 1)} on "
              f"{world.device.type} in {str(model.compute_dtype).removeprefix('torch.')}\n"
              f"{steps:,} steps of about {tokens_per_step:,.0f} tokens: {steps * tokens_per_step:,.0f} tokens\n"
              f"memory: about {gigabytes(memory)} a process ({gigabytes(available)} available); "
              f"disk: about {gigabytes(max(disk, 0))} ({gigabytes(free)} free)", flush=True)
        for line in settings.without_effect():
            print(line)
        positions = getattr(model.config, "max_position_embeddings", math.inf)  # BLOOM's have no end
        if settings.max_length > positions:
            print(f"max_length {settings.max_length} is beyond the {positions} positions the model was made for: it "
                  f"may learn badly from longer records; --max-length {positions} drops or cuts those", flush=True)
        if settings.warmup_steps > steps:
            print(f"warmup_steps {settings.warmup_steps} is more than the run's {steps} steps: its learning rate rises "
                  "to the last; a smaller --warmup-steps lets it fall again", flush=True)
    if disk > free:
        raise UserError(f"{output}: {gigabytes(free)} free on its disk, expected {gigabytes(disk)} for {settings.keep} "
                        "checkpoints, the one being written and the model: --keep fewer, or another --output")


def memory_needed(model, world, settings) -> float:
    """Bytes a process will hold at its peak, estimated: weights, gradients, moments, and what the backward keeps; and
    the second model where the settings ask for a live reference.
    """
    config = model.config
    dtype = model.compute_dtype
    parameters = list(model.parameters())
    state = sum((16 if p.requires_grad else p.element_size()) * p.numel() for p in parameters) / world.size
    state += sum(b.numel() * b.element_size() for b in model.buffers())  # of a base in NF4: whole on every process
    if getattr(settings, "reference", None) == "live" and all(p.requires_grad for p in parameters):
        state += sum(dtype.itemsize * p.numel() for p in parameters) / world.size
    blocks = set(model.blocks.parameters())
    # What FSDP2 gathers: embedding and head, which are not freed within a step, and two blocks at a time. Each takes a
    # copy to compute with and, if it is trained, its gradient before and while that is reduced.
    group = [p for p in parameters if p not in blocks] + 2 * list(model.blocks[0].parameters())
    gathered = sum((dtype.itemsize + 12 * p.requires_grad) * p.numel() for p in group)
    if not is_sharded(model):  # cast weights that a backward needs; the head's gradient, before it is added
        gathered = sum(dtype.itemsize * p.numel() for p in parameters if p.dtype != dtype)
        gathered += sum(4 * p.numel() for p in {model.embedding.weight, model.lm_head.weight} if p.requires_grad)
        gathered += 4 * model.lm_head.weight.numel() * model.lm_head.weight.requires_grad
    tokens = settings.micro_batch_size * settings.max_length
    # Each linear layer keeps its input, and what stands between two of them keeps about as much again, in fp32.
    widths = sum(m.in_features * dtype.itemsize + m.out_features * 4
                 for m in model.blocks[0].modules() if isinstance(m, nn.Linear))
    kept = config.hidden_size * dtype.itemsize if settings.gradient_checkpointing else widths
    return 0.3e9 + state + gathered + tokens * (kept * config.num_hidden_layers + widths)  # 0.3e9: PyTorch itself


def memory_available(device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:  # not Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
