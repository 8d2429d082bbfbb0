"""Preference alignment on cross-lingual feedback (Lai et al. 2024, arXiv 2406.01771, section 4), by DPO.

    torchrun train_dpo.py                                   # aligns what `torchrun train_sft.py` left in runs/sft
    torchrun --nproc-per-node 8 train_dpo.py --model runs/xllama/model --data feedback/ --output runs/xllama-dpo
    torchrun --nproc-per-node 8 train_dpo.py --config recipes/xllama-100-dpo.toml --resume

Policy and reference start from the same directory. With --lora-r the reference is the policy with its adapters switched
off; otherwise it is a second, frozen model, or with --reference cached its log-probabilities, computed once.
Plain `python train_dpo.py` is a run of one process.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minixllm import distributed
from minixllm.data.datasets import Preferences
from minixllm.data.records import record_files
from minixllm.data.stream import Stream, hold_out
from minixllm.data.token_cache import TokenCache
from minixllm.demo import feedback
from minixllm.errors import UserError
from minixllm.settings import STOPPED, parse, run, setting
from minixllm.training import losses
from minixllm.training.held_out import held_out_means
from minixllm.training.loop import train
from minixllm.training.model import open_model, save_trained
from minixllm.training.run_directory import exclusive_output
from minixllm.training.settings import OUTPUT, TrainingSettings
from minixllm.weights.hf_directory import read_directory, read_generation_config


@dataclass
class Settings(TrainingSettings):
    training = "preference optimisation"
    learning_rates = (5e-4, 1e-6)
    embedded_only = ("feedback",)

    output: str = setting("runs/dpo", OUTPUT)
    model: str | None = setting(None, "Hugging Face directory of the instruction-tuned model to align")
    data: list[str] = setting([], "files of pairs (JSON or JSONL: instruction, input, chosen, rejected, and optionally "
                                  "language, response_language), or directories of them")
    held_out_per_language: int = setting(20, "pairs of answers kept aside for each pair of languages, at most a tenth "
                                             "of them", least=0)
    feedback: str = setting("cross-lingual", "the embedded default's pairs: answers in another language than the "
                                             "instruction's, or in the same", ("cross-lingual", "monolingual"))
    loss: str = setting("dpo", "dpo (with --label-smoothing: conservative DPO) or ipo", ("dpo", "ipo"))
    beta: float = setting(0.1, "how strongly the policy is held to the reference", above=0)
    label_smoothing: float = setting(0.0, "chance that a pair is labelled the wrong way round; dpo only",
                                     least=0, most=0.5)
    nll_weight: float = setting(0.0, "how many times the chosen answer's negative log-likelihood is added to its loss",
                                least=0)
    reference: str = setting("live", "live: compute the reference at every step; cached: once before training, its "
                                     "log-probabilities kept on disk", ("live", "cached"))
    weight_decay: float = setting(0.0, "decoupled weight decay; matrices only, no biases or norms", least=0, most=1)
    batch_size: int = setting(256, "pairs a step, over all processes", least=1)
    micro_batch_size: int = setting(8, "pairs a process computes at once; more memory, fewer passes", least=1)
    max_length: int = setting(1024, "tokens of the longest pair's prompt and longer answer together",
                              least=1, most=2**24)

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError(f"label_smoothing: found {self.label_smoothing} with --loss ipo, expected 0")


def main(argv=None):
    settings = parse(Settings, argv, feedback.SETTINGS, description=__doc__)
    world = distributed.setup()
    embedded = not settings.model
    if embedded:
        settings.model = feedback.sft_model()
    with exclusive_output(settings, world):
        status = align(settings, world, embedded)
    distributed.close()
    return status


def align(settings, world, embedded: bool):
    # Policy and reference, from the same directory. Dropout is off in both: they stay in evaluation mode.
    if embedded:
        folder = Path(settings.cache) / f"feedback-{settings.feedback}"
        with world.one_by_one():
            if world.first:
                print("building the embedded pairs", flush=True)
            feedback.build(folder, settings.feedback)
        settings.data, settings.held_out = [str(folder / "train.jsonl")], [str(folder / "valid.jsonl")]
    config, tokenizer = read_directory(settings.model)
    generation_config = read_generation_config(settings.model)
    model = open_model(config, world, settings, settings.model).eval()

    # The pairs, each one document of two branches.
    def tokenised(files):
        return TokenCache(files, tokenizer, settings.cache, Preferences(settings.max_length, settings.too_long))

    data = tokenised(record_files(settings.data))
    if settings.held_out:
        held_out_data, records = tokenised(record_files(settings.held_out)), np.arange(len(data))
        held_out = np.arange(len(held_out_data))
    else:
        held_out_data, (records, held_out) = data, hold_out(data, settings.held_out_per_language, settings.seed)
    if world.first:
        for each in dict.fromkeys((data, held_out_data)):
            print(each.total() if embedded else f"{each.summary()}\n{each.total()}")
        print(f"{len(records):,} pairs to train on, {len(held_out):,} held out")
    stream = Stream(data, settings.seed, settings.batch_size, settings.micro_batch_size, None,
                    world.rank, world.size, records=records)

    tokens = settings.micro_batch_size * settings.max_length
    if settings.reference == "cached":
        def reference_of(pairs):
            return losses.stored_logps(model, world, pairs, settings.model, settings.cache,
                                       str(model.compute_dtype), tokens)

        reference = reference_of(data)
        held_out_reference = reference if held_out_data is data else reference_of(held_out_data)
    elif settings.lora_r:
        reference = held_out_reference = losses.policy_without_adapters
    else:
        reference = held_out_reference = losses.second_model(
            open_model(config, world, settings, settings.model, frozen=True))

    options = dict(kind=settings.loss, beta=settings.beta, label_smoothing=settings.label_smoothing,
                   nll_weight=settings.nll_weight)
    loss = functools.partial(losses.preference_loss, reference=reference, **options)
    measure = functools.partial(losses.pair_measures, model, reference=held_out_reference, **options)
    evaluate = functools.partial(held_out_means, world, held_out_data, held_out, tokens, measure)

    # The loop, and what comes out of it.
    before = feedback.measure(model, tokenizer, folder, world) if embedded else None
    if not train(model, world, settings, stream, loss, evaluate):
        return STOPPED
    save_trained(model, settings, tokenizer, generation_config)
    if embedded:
        feedback.report(before, feedback.measure(model, tokenizer, folder, world), settings.output, world)


if __name__ == "__main__":
    run(main)
