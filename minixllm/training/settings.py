"""What every training run can be asked for. Each script adds its own settings and overrides what differs there."""

from dataclasses import dataclass

from minixllm.errors import UserError
from minixllm.models.lora import LoraSettings
from minixllm.settings import setting

OUTPUT = "directory of the run: checkpoints, metrics.jsonl and the trained model"


@dataclass
class TrainingSettings(LoraSettings):
    """The settings that both scripts share, with the defaults of instruction tuning."""

    training = "any kind"          # written into checkpoints, so that a run of one kind is not resumed as another
    learning_rates = (1e-4, 2e-5)  # the defaults: for LoRA's adapters, and where every weight is trained
    embedded_only = ()             # settings that count only in the embedded default run

    model: str | None = setting(None, "Hugging Face directory to start from (config.json, safetensors, tokenizer)")
    data: list[str] = setting([], "files of records, or directories of them")
    held_out: list[str] = setting([], "more such files, to measure on; none: some of --data are kept aside for that")
    held_out_per_language: int = setting(100, "records of each language kept aside, at most a tenth of them", least=0)
    output: str = setting("runs/run", OUTPUT)
    cache: str = setting("runs/cache", "where tokenised data and the embedded data are kept between runs")
    resume: bool = setting(False, "continue from the latest checkpoint in --output, or start where there is none")
    epochs: float = setting(3.0, "passes over the data", above=0)
    steps: int | None = setting(None, "optimiser steps, instead of --epochs", least=1)
    batch_size: int = setting(256, "rows of --max-length tokens a step, over all processes", least=1)
    micro_batch_size: int = setting(8, "rows a process computes at once; more memory, fewer passes", least=1)
    max_length: int = setting(1024, "tokens of a row, and of the longest record", least=1, most=2**24)
    too_long: str = setting("drop", "leave out a record longer than --max-length, or cut it", ("drop", "truncate"))
    learning_rate: float | None = setting(None, "peak learning rate; the default depends on whether LoRA's adapters or "
                                                "all weights are trained", above=0)
    warmup_steps: int = setting(100, "steps over which the learning rate rises linearly", least=0)
    final_learning_rate: float = setting(0.0, "where the cosine ends, as a share of the peak", least=0, most=1)
    weight_decay: float = setting(0.05, "decoupled weight decay; matrices only, no biases or norms", least=0, most=1)
    beta2: float = setting(0.999, "AdamW's decay of squared gradients (beta1 is 0.9)", least=0, most=0.99999)
    clip: float = setting(1.0, "gradients whose global norm is larger are scaled down to it", above=0)
    seed: int = setting(0, "of the initial weights, the order of the data and dropout", least=0, most=2**32 - 1)
    dtype: str = setting("auto", "what the forward and backward compute in; the trained weights are fp32; "
                                 "auto is bfloat16 where that is faster", ("auto", "bfloat16", "float32"))
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward: less memory, a third more work")
    eval_every: int = setting(500, "steps between held-out losses; 0 for only the last", least=0)
    save_every: int = setting(500, "steps between checkpoints", least=1)
    keep: int = setting(2, "how many checkpoints are kept, the latest ones", least=1)

    def __post_init__(self):
        if bool(self.model) != bool(self.data):
            given, lacking = ("--model", "--data") if self.model else ("--data", "--model")
            raise UserError(f"{given} without {lacking}: expected both, or neither for the embedded default")
        if self.held_out and not self.data:
            raise UserError("--held-out without --data: expected both, or neither for the embedded default")
        if self.base != "auto" and not self.lora_r:
            raise UserError(f"--base {self.base} without --lora-r: expected a rank above 0, for only a frozen base is "
                            "held in another type")
        if self.learning_rate is None:
            self.learning_rate = self.learning_rates[0 if self.lora_r else 1]

    def without_effect(self) -> list[str]:
        """A line for each setting that was changed from its default but does not count in this run."""
        def changed(names):
            defaults = type(self)(model="any", data=["any"])
            return [name for name in names if getattr(self, name) != getattr(defaults, name)]

        lines = []
        if not self.lora_r and changed(["lora_alpha", "lora_targets"]):
            lines += ["every weight is trained: lora_alpha and lora_targets count only with --lora-r, a rank above 0"]
        if self.model:
            lines += [f"{name} counts only in the embedded default run, without --model and --data"
                      for name in changed(self.embedded_only)]
        return lines
