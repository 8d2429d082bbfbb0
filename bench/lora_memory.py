"""Peak memory of LoRA training on a LLaMA of 1.2 billion parameters at 1 x 512 tokens, loading included.

    python bench/lora_memory.py [--steps 2] [--dtype bfloat16]

Random weights in LLaMA 3.2 1B's shape (16 layers, width 2,048, feed-forward 8,192, 32 heads of which 8 key-value,
vocabulary 128,256, tied), written as a bf16 directory of 2.5 GB by one process, loaded and trained by another. In
bfloat16, the default where the processor has it, the weights are computed with as they are held; in fp32 they are
converted, a block at a time, and the embedding for the whole step.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minixllm import distributed  # noqa: E402
from minixllm.data.stream import Batch  # noqa: E402
from minixllm.models.llama import LlamaConfig  # noqa: E402
from minixllm.training.losses import sft_loss  # noqa: E402
from minixllm.training.model import open_model  # noqa: E402
from minixllm.weights.hf_directory import build, initialise, read_config, save_model  # noqa: E402

CONFIG = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                     num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, rope_theta=500000.0)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write(directory):
    model = build(CONFIG, torch.bfloat16)
    initialise(model, seed=0)
    save_model(model, directory)


def train(directory, steps: int, dtype: str, base: str):
    world = distributed.setup("cpu")
    settings = SimpleNamespace(dtype=dtype, seed=0, lora_r=16, lora_alpha=32.0, lora_dropout=0.0, lora_targets=[],
                               base=base)
    started = peak()
    model = open_model(read_config(directory), world, settings, directory).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; peak {started:.2f} GB after the imports, "
          f"{peak():.2f} GB after loading", flush=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(CONFIG.vocab_size, (513,), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:-1], ids[1:], [512], [0])
    for step in range(1, steps + 1):
        start = time.perf_counter()
        loss, _ = sft_loss(model, batch)
        (loss / 512).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item() / 512:.3f}, {time.perf_counter() - start:.1f} s, peak {peak():.2f} GB",
              flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16"))
    parser.add_argument("--base", default="auto", choices=("auto", "bf16", "fp32", "nf4"))
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.directory:
        train(args.directory, args.steps, args.dtype, args.base)
    else:
        with tempfile.TemporaryDirectory() as folder:
            writer = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import lora_memory; " \
                     f"lora_memory.write({folder + '/model'!r})"
            subprocess.run([sys.executable, "-c", writer], check=True)
            subprocess.run([sys.executable, __file__, "--directory", folder + "/model", "--steps", str(args.steps),
                            "--dtype", args.dtype, "--base", args.base], check=True)
