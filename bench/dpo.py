"""Preference optimisation: pairs a second and peak memory, against TRL's DPOTrainer on the same pairs.

    python bench/dpo.py [--pairs 48] [--rounds 2] [--dtype float32] [--size 1b]

Model: LLaMA, by default vocabulary 32,000, width 512, 8 layers, 8 heads, feed-forward 1,376, random weights; on a GPU
where there is one. Pairs: prompts and answers of 60 to 190 random tokens; 8 pairs a step, AdamW. Each side runs in a
process of its own, the sides in turn; the first steps of each, on a GPU those that compile, are not timed, nor is the
making of a cached reference.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # and not this folder, whose tokenizers.py hides the library
from bench import machine  # noqa: E402

LORA = dict(lora_r=16, lora_alpha=32.0, lora_dropout=0.0, lora_targets=["q_proj", "v_proj"])
MODES = ("lora", "lora cached", "full", "full cached")
BATCH = 8


def make_pairs(count: int):
    """For each pair, three arrays of token ids: prompt, chosen, rejected."""
    rng = np.random.default_rng(0)
    return [[rng.integers(3, 32000, rng.integers(60, 191)) for _ in range(3)] for _ in range(count)]


class Pairs:
    """The pairs with the interface of token_cache.TokenCache."""

    language_names = ["und"]

    def __init__(self, pairs):
        self.pairs = pairs
        self.segments = np.array([[len(part) for part in pair] for pair in pairs])
        self.lengths = self.segments.sum(1) - 1
        self.languages = np.zeros(len(pairs), int)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        prompt, chosen, rejected = self.pairs[index]
        ids = np.concatenate([prompt, chosen[:-1], prompt[-1:], rejected[:-1]])
        return ids, np.concatenate([np.full(len(prompt) - 1, -100), chosen, rejected])

    def document(self, index):
        prompt, *answers = self.segments[index].tolist()
        return prompt - 1, answers

    def count(self, records):
        return len(records)


def run_ours(mode: str, count: int, dtype: str, size: dict) -> float:
    """Seconds a step, through the functions train_dpo.py is made of."""
    from minixllm import distributed
    from minixllm.data.stream import Stream, in_order
    from minixllm.models.llama import LlamaConfig
    from minixllm.training import losses
    from minixllm.training.loop import train_step
    from minixllm.training.meter import Meter
    from minixllm.training.model import open_model

    world, data = distributed.setup(machine.DEVICE), Pairs(make_pairs(count))
    settings = SimpleNamespace(dtype=dtype, seed=0, clip=1.0, base="auto",
                               **LORA | ({} if "lora" in mode else {"lora_r": 0}))
    config = LlamaConfig(**size)
    model = open_model(config, world, settings).eval()
    if "cached" in mode:
        table = torch.zeros(count, 2, device=machine.DEVICE)
        with torch.no_grad():
            for batch in in_order(data, np.arange(count), 4096):
                table[batch.records] = losses.pair_logps(model, batch)
        reference = lambda model, batch: table[batch.records]
    elif "lora" in mode:
        reference = losses.policy_without_adapters
    else:
        reference = losses.second_model(open_model(config, world, settings, frozen=True).eval())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    stream, meter = Stream(data, 0, BATCH, BATCH), Meter(model, world)

    def loss(model, batch):
        return losses.preference_loss(model, batch, reference, kind="dpo", beta=0.1, label_smoothing=0.0, nll_weight=0.0)

    times = []
    for step in range(1, count // BATCH + 1):
        if step == 1 + machine.WARMUP:
            machine.reset_peak_memory()
        start = machine.now()
        train_step(model, world, settings, stream, loss, optimizer, meter, step, [])
        times.append(machine.now() - start)
    return sum(times[machine.WARMUP:]) / (len(times) - machine.WARMUP)


def run_trl(mode: str, count: int, dtype: str, size: dict) -> float:
    """Seconds a step of DPOTrainer, without activation checkpointing (its default, which is slower)."""
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 32000)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>",
                                                     bos_token="<s>")

    def text(ids):
        return "".join(f" w{i}" for i in ids)

    # TRL appends EOS to each answer: one token less of ours makes as many
    rows = [dict(prompt=text(p), chosen=text(c[:-1]), rejected=text(r[:-1])) for p, c, r in make_pairs(count)]
    model = machine.theirs("llama", size)
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            if len(times) == machine.WARMUP:
                machine.reset_peak_memory()
            self.start = machine.now()

        def on_step_end(self, *_, **__):
            times.append(machine.now() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        DPOTrainer(
            model=model, ref_model=copy.deepcopy(model) if mode == "full" else None,
            processing_class=tokenizer, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LORA["lora_targets"]) if "lora" in mode
            else None,
            args=DPOConfig(output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-5,
                           precompute_ref_log_probs="cached" in mode, max_length=1024, gradient_checkpointing=False,
                           use_cpu=machine.DEVICE == "cpu", bf16=dtype == "bfloat16", report_to=[],
                           save_strategy="no", logging_steps=1000, disable_tqdm=True)).train()
    return sum(times[machine.WARMUP:]) / (len(times) - machine.WARMUP)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--size", choices=list(machine.LLAMA), default="small")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        count, side = args.pairs + BATCH * machine.WARMUP, {"ours": run_ours, "trl": run_trl}[args.side]
        seconds = side(args.modes[0], count, args.dtype, machine.LLAMA[args.size])
        print(json.dumps({"pairs/s": BATCH / seconds, "peak GB": machine.peak_memory()}))
        return
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    print(f"{args.size}, {machine.description()}, {args.dtype}; load {os.getloadavg()[0]:.1f} at the start\n"
          f"{'':<14}{'ours pairs/s':>22}{'TRL pairs/s':>22}{'ratio':>8}{'ours GB':>10}{'TRL GB':>10}")
    for mode in args.modes:
        results = {"ours": [], "trl": []}
        for _ in range(args.rounds):
            for side in results:
                done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side, "--modes", mode],
                                      env=environment, text=True, stdout=subprocess.PIPE, check=True)
                results[side].append(json.loads(done.stdout.splitlines()[-1]))
        speed = {side: [r["pairs/s"] for r in each] for side, each in results.items()}
        memory = {side: max(r["peak GB"] for r in each) for side, each in results.items()}
        shown = {side: f"{min(each):.2f} to {max(each):.2f}" for side, each in speed.items()}
        print(f"{mode:<14}{shown['ours']:>22}{shown['trl']:>22}{sum(speed['ours']) / sum(speed['trl']):>8.1f}"
              f"{memory['ours']:>10.2f}{memory['trl']:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
