"""Answer instructions with the model in a directory, printing as it goes.

    python -m minixllm.generate --model runs/sft/model --input 2031-03-05 "Write this date in full."

Each prompt is put into the Alpaca template on which the models are trained; with --raw it is continued as it stands.
"""

import argparse
import sys

import torch

from minixllm import distributed, generation
from minixllm.data import prompts
from minixllm.errors import UserError
from minixllm.settings import Parser, run
from minixllm.weights import adapters


def main(argv=None):
    parser = Parser(prog="python -m minixllm.generate", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to answer; none: each line of stdin")
    parser.add_argument("--model", metavar="DIR",
                        help="Hugging Face directory of a LLaMA or BLOOM, or of a LoRA adapter (required)")
    parser.add_argument("--input", default="", help="the instruction's input, for the Alpaca template")
    parser.add_argument("--raw", action="store_true", help="no template: continue the prompt itself")
    parser.add_argument("--max-new-tokens", type=int, default=256,
                        help="tokens of the longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default: 0)")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest tokens; with --temperature")
    parser.add_argument("--top-p", type=float,
                        help="choose among the likeliest tokens that hold this probability; with --temperature")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu or cuda; by default CUDA where there is one")
    args = parser.parse_args(argv)
    if not args.model:
        raise UserError("--model is needed: the directory of the model that shall answer; --help lists the flags")
    if (args.top_k or args.top_p) and not args.temperature:
        raise UserError("--top-k and --top-p choose at random: expected a --temperature above 0, such as 0.7")
    if args.raw and args.input:
        raise UserError("--input belongs to the template, which --raw leaves out")

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU here, expected one, or --device cpu")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = adapters.load(args.model, distributed.compute_dtype("auto", device), device)
    if not args.prompts:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is no UTF-8 is named as such below
    for prompt in args.prompts or map(str.rstrip, sys.stdin):
        text = prompt if args.raw else prompts.alpaca(prompt, args.input)
        for piece in generation.stream(model, tokenizer, tokenizer.encode_prompt(text), args.max_new_tokens,
                                       temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                                       seed=args.seed):
            print(piece, end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    sys.argv[0] = "minixllm.generate"
    run(main)
