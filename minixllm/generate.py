"""Answer instructions with the model in a directory, printing as it goes.

    python -m minixllm.generate --model runs/sft/model --input 2031-03-05 "Write this date in full."

Each prompt is put into the Alpaca template on which the models are trained; with --raw it is continued as it stands.
"""

import sys
from dataclasses import dataclass

from minixllm.errors import UserError
from minixllm.settings import parse, run, setting


@dataclass
class Settings:
    prompts: list[str] = setting([], "what to answer; none: each line of standard input", positional=True)
    model: str | None = setting(None, "Hugging Face directory of a LLaMA or BLOOM, or of a LoRA adapter (required)")
    input: str = setting("", "the instruction's input, for the Alpaca template")
    raw: bool = setting(False, "no template: continue the prompt itself")
    max_new_tokens: int = setting(256, "tokens of the longest answer", least=1)
    temperature: float = setting(0.0, "0: always the likeliest token", least=0)
    top_k: int | None = setting(None, "choose among the k likeliest tokens; with --temperature", least=1)
    top_p: float | None = setting(None, "choose among the likeliest tokens that hold this probability; with "
                                        "--temperature", above=0, most=1)
    seed: int = setting(0, "the same seed gives the same text", least=0)
    device: str | None = setting(None, "cpu or cuda; none: CUDA where there is a GPU", choices=("cpu", "cuda"))

    def __post_init__(self):
        if not self.model:
            raise UserError("--model is needed: the directory of the model that shall answer; --help lists the flags")
        if (self.top_k or self.top_p) and not self.temperature:
            raise UserError("--top-k and --top-p choose at random: expected a --temperature above 0, such as 0.7")
        if self.raw and self.input:
            raise UserError("--input belongs to the template, which --raw leaves out")


def main(argv=None):
    settings = parse(Settings, argv, description=__doc__, prog="python -m minixllm.generate")
    import torch  # only now: it takes seconds, and --help or a wrong flag is answered without it

    from minixllm import distributed, generation
    from minixllm.data.prompts import alpaca
    from minixllm.weights import adapters
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU here, expected one, or --device cpu")
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = adapters.load(settings.model, distributed.compute_dtype("auto", device), device)
    positions = getattr(model.config, "max_position_embeddings", None)  # BLOOM has no limit
    if not settings.prompts:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # the tokenizer names what is not UTF-8
    for prompt in settings.prompts or filter(None, map(str.rstrip, sys.stdin)):
        ids = tokenizer.encode_prompt(prompt if settings.raw else alpaca(prompt, settings.input))
        if positions and len(ids) > positions:
            print(f"the prompt has {len(ids):,} tokens, but the model was trained on {positions:,} positions: its "
                  "answer may make no sense", file=sys.stderr)
        for piece in generation.generate_text(
                model, tokenizer, ids, settings.max_new_tokens, temperature=settings.temperature,
                top_k=settings.top_k, top_p=settings.top_p, seed=settings.seed):
            print(piece, end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    sys.argv[0] = "minixllm.generate"
    run(main)
