"""Full fine-tuning of a small LLaMA or BLOOM: real tokens a second and peak memory, beside `transformers` and TRL.

    python bench/sft.py                       # speed and memory, the allocator as shipped
    python bench/sft.py --malloc              # both sides with malloc's mmap and trim thresholds raised
    python bench/sft.py --sides ours transformers trl --rounds 3 --steps 4 --dtype bfloat16
    python bench/sft.py --model bloom --vocabulary 250880
    python bench/sft.py --sides ours litgpt --litgpt PYTHON    # the interpreter of an environment with litgpt

Random weights, vocabulary 32,000, width 512, 8 layers, 8 heads, LLaMA's feed-forward 1,376; documents of lognormal
length, mean 120, at most 512; 4 x 512 tokens a step; AdamW. The sides take turns, each in a process of its own, and a
machine's timings drift: the table gives the range over the rounds. `masked` supervises the second half of each
document, as instruction tuning does; the others supervise every token. The peers' rows of 512 hold no padding. Peak
memory is also given less the 16 bytes a parameter of weights, gradients and AdamW's two moments.
"""

import argparse
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import time

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = ROOT  # for minixllm, and away from this folder, whose tokenizers.py would hide the library
SHAPES = {"llama": dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8),
          "bloom": dict(hidden_size=512, n_layer=8, n_head=8)}
ROWS, LENGTH = 4, 512
SIDES = ["ours", "ours-masked", "transformers", "litgpt", "trl"]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def documents(rng):
    """Endless document lengths: log-normal, mean 120 before they are cut at 512."""
    sigma = 0.8
    while True:
        yield int(np.clip(rng.lognormal(math.log(120) - sigma**2 / 2, sigma), 8, LENGTH))


def ours(masked: bool, architecture: str, vocabulary: int, dtype: torch.dtype):
    from minixllm import parallel
    from minixllm.attention import Packed
    from minixllm.checkpoint import ARCHITECTURES
    from minixllm.datasets import pack

    def steps(rng):
        """Endless steps: the lengths of the whole documents in ROWS rows of LENGTH tokens, packed as in training."""
        while True:
            lengths = np.fromiter(itertools.islice(documents(rng), 2**12), int)
            order, bounds = pack(lengths, LENGTH)
            for row in range(0, len(bounds) - 16 - ROWS, ROWS):  # less the last rows, which wait for more
                yield lengths[order[bounds[row]:bounds[row + ROWS]]].tolist()

    config_class, model_class = ARCHITECTURES[architecture]
    model = model_class(config_class.from_dict({"vocab_size": vocabulary, **SHAPES[architecture]}))
    for name, parameter in model.named_parameters():
        model.init_weights(name, parameter.data, torch.Generator().manual_seed(0))
    parallel.shard(model, parallel.setup("cpu"), dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for lengths in steps(np.random.default_rng(0)):
        ids, labels = torch.randint(0, vocabulary, (2, sum(lengths)))
        if masked:
            for start, length in zip(itertools.accumulate([0, *lengths]), lengths):
                labels[start:start + length // 2] = -100
        loss = -model(ids, Packed(lengths), labels).sum() / (labels != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield len(ids)


def theirs(architecture: str, vocabulary: int):
    import transformers
    name = {"llama": "Llama", "bloom": "Bloom"}[architecture]
    config = getattr(transformers, f"{name}Config")(vocab_size=vocabulary, **SHAPES[architecture])
    return getattr(transformers, f"{name}ForCausalLM")(config)


def litgpt(vocabulary: int):
    """(its model, its loss), as its training loops put them together: the next token over unpadded rows."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    model = GPT(Config(vocab_size=vocabulary, padded_vocab_size=vocabulary, block_size=LENGTH, n_embd=512, n_layer=8,
                       n_head=8, intermediate_size=1376, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
                       rotary_percentage=1.0, parallel_residual=False, bias=False))
    return model, lambda ids: chunked_cross_entropy(model(ids[:, :-1]), ids[:, 1:])


def plain_loop(model, loss, vocabulary: int, dtype: torch.dtype):
    model = model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    while True:
        ids = torch.randint(0, vocabulary, (ROWS, LENGTH))
        loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield ids.numel()


def trl(model, vocabulary: int, steps: int, output: str):
    """TRL's SFTTrainer with packing, its CPU defaults; yields the real tokens of each step."""
    import datasets
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times, counts = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            counts.append(int(inputs["labels"].ne(-100).sum() if "attention_mask" not in inputs
                              else inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    rng, lengths = np.random.default_rng(0), documents(np.random.default_rng(0))
    rows = [{"input_ids": rng.integers(0, vocabulary, next(lengths)).tolist()}
            for _ in range(40 * (steps + 2))]
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    config = SFTConfig(output_dir=output, per_device_train_batch_size=ROWS, max_length=LENGTH, packing=True,
                       max_steps=steps + 1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
                       gradient_checkpointing=False, disable_tqdm=True)
    trainer = Counting(model, config, train_dataset=datasets.Dataset.from_list(rows),
                       processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>",
                                                                pad_token="</s>"), callbacks=[Clock()])
    trainer.train()
    return sum(counts[1:steps + 1]), times[steps] - times[0]


def measure(side: str, steps: int, architecture: str, vocabulary: int, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    if side == "trl":
        import tempfile
        with tempfile.TemporaryDirectory() as output:
            tokens, seconds = trl(theirs(architecture, vocabulary), vocabulary, steps, output)
    else:
        if side.startswith("ours"):
            run = ours(side == "ours-masked", architecture, vocabulary, dtype)
        elif side == "litgpt":
            run = plain_loop(*litgpt(vocabulary), vocabulary, dtype)
        else:
            model = theirs(architecture, vocabulary)
            run = plain_loop(model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, vocabulary,
                             dtype)
        next(run)  # the first step makes the optimiser's state
        start = time.perf_counter()
        tokens = sum(itertools.islice(run, steps))
        seconds = time.perf_counter() - start
    return {"tokens": tokens, "seconds": seconds,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def peak_flops(dtype: torch.dtype) -> float:
    """The fastest product of two 2,048 x 2,048 matrices, FLOP/s."""
    a, times = torch.randn(2048, 2048, dtype=dtype), []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="llama")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:3])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--malloc", action="store_true")
    parser.add_argument("--litgpt", metavar="PYTHON", help="the interpreter that runs the side litgpt")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.measure:
        return print(json.dumps(measure(args.measure, args.steps, args.model, args.vocabulary, dtype)))
    environment = {**os.environ, **(MALLOC if args.malloc else {})}
    results = {side: [] for side in args.sides}
    for _, side in itertools.product(range(args.rounds), args.sides):
        python = args.litgpt if side == "litgpt" else sys.executable
        command = [python, __file__, "--measure", side, "--steps", str(args.steps), "--dtype", args.dtype,
                   "--model", args.model, "--vocabulary", str(args.vocabulary)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        results[side].append(json.loads(done.stdout.splitlines()[-1]))
    peak = peak_flops(dtype)
    body = {"llama": 8 * (4 * 512**2 + 3 * 512 * 1376), "bloom": 8 * 12 * 512**2}[args.model]
    head = 512 * args.vocabulary
    flops = 6 * (body + head)  # a token's share of the products, every token supervised
    state = 16 * (body + head * (2 if args.model == "llama" else 1)) / 1e9
    print(f"{args.model}, vocabulary {args.vocabulary:,}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, {args.dtype}, {'raised' if args.malloc else 'shipped'} malloc thresholds, peak "
          f"{peak / 1e9:.0f} GFLOP/s")
    for side, runs in results.items():
        rates = sorted(run["tokens"] / run["seconds"] for run in runs)
        used = (flops - 3 * head if side == "ours-masked" else flops) * rates[-1] / peak
        memory = max(run["peak_gb"] for run in runs)
        print(f"{side:15} {rates[0]:6.0f} to {rates[-1]:.0f} tokens/s, {used:4.0%} of peak, {memory:.2f} GB, "
              f"{memory - state:.2f} GB beyond the state")


if __name__ == "__main__":
    main()
