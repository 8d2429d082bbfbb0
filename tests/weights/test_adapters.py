"""Adapter directories: their own tokenizer and generation_config, and numbers out of range."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from minixllm.errors import UserError
from minixllm.generation import generate
from minixllm.tokenizers import load_tokenizer
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.weights import adapters

SIZES = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture
def adapter(tmp_path):
    """An adapter of peft, beside its base with a tokenizer of 300 pieces or so."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path / "base")
    train_sentencepiece(["one two three four five six seven"] * 50, tmp_path / "base/tokenizer.model", 300)
    (tmp_path / "base/tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path / "adapter"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapters_tokenizer_and_generation_config_win(adapter):
    base = adapter.parent / "base"
    model, tokenizer = adapters.load(adapter)
    assert tokenizer.path.parent == base and (len(tokenizer.prefix), model.config.eos_token_id) == (1, 2)
    first = generate(model, tokenizer, [tokenizer.encode("one")], 1)[0][0]
    (adapter / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    (adapter / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": tokenizer.model.id_to_piece(first), "add_bos_token": False}))
    (adapter / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    model, tokenizer = adapters.load(adapter)
    assert tokenizer.fingerprint == load_tokenizer(adapter).fingerprint
    assert (tokenizer.prefix, tokenizer.eos_id, model.config.eos_token_id) == ([], first, [2, 7])
    assert generate(model, tokenizer, [tokenizer.encode("one")], 8) == [[]]  # it ends where its own EOS comes first


def test_an_adapters_tokenizer_beyond_the_embedding_is_refused(adapter):
    train_sentencepiece(["one two three four five six seven"] * 50, adapter / "tokenizer.model", 400,
                        user_defined_symbols=[f"<{i}>" for i in range(60)])
    with pytest.raises(UserError, match=f"{adapter.name}: the tokenizer has .* ids, but the embedding only 320 rows"):
        adapters.load(adapter)


@pytest.mark.parametrize("key, values", [
    ("lora_alpha", [float("inf"), float("nan"), 0, "16", 1e300, 10**400, None, True, [16]]),
    ("r", [0, -1, 10**30, 2.0, "2", None, [2]]), ("target_modules", [3, [3], None, ["nope"], "(", "nope", "\ud800"]),
    ("peft_type", ["IA3", None, [1]]), ("bias", ["all", [1], 3]), ("init_lora_weights", ["pissa", [1], {"a": 1}]),
    ("base_model_name_or_path", [None, 3, "nowhere", "x\0y", "x" * 5000, "\ud800"]), ("use_dora", [True, "x" * 5000]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_odd_settings_are_one_line(adapter, key, values):
    path = adapter / "adapter_config.json"
    good = path.read_text()
    for value in values:
        path.write_text(json.dumps(json.loads(good) | {key: value}))
        with pytest.raises(UserError) as caught:
            adapters.load(adapter)
        assert "adapter" in str(caught.value) and len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
