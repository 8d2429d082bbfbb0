"""Instruction tuning of LLaMA or BLOOM in many languages (Lai et al. 2024, arXiv 2406.01771, section 3).

    torchrun train_sft.py                                   # the embedded default: 99 languages, minutes on a laptop
    torchrun --nproc-per-node 8 train_sft.py --model llama-7b/ --data alpaca-100/ --output runs/xllama
    torchrun --nproc-per-node 8 train_sft.py --config recipe.toml --resume

With neither --model nor --data a small model is trained from scratch on instructions that Unicode CLDR answers.
Plain `python train_sft.py` is a run of one process.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minixllm import distributed
from minixllm.data.datasets import Instructions
from minixllm.data.prompts import alpaca
from minixllm.data.records import read_instructions, record_files
from minixllm.data.stream import Stream, hold_out
from minixllm.data.token_cache import TokenCache
from minixllm.demo import cldr
from minixllm.demo.exact_match import describe, exact_match
from minixllm.files import write_json
from minixllm.generation import answer
from minixllm.settings import STOPPED, parse, run, setting
from minixllm.tokenizers import load_tokenizer
from minixllm.training.held_out import held_out_loss
from minixllm.training.loop import train
from minixllm.training.losses import sft_loss
from minixllm.training.model import open_model, save_trained
from minixllm.training.run_directory import exclusive_output
from minixllm.training.settings import OUTPUT, TrainingSettings
from minixllm.weights.hf_directory import ARCHITECTURES, read_directory, read_generation_config


@dataclass
class Settings(TrainingSettings):
    training = "instruction tuning"
    embedded_only = ("arch",)

    output: str = setting("runs/sft", OUTPUT)
    arch: str = setting("llama", "architecture of the embedded default's model", choices=sorted(ARCHITECTURES))
    data: list[str] = setting([], "files of records (JSON or JSONL: instruction, input, output, and optionally "
                                  "language), or directories of them")
    packing: bool = setting(True, "fill each row with records up to --max-length; otherwise a row is one record")
    lora_dropout: float = setting(0.05, "dropout before LoRA's adapters", least=0, most=1)
    train_on_prompt: bool = setting(False, "learn the prompts too, as the paper did, and not only the answers")
    temperature: float | None = setting(None, "draw languages in proportion to (number of records)^(1/temperature): "
                                              "above 1, small ones come more often; none: as they come", above=0)
    max_new_tokens: int = setting(64, "tokens of the longest answer printed at the end", least=1)


def main(argv=None):
    settings = parse(Settings, argv, cldr.SETTINGS, description=__doc__)
    world = distributed.setup()
    with exclusive_output(settings, world):
        status = fine_tune(settings, world)
    distributed.close()
    return status


def fine_tune(settings, world):
    # The model: on no device yet, then sharded, then each process fills its own slices.
    if settings.model:
        config, tokenizer = read_directory(settings.model)
        generation_config = read_generation_config(settings.model)
        train_files, held_out_files = record_files(settings.data), record_files(settings.held_out)
    else:
        folder = cldr.folder(settings.cache)
        with world.one_by_one():
            if not (folder / "tokenizer.model").exists():  # it is written last
                print("building the embedded data and its tokenizer, once: this takes a while", flush=True)
                cldr.build(folder)
        tokenizer = load_tokenizer(folder)
        config = cldr.config(settings.arch, tokenizer)
        train_files, held_out_files = [folder / "train.jsonl"], [folder / "valid.jsonl"]
        generation_config = {}
    model = open_model(config, world, settings, settings.model)

    # The data: records to packed rows, the loss on the answers.
    def tokenised(files):
        return TokenCache(files, tokenizer, settings.cache,
                          Instructions(settings.max_length, settings.too_long, settings.train_on_prompt))

    data = tokenised(train_files)
    if held_out_files:
        held_out_data, records = tokenised(held_out_files), None
        held_out = np.arange(len(held_out_data))
    else:
        held_out_data, (records, held_out) = data, hold_out(data, settings.held_out_per_language, settings.seed)
    if world.first and settings.model:
        print(data.summary())
    stream = Stream(data, settings.seed, settings.batch_size, settings.micro_batch_size,
                    settings.max_length if settings.packing else None, world.rank, world.size,
                    settings.temperature, records)

    evaluate = functools.partial(held_out_loss, model, world, held_out_data, held_out,
                                 settings.micro_batch_size * settings.max_length)

    # The loop, and what comes out of it.
    if not train(model, world, settings, stream, sft_loss, evaluate):
        return STOPPED
    save_trained(model, settings, tokenizer, generation_config)
    if settings.model:
        some = [held_out_data.read(record) for record in held_out[::max(1, len(held_out) // 12)]]
        prompts = [prompt.tolist() for prompt, _ in some]
        expected = [tokenizer.decode(right.tolist()) for _, right in some]
    else:
        test = list(read_instructions(folder / "test.jsonl"))
        prompts = [tokenizer.encode_prompt(alpaca(record.instruction, record.input)) for record in test]
        expected = [record.output for record in test]
    answers = answer(model, tokenizer, prompts, settings.max_new_tokens, world)
    if world.first:
        show(tokenizer, prompts, answers, expected)
        if not settings.model:
            result = exact_match(test, answers)
            print("\n" + describe(result))
            write_json(Path(settings.output) / "exact_match.json", result)


def show(tokenizer, prompts, answers, expected) -> None:
    """Print a dozen of the answers to held-out prompts."""
    print("some of its answers to held-out prompts:" if answers else "no record was held out")
    for i in range(0, len(answers), max(1, len(answers) // 12)):
        asked = tokenizer.decode(prompts[i]).partition("### Instruction:\n")[2].removesuffix("\n\n### Response:")
        asked = asked.replace("\n\n### Input:\n", "\n")
        print(f"\n{asked}\n-> {answers[i]}{'' if answers[i] == expected[i] else f'   (expected {expected[i]})'}")


if __name__ == "__main__":
    run(main)
