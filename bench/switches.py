"""Changes that might pay on a GPU, each as a switch of this bench alone: which of them should the product take over?

    python -m bench.switches [--size 1b] [--dtype bfloat16]

Training, tokens a second of full steps on LLaMA, with nothing switched and with one switch at a time:
    rotary, silu, norm, slopes    compiled: the rotation of queries and keys, SiLU x up, RMSNorm, the head's gradients
    addmm                         the head's bf16 gradient is added to fp32 by one product, not by a product and a sum
Decoding, tokens a second of 1, 8 and 64 prompts, greedy: `minixllm.generation` against one step over a cache of fixed
size, recorded once as a CUDA graph and replayed (on a CPU the same step is simply called).
"""

import argparse
import contextlib
import functools
import math
import sys
from unittest import mock

import torch
import torch.nn.functional as F

from bench import machine
from minixllm import distributed
from minixllm.data.stream import Batch
from minixllm.generation import generate
from minixllm.models import kv_cache, llama, token_logps
from minixllm.training.losses import sft_loss

PROMPT = 32
# On a CPU the bench only shows that it runs, which takes no compiler.
compiled = functools.partial(torch.compile, dynamic=True, backend="inductor" if machine.DEVICE == "cuda" else "eager")


def add_into_fp32(grad, grad_logits, hidden):
    """`token_logps._add_product` by an `addmm` whose factors are bf16 and whose sum is fp32."""
    hidden = hidden.to(grad_logits.dtype)
    if grad is None:
        grad = hidden.new_zeros(grad_logits.shape[1], hidden.shape[1], dtype=torch.float32)
    if grad.is_cpu or grad.dtype == grad_logits.dtype:  # a CPU has no such product
        return grad.addmm_(grad_logits.T.to(grad.dtype), hidden.to(grad.dtype))
    return torch.ops.aten.addmm.dtype_out(grad, grad_logits.T, hidden, torch.float32, out=grad)


def gated(mlp, hidden):
    return mlp.down_proj(_silu_times(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


@compiled
def _silu_times(gate, up):
    return F.silu(gate) * up


SWITCHES = {
    "nothing": lambda: contextlib.nullcontext(),
    "rotary": lambda: mock.patch.object(llama, "rotate", compiled(llama.rotate)),
    "silu": lambda: mock.patch.object(llama.LlamaMLP, "forward", gated),
    "norm": lambda: mock.patch.object(llama.LlamaRMSNorm, "forward", compiled(llama.LlamaRMSNorm.forward)),
    "slopes": lambda: mock.patch.object(token_logps, "_to_gradients", compiled(token_logps._to_gradients)),
    "addmm": lambda: mock.patch.object(token_logps, "_add_product", add_into_fp32),
}


def training(size: dict, dtype: torch.dtype, tokens: int, steps: int):
    model = machine.ours("llama", size)
    distributed.shard(model, distributed.setup(machine.DEVICE), dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    lengths = [tokens // 16] * 16
    ids = torch.randint(0, size["vocab_size"], (sum(lengths),))

    def run(count):
        for _ in range(count):
            loss, _ = sft_loss(model, Batch(ids, ids, lengths, [0]))
            (loss / len(ids)).backward()
            optimizer.step()
            optimizer.zero_grad()

    plain = None
    for name, switch in SWITCHES.items():
        with switch():
            run(machine.WARMUP)
            rate = steps * len(ids) / machine.seconds(run, steps)[0]
        plain = plain or rate
        print(f"training, {name:8} {rate:10,.0f} tokens/s   {rate / plain:.2f} times", flush=True)


class FixedCache:
    """A context of one new token a row over a cache of fixed size: every step has the same shapes, as a graph needs."""

    def __init__(self, model, rows: int, capacity: int):
        config, weight = model.config, model.lm_head.weight
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.layers = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.rows = torch.arange(rows, device=weight.device)
        self.position_ids = torch.zeros(rows, dtype=torch.long, device=weight.device)

    def attend(self, layer_idx, query, key, value, slopes=None):
        """query (rows, H, D), key and value (rows, KV, D) -> (rows, H, D)."""
        keys, values = self.layers[layer_idx]  # (rows, KV, capacity, D)
        keys[self.rows, :, self.position_ids] = key
        values[self.rows, :, self.position_ids] = value
        unseen = torch.arange(keys.shape[2], device=keys.device) > self.position_ids[:, None]
        mask = torch.zeros_like(unseen, dtype=query.dtype).masked_fill(unseen, -math.inf)[:, None, None]
        return kv_cache._attend_one(query, keys, values, mask)


@torch.no_grad()
def replayed(model, prompts, new: int) -> tuple[float, list[list[int]]]:
    """(seconds of all steps but the first, answers): prompts of one length go in token by token, too."""
    prompts = torch.tensor(prompts, device=machine.DEVICE)  # (rows, PROMPT)
    cache = FixedCache(model, len(prompts), prompts.shape[1] + new)
    ids, positions = prompts[:, 0].clone(), torch.arange(len(prompts), device=machine.DEVICE)

    def step():
        following = model(ids, cache, positions=positions).argmax(-1)
        cache.position_ids += 1
        return following

    if machine.DEVICE == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # what is made at a first call is made outside the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            following = step()
        cache.position_ids.zero_()

        def step():
            graph.replay()
            return following

    answers = []

    def run():
        for place in range(prompts.shape[1] + new - 1):
            following = step()
            if place + 1 < prompts.shape[1]:
                ids.copy_(prompts[:, place + 1])
            else:
                ids.copy_(following)
                answers.append(following.clone())

    seconds, _ = machine.seconds(run)
    return seconds, torch.stack(answers, dim=1).tolist()


def decoding(size: dict, dtype: torch.dtype, new: int):
    class Tokenizer:
        eos_id = None

    model = machine.ours("llama", size, dtype).eval()
    for rows in (1, 8, 64):
        prompts = torch.randint(3, size["vocab_size"], (rows, PROMPT)).tolist()
        generate(model, Tokenizer, prompts, 2)
        seconds, expected = machine.seconds(generate, model, Tokenizer, prompts, new)
        replay_seconds, answers = replayed(model, prompts, new)
        rate, replay_rate = rows * new / seconds, rows * (new + PROMPT - 1) / replay_seconds
        same = sum(a == b for a, b in zip(answers, expected))
        print(f"decoding, {rows:2} prompts   minixllm {rate:8,.0f}/s   one recorded step {replay_rate:8,.0f}/s   "
              f"{replay_rate / rate:.2f} times, {same} of {rows} answers equal", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(machine.LLAMA), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=2048, help="of a training step, in 16 documents")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--new", type=int, default=64, help="tokens to decode a prompt")
    args = parser.parse_args()
    torch.manual_seed(0)
    size, dtype = machine.LLAMA[args.size], getattr(torch, args.dtype)
    print(f"{args.size}, {args.dtype}, {machine.description()}", flush=True)
    decoding(size, dtype, args.new)
    training(size, dtype, args.tokens, args.steps)


if __name__ == "__main__":
    sys.exit(main())
