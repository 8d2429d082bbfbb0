"""The shipped recipes are read by the scripts they name."""

import re

import pytest

from minixllm.settings import parse

import train_dpo
import train_sft
from conftest import ROOT

# as the authors' scripts have them, but for DPO's dropout, which is off in policy and reference
PAPER = {"base": "nf4", "lora_r": 8, "lora_alpha": 16, "batch_size": 256, "warmup_steps": 100, "final_learning_rate": 0,
         "max_length": 1024}
SFT = {"learning_rate": 1e-4, "weight_decay": 0.05, "steps": 68_400, "lora_dropout": 0.05}
DPO = {"learning_rate": 5e-4, "weight_decay": 0, "steps": 60_000, "beta": 0.1, "loss": "dpo"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_is_read(path):
    script = train_sft if path.stem.endswith(("-sft", "gb")) else train_dpo
    assert script.__file__.split("/")[-1] in path.read_text()
    settings = parse(script.Settings, ["--config", str(path)])
    assert settings.model and settings.data
    if path.stem.startswith("one-card"):  # the paper's first stage, cut to a card
        assert settings.base == "nf4" and settings.gradient_checkpointing and settings.lora_r == PAPER["lora_r"]
        return
    expected = PAPER | (SFT if script is train_sft else DPO)
    assert {name: getattr(settings, name) for name in expected} == expected
    text = path.read_text()
    for name in expected.keys() - {"max_length", "final_learning_rate"}:                # none rests on a default
        assert re.search(rf"^{name} = ", text, re.MULTILINE), name
    targets = {"llama": {"q_proj", "v_proj", "k_proj"}, "bloom": {"query_key_value"}}
    assert set(settings.lora_targets) <= targets["llama" if "llama" in path.stem else "bloom"]
    assert f"--config recipes/{path.name}" in path.read_text()
