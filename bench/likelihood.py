"""Likelihoods of two-choice items a second, ours and lm-evaluation-harness': python -m bench.likelihood --items 500

LLaMA: vocabulary 32,000, width 512, 8 layers, 8 heads, feed-forward 1,376, random weights. Items: a context of 45 to
65 words (a word is a token) and two choices of 5 to 15, about 65 tokens with one choice. lm-evaluation-harness (its
`hf` model, with the batch size named) computes the context anew for each choice. The sides take turns; each round's
ratio is of ours against the harness at its best batch size. Log-probabilities must agree, to rounding in bf16.
"""

import argparse
import random
import statistics
import time
import warnings

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers

from minixllm.generation import choice_logps
from minixllm.models.llama import Llama, LlamaConfig

ROUNDS, BATCHES = 3, (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    count, dtype = args.items, getattr(torch, args.dtype)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
                                      intermediate_size=1376)
    theirs, ours = transformers.LlamaForCausalLM(config).eval(), Llama(LlamaConfig.from_dict(config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 32000)}
    words = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>",
                                                     pad_token="<pad>")
    draw = random.Random(0)

    def ids(low, high):
        return [draw.randrange(3, 32000) for _ in range(draw.randint(low, high))]

    def text(tokens):
        return " ".join(f"w{i}" for i in tokens)

    items = [(ids(45, 65), [ids(5, 15), ids(5, 15)]) for _ in range(count)]
    requests = [Instance("loglikelihood", {}, (text(context), " " + text(choice)), n)
                for n, (context, choices) in enumerate(items) for choice in choices]
    harness = {size: HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=size) for size in BATCHES}

    def of_harness(lm):
        return lambda: [logp for logp, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    sides = {f"lm-eval, batch {size}": of_harness(lm) for size, lm in harness.items()}
    sides["minixllm"] = lambda: [logp for logps in choice_logps(ours, items) for logp in logps]
    seconds, found = {name: [] for name in sides}, {}
    choice_logps(ours, items[:20]), harness[8].loglikelihood(requests[:16], disable_tqdm=True)
    for _ in range(ROUNDS):
        for name, side in sides.items():
            start = time.perf_counter()
            found[name] = side()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        rates = [2 * count / t for t in times]
        print(f"{name:20}{statistics.median(rates):8.1f} requests/s ({min(rates):.1f} to {max(rates):.1f})")
    mine = seconds.pop("minixllm")
    ratios = [min(times) / own for own, times in zip(mine, zip(*seconds.values()))]
    print(f"minixllm is {statistics.median(ratios):.2f} times as fast as the harness at its best "
          f"({min(ratios):.2f} to {max(ratios):.2f})")
    difference = max(abs(a - b) for a, b in zip(found["minixllm"], found["lm-eval, batch 1"]))
    print(f"largest difference of a log-probability: {difference:.1e}")


if __name__ == "__main__":
    main()
