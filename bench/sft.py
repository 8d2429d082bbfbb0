"""Fine-tuning of LLaMA or BLOOM: real tokens a second and peak memory, beside `transformers`, litgpt and TRL.

    python bench/sft.py                       # speed and memory, the allocator as shipped
    python bench/sft.py --malloc              # both sides with malloc's mmap and trim thresholds raised
    python bench/sft.py --sides ours transformers trl --rounds 3 --steps 4 --dtype bfloat16
    python bench/sft.py --model bloom --vocabulary 250880
    python bench/sft.py --sides ours litgpt --litgpt PYTHON    # the interpreter of an environment with litgpt
    python bench/sft.py --size 7b --lora --rows 16 --length 1024 --dtype bfloat16    # on a GPU, where there is one

Random weights, by default vocabulary 32,000, width 512, 8 layers, 8 heads, LLaMA's feed-forward 1,376; documents of
lognormal length, mean 120, at most --length; 4 x 512 tokens a step; AdamW over every weight or, with --lora, over
adapters of rank 16 beside a base in --dtype. The sides take turns, each in a process of its own, and a machine's
timings drift: the table gives the range over the rounds. `masked` supervises the second half of each document, as
instruction tuning does; the others supervise every token. The peers' rows hold no padding. Peak memory is also given
less the 16 bytes a parameter of weights, gradients and AdamW's two moments, or less the base beside the adapters.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = ROOT  # for minixllm, and away from this folder, whose tokenizers.py would hide the library
from bench import machine  # noqa: E402

SIDES = ["ours", "ours-masked", "transformers", "litgpt", "trl"]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
RANK, TARGETS = 16, {"llama": ["q_proj", "v_proj"], "bloom": ["query_key_value"]}


def documents(rng, longest: int):
    """Endless document lengths: log-normal, mean 120 before they are cut."""
    sigma = 0.8
    while True:
        yield int(np.clip(rng.lognormal(math.log(120) - sigma**2 / 2, sigma), 8, longest))


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def ours(args, size: dict, dtype: torch.dtype):
    from minixllm import distributed
    from minixllm.data.stream import Batch, pack
    from minixllm.models import lora, nf4
    from minixllm.training.losses import sft_loss

    def steps(rng):
        """Endless steps: the lengths of the whole documents in `rows` rows of `length` tokens, packed as in training,
        and sorted as there."""
        while True:
            lengths = np.fromiter(itertools.islice(documents(rng, args.length), 2**12), int)
            order, bounds = pack(lengths, args.length)
            for row in range(0, len(bounds) - 16 - args.rows, args.rows):  # less the last rows, which wait for more
                yield sorted(lengths[order[bounds[row]:bounds[row + args.rows]]].tolist())

    model = machine.ours(args.model, size, dtype if args.lora else torch.float32)
    if args.nf4:
        nf4.quantize_blocks(model)
    if args.lora:
        lora.add_lora(model, lora.LoraSettings(RANK, 32.0))
        lora.initialise(model, 0)
    distributed.shard(model, distributed.setup(machine.DEVICE), dtype)
    model.gradient_checkpointing = args.checkpointing
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4, fused=True)
    for lengths in steps(np.random.default_rng(0)):
        ids, labels = torch.randint(0, size["vocab_size"], (2, sum(lengths)))
        if args.measure == "ours-masked":
            for start, length in zip(itertools.accumulate([0, *lengths]), lengths):
                labels[start:start + length // 2] = -100
        loss, _ = sft_loss(model, Batch(ids, labels, lengths, [0]))
        (loss / int((labels != -100).sum())).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield len(ids)


def theirs(args, size: dict, dtype: torch.dtype):
    """transformers' model in `dtype`, with peft's adapters where these are asked for."""
    model = machine.theirs(args.model, size, dtype)
    if args.lora:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS[args.model]))
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def litgpt(args, size: dict):
    """(its model, its loss), as its training loops put them together: the next token over unpadded rows."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    with torch.device(machine.DEVICE):
        model = GPT(Config(vocab_size=size["vocab_size"], padded_vocab_size=size["vocab_size"], block_size=args.length,
                           n_embd=size["hidden_size"], n_layer=size["num_hidden_layers"],
                           n_head=size["num_attention_heads"], n_query_groups=size.get("num_key_value_heads"),
                           intermediate_size=size["intermediate_size"], norm_class_name="RMSNorm",
                           mlp_class_name="LLaMAMLP", rotary_percentage=1.0, parallel_residual=False, bias=False))
    return model, lambda ids: chunked_cross_entropy(model(ids[:, :-1]), ids[:, 1:])


def plain_loop(model, loss, args, vocabulary: int):
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4, fused=True)
    model.train()
    while True:
        ids = torch.randint(0, vocabulary, (args.rows, args.length), device=machine.DEVICE)
        loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield ids.numel()


def trl(args, size: dict, dtype: torch.dtype, output: str):
    """TRL's SFTTrainer with packing; (real tokens, seconds) of the timed steps. On a CPU in fp32, its default
    there; on a GPU under autocast in `dtype`."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times, counts = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(machine.now())
            if len(times) == args.warmup:
                machine.reset_peak_memory()

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            counts.append(int(inputs["labels"].ne(-100).sum() if "attention_mask" not in inputs
                              else inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    on_gpu = machine.DEVICE == "cuda"
    rng, lengths = np.random.default_rng(0), documents(np.random.default_rng(0), args.length)
    rows = [{"input_ids": rng.integers(0, size["vocab_size"], next(lengths)).tolist()}
            for _ in range(10 * args.rows * (args.steps + args.warmup + 1))]
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    config = SFTConfig(output_dir=output, per_device_train_batch_size=args.rows, max_length=args.length, packing=True,
                       max_steps=args.steps + args.warmup, report_to=[], save_strategy="no", use_cpu=not on_gpu,
                       bf16=on_gpu and dtype == torch.bfloat16, gradient_checkpointing=args.checkpointing,
                       disable_tqdm=True)
    model = theirs(args, size, dtype if args.lora and on_gpu else torch.float32)
    trainer = Counting(model, config, train_dataset=datasets.Dataset.from_list(rows),
                       processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>",
                                                                pad_token="</s>"), callbacks=[Clock()])
    trainer.train()
    return sum(counts[args.warmup:]), times[-1] - times[args.warmup - 1]


def measure(args, size: dict, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    if args.measure == "trl":
        import tempfile
        with tempfile.TemporaryDirectory() as output:
            tokens, seconds = trl(args, size, dtype, output)
    else:
        if args.measure.startswith("ours"):
            run = ours(args, size, dtype)
        elif args.measure == "litgpt":
            model, loss = litgpt(args, size)
            run = plain_loop(model.to(dtype), loss, args, size["vocab_size"])
        else:
            model = theirs(args, size, dtype)
            run = plain_loop(model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, args,
                             size["vocab_size"])
        for _ in range(args.warmup):
            next(run)
        machine.reset_peak_memory()
        seconds, tokens = machine.seconds(lambda: sum(itertools.islice(run, args.steps)))
    return {"tokens": tokens, "seconds": seconds, "peak_gb": machine.peak_memory()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(machine.SIZES), default="llama")
    parser.add_argument("--size", choices=list(machine.LLAMA), default="small")
    parser.add_argument("--vocabulary", type=int, help="instead of the size's own")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--nf4", action="store_true", help="with --lora: our frozen base in four bits")
    parser.add_argument("--checkpointing", action="store_true", help="activations are recomputed, on all sides")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:3])
    parser.add_argument("--warmup", type=int, default=machine.WARMUP, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--malloc", action="store_true")
    parser.add_argument("--litgpt", metavar="PYTHON", default=sys.executable,
                        help="the interpreter that runs the side litgpt")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    size = dict(machine.SIZES[args.model][args.size])
    size["vocab_size"] = args.vocabulary or size["vocab_size"]
    if args.measure:
        return print(json.dumps(measure(args, size, dtype)))
    environment = {**os.environ, **(MALLOC if args.malloc else {})}
    results = {side: [] for side in args.sides}
    for _, side in itertools.product(range(args.rounds), args.sides):
        python = args.litgpt if side == "litgpt" else sys.executable
        done = subprocess.run([python, __file__, *sys.argv[1:], "--measure", side], env=environment,
                              stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
    peak = machine.peak_flops(dtype)
    from minixllm.weights.hf_directory import ARCHITECTURES

    with torch.device("meta"):
        model_class = ARCHITECTURES[args.model]
        model = model_class(model_class.config_class.from_dict(size))
    head = model.lm_head.weight.numel()
    body = sum(parameter.numel() for parameter in model.blocks.parameters() if parameter.ndim == 2)
    flops = 4 if args.lora else 6  # of a token, for each weight
    state = (dtype.itemsize if args.lora else 16) * sum(parameter.numel() for parameter in model.parameters()) / 1e9
    print(f"{args.model} {args.size}{', LoRA' * args.lora}, vocabulary {size['vocab_size']:,}, {args.rows} x "
          f"{args.length} tokens, {machine.description()}, {args.dtype}, {'raised' if args.malloc else 'shipped'} "
          f"malloc thresholds, peak {peak / 1e9:,.0f} GFLOP/s")
    for side, runs in results.items():
        if not runs:
            print(f"{side:15} failed, see above")
            continue
        rates = sorted(run["tokens"] / run["seconds"] for run in runs)
        used = flops * (body + (head / 2 if side == "ours-masked" else head)) * rates[-1] / peak
        memory = max(run["peak_gb"] for run in runs)
        print(f"{side:15} {rates[0]:6,.0f} to {rates[-1]:,.0f} tokens/s, {used:4.0%} of peak, {memory:.2f} GB, "
              f"{memory - state:.2f} GB beyond the state")
    if not all(results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
