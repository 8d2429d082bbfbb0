"""Generated tokens per second, ours and transformers', on the same weights: python -m bench.generation [llama|bloom]

LLaMA: vocabulary 32,000, width 512, 8 layers, 8 heads, feed-forward 1,376; BLOOM of the same vocabulary, width, layers
and heads; or of --size; random weights, on a GPU where there is one. Prompts of 32 tokens and answers of --new, greedy
and drawn; then, greedy, prompts and answers of mixed lengths, which transformers runs in left-padded batches (of the
size at which it is fastest here, --their-batch). The two sides take turns; medians and the range of the ratios over the
rounds. The share of bandwidth counts the bytes of weights (embedding aside, but for a tied head) and of past keys and
values that the decoding steps must read, against what summing a large array reads. In bf16 answers part ways where the
best two of these random logits are within rounding.
"""

import argparse
import statistics

import torch
import transformers

from bench import machine
from minixllm.generation import generate

PROMPT, ROUNDS = 32, 3


class Tokenizer:
    eos_id = None


def make(kind: str, size: dict, dtype: torch.dtype):
    torch.manual_seed(0)
    ours, theirs = machine.ours(kind, size, dtype).eval(), machine.theirs(kind, size, dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def their_batch(model, prompts, new: int, **sampling) -> list[list[int]]:
    """transformers' answers to one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=machine.DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=machine.DEVICE)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=new,
                            do_sample=bool(sampling), **({"top_k": 0} | sampling if sampling else {}))
    return output[:, longest:].tolist()


def bytes_read(model, rows: int, new: int) -> int:
    """What the steps of decoding must read: every layer's weights a step, and each row's past."""
    weights = sum(p.numel() for p in model.blocks.parameters()) + model.lm_head.weight.numel()
    seen = rows * sum(range(PROMPT + 1, PROMPT + new))
    key_heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    past = seen * 2 * key_heads * model.config.head_dim * model.config.num_hidden_layers
    width = model.lm_head.weight.element_size()
    return width * (new - 1) * weights + (4 if machine.DEVICE == "cpu" else width) * past  # a CPU's cache is fp32


def report(name, ours, theirs, tokens, share=""):
    ratios = [t / o for o, t in zip(ours, theirs)]
    print(f"{name:42} transformers {tokens / statistics.median(theirs):6.0f}/s   minixllm "
          f"{tokens / statistics.median(ours):6.0f}/s   {statistics.median(ratios):.2f} times "
          f"({min(ratios):.2f} to {max(ratios):.2f}) {share}", flush=True)


def uniform(kind, ours, theirs, rows: int, new: int, peak: float, **sampling):
    prompts = torch.randint(3, 32000, (rows, PROMPT)).tolist()
    their_batch(theirs, prompts, 4, **sampling), generate(ours, Tokenizer, prompts, 4, **sampling)
    our_times, their_times = [], []
    for _ in range(ROUNDS):
        seconds, expected = machine.seconds(their_batch, theirs, prompts, new, **sampling)
        their_times.append(seconds)
        seconds, answers = machine.seconds(generate, ours, Tokenizer, prompts, new, **sampling)
        our_times.append(seconds)
    same = sum(a == b for a, b in zip(answers, expected))
    share = bytes_read(ours, rows, new) / statistics.median(our_times) / peak
    how = "".join(f", {name} {value:g}" for name, value in sampling.items())
    report(f"{kind}, {rows} prompt{'s' * (rows > 1)}{how}", our_times, their_times, rows * new,
           f"{share:.0%} of bandwidth" + ("" if sampling else f", {same} of {rows} answers equal"))


def mixed(kind, ours, theirs, count: int, new: int, batch: int):
    """Prompts of 8 to 256 tokens, answers that end at an EOS after 1 to `new`: the same in both."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(count).log_normal_(4.0, 0.8, generator=generator).clamp(8, 256).long().tolist()
    prompts = [torch.randint(3, 32000, (n,), generator=generator).tolist() for n in lengths]
    # With random weights any token may follow: about one in forty ends the answer.
    eos = torch.randperm(ours.config.vocab_size, generator=generator)[:ours.config.vocab_size // 40].tolist()
    theirs.generation_config.eos_token_id = eos

    class Eos:
        eos_id = None
    object.__setattr__(ours.config, "eos_token_id", eos)

    def their_side():
        answers = []
        for start in range(0, count, batch):
            for answer in their_batch(theirs, prompts[start:start + batch], new):
                end = next((i for i, token in enumerate(answer) if token in eos), len(answer))
                answers.append(answer[:end])
        return answers

    their_times, our_times = [], []
    for _ in range(ROUNDS):
        seconds, expected = machine.seconds(their_side)
        their_times.append(seconds)
        seconds, answers = machine.seconds(generate, ours, Eos, prompts, new)
        our_times.append(seconds)
    tokens = sum(len(answer) + 1 for answer in answers)
    same = sum(a == b for a, b in zip(answers, expected))
    report(f"{kind}, {count} of mixed lengths", our_times, their_times, tokens, f"{same} of {count} answers equal")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["llama", "bloom"], nargs="?", default="llama")
    parser.add_argument("--size", choices=list(machine.LLAMA), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="prompts of one length at a time")
    parser.add_argument("--greedy", action="store_true", help="nothing is drawn")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--mixed", type=int, default=192, help="prompts of mixed lengths")
    parser.add_argument("--their-batch", type=int, default=16, help="of those, how many transformers runs at a time")
    args = parser.parse_args()
    ours, theirs = make(args.model, machine.SIZES[args.model][args.size], getattr(torch, args.dtype))
    peak = machine.bandwidth()
    print(f"{args.size}, {args.dtype}, memory read {peak / 1e9:,.1f} GB/s, {machine.description()}, "
          f"transformers {transformers.__version__}")
    drawn = [] if args.greedy else [{"temperature": 1.0, "top_k": 50}, {"temperature": 0.7, "top_p": 0.9}]
    for rows in args.rows:
        for sampling in ({}, *drawn):
            uniform(args.model, ours, theirs, rows, args.new, peak, **sampling)
    mixed(args.model, ours, theirs, args.mixed, args.new, args.their_batch)


if __name__ == "__main__":
    main()
