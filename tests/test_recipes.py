"""The shipped recipes are read by the scripts they name."""

import pytest

import train_dpo
import train_sft
from conftest import ROOT
from minixllm.settings import parse


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_is_read(path):
    script = train_sft if path.stem.endswith("-sft") else train_dpo
    assert script.__file__.split("/")[-1] in path.read_text()
    settings = parse(script.Settings, ["--config", str(path)])
    assert settings.lora_r == 8 and settings.batch_size == 256 and settings.model and settings.data
    targets = {"llama": {"q_proj", "v_proj", "k_proj"}, "bloom": {"query_key_value"}}
    assert set(settings.lora_targets) <= targets["llama" if "llama" in path.stem else "bloom"]
    assert f"--config recipes/{path.name}" in path.read_text()
