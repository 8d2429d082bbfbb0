"""Hugging Face directories, both ways, held to transformers; damaged ones; memory, atomicity, two processes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minixllm.errors import UserError
from minixllm.models.llama import LlamaConfig
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.weights import safetensors_files
from minixllm.weights.adapters import load
from minixllm.weights.hf_directory import (
    build,
    check_target,
    initialise,
    read_config,
    read_generation_config,
    save_model,
)

from conftest import PYTHONPATH, ROOT
from opened import load_model

LLAMA = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, rope_theta=500.0)
BLOOM = dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
KINDS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM)),
    "bloom-untied": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM, tie_word_embeddings=False)),
}
IDS = torch.arange(48).reshape(2, 24) * 7 % 96


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """theirs(kind) -> (transformers' model, the directory it saved); weights far from their initial values."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            model = KINDS[kind]().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            directory = tmp_path_factory.mktemp(kind)
            model.save_pretrained(directory)
            made[kind] = model, directory
        return made[kind]

    return make


@pytest.fixture
def directory(theirs, tmp_path):
    """directory(kind) -> a copy to damage."""

    def copy(kind="llama"):
        target = tmp_path / kind
        target.mkdir()
        for path in theirs(kind)[1].iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    return copy


def logits_of(model):
    with torch.no_grad():
        result = model(IDS)
    return getattr(result, "logits", result)


def same(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def rewrite(directory, change):
    """Apply `change` to the dictionary of tensors of a directory's one file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------ equal to transformers


@pytest.mark.parametrize("kind", KINDS)
def test_opens_what_transformers_saves(theirs, kind):
    model, directory = theirs(kind)
    ours = load_model(directory)
    assert not ours.training
    same(logits_of(ours), logits_of(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_opens_what_we_save(theirs, tmp_path, monkeypatch, kind, sharded):
    model, directory = theirs(kind)
    if sharded:
        monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", 20_000)
    save_model(load_model(directory), tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists() != sharded
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits_of(opened.eval()), logits_of(model))
    assert torch.equal(logits_of(load_model(tmp_path / "saved")), logits_of(load_model(directory)))
    ours, other = json.loads((tmp_path / "saved" / "config.json").read_text()), model.config.to_dict()
    assert ours["tie_word_embeddings"] == other["tie_word_embeddings"]
    if kind.startswith("llama"):  # transformers 4 knows no rope_parameters
        assert ours["rope_theta"] == other["rope_parameters"]["rope_theta"] == 500.0


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_shards_of_transformers(theirs, tmp_path, kind):
    model, directory = theirs(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(load_model(directory)))


def test_a_saved_shard_is_what_safetensors_writes(theirs, tmp_path):
    model = load_model(theirs("llama")[1])
    save_model(model.to(torch.bfloat16), tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert tensors.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter.to(torch.bfloat16))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_files_of_other_precisions_are_converted(directory, stored, wanted):
    folder = directory()
    rewrite(folder, lambda tensors: {key: tensor.to(stored) for key, tensor in tensors.items()})
    expected = load_file(folder / "model.safetensors")
    for name, parameter in load_model(folder, wanted).named_parameters():
        assert parameter.dtype == wanted and torch.equal(parameter, expected[name].to(wanted))


@pytest.mark.parametrize("kind, prefix", [("bloom", "transformer."), ("llama-tied", "model.")])
def test_files_of_a_bare_model_lack_the_prefix(theirs, directory, kind, prefix):
    folder = directory(kind)
    rewrite(folder, lambda tensors: {key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    same(logits_of(load_model(folder)), logits_of(theirs(kind)[0]))


BUFFERS = {
    "rotary_emb.inv_freq": torch.ones(4), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4).double(),
    "layers.1.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 8, 8).half(), "position_ids": torch.arange(8),
    "layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "layers.0.self_attn.masked_bias": torch.ones(1),
}


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
def test_buffers_beside_the_weights_are_ignored(theirs, directory, name, sharded):
    folder = directory()
    rewrite(folder, lambda tensors: tensors.update({f"model.{name}": BUFFERS[name]}))
    if sharded:
        in_shards(lambda d, m: None)(folder)
    same(logits_of(load_model(folder)), logits_of(theirs("llama")[0]))


def test_a_single_file_counts_before_a_stale_index(theirs, directory):
    folder = directory()
    content = (folder / "model.safetensors").read_bytes()
    in_shards(lambda d, m: m.update({"lm_head.weight": "gone.safetensors"}))(folder)
    (folder / "model.safetensors").write_bytes(content)
    same(logits_of(load_model(folder)), logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder)))


def test_tying_is_decided_from_config_and_tensors(theirs, directory, monkeypatch):
    monkeypatch.setattr(safetensors_files, "ROWS", 40)  # of the 97
    folder = directory("llama-tied")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tied = load_model(folder)
    assert tied.lm_head.weight is tied.embedding.weight  # to_empty() alone would have untied them
    reference = logits_of(tied)

    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding}))  # as torch's own files had it
    model = load_model(folder)
    assert model.lm_head.weight is model.embedding.weight and torch.equal(logits_of(model), reference)

    rewrite(folder, lambda tensors: {k: t for k, t in tensors.items() if k != "model.embed_tokens.weight"})
    assert torch.equal(logits_of(load_model(folder)), reference)  # stored once, under the head's name

    rewrite(folder, lambda tensors: tensors.update({"model.embed_tokens.weight": embedding,
                                                    "lm_head.weight": embedding + (torch.arange(97) == 96)[:, None]}))
    model = load_model(folder)
    assert model.lm_head.weight is not model.embedding.weight and not model.config.tie_word_embeddings
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    same(logits_of(model), logits_of(opened))

    folder = directory("llama")
    rewrite(folder, lambda tensors: {k: t for k, t in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(UserError, match="1 missing: lm_head.weight"):
        load_model(folder)


# ------------------------------------------------------------------------------------------------------------ bad input


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def in_shards(change):
    """A directory of two shards, whose index `change` edits; it may edit files too."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for file, part in zip(files, (names[:5], names[5:])):
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map = {name: files[i >= 5] for i, name in enumerate(names)}
        change(folder, weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


def duplicate(folder, weight_map):
    path = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | {"lm_head.weight": torch.zeros(97, 32)}, path)


WEIGHTS = {
    "none": (lambda d: (d / "model.safetensors").unlink(), "no weights, expected model.safetensors"),
    "pickle": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin.*pickle"),
    "gguf": (lambda d: (d / "model.safetensors").rename(d / "model-q4.gguf"), "model-q4.gguf.*GGUF"),
    "renamed gguf": (lambda d: (d / "model.safetensors").write_bytes(b"GGUF" + bytes(99)),
                     "model.safetensors: expected a safetensors file, found a GGUF file"),
    "renamed pickle": (lambda d: torch.save({}, d / "model.safetensors"), "found a zip archive, perhaps a PyT"),
    "lfs": (lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors: .* an empty, truncated"),
    "truncated": (lambda d: shorten(d / "model.safetensors"), "model.safetensors: .* truncated or corrupt"),
    "corrupt": (lambda d: (d / "model.safetensors").write_bytes(bytes([9]) * 9999), "truncated or corrupt"),
    "no directory": (lambda d: d.rename(d.with_name("moved")), "found nothing there, expected a Hugging Face"),
    "missing": (lambda d: rewrite(d, lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}),
                "1 missing: model.norm.weight"),
    "unexpected": (lambda d: rewrite(d, lambda t: t.update(score=torch.ones(1))), "1 unexpected: score"),
    "misshaped": (lambda d: rewrite(d, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
                  r"1 misshaped: model.norm.weight \(found \[31\], expected \[32\]\)"),
    "integers": (lambda d: rewrite(d, lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.int8)})),
                 "tensor model.norm.weight: found 'I8', expected one of F32"),
    "twice": (lambda d: rewrite(d, lambda t: t.update({"norm.weight": torch.ones(32)})), "are both model.norm.weight"),
    "absent shard": (in_shards(lambda d, m: (d / "model-00002-of-00002.safetensors").unlink()),
                     "model-00002-of-00002.safetensors: no such file"),
    "shard outside": (in_shards(lambda d, m: m.update({"lm_head.weight": "../model.safetensors"})),
                      "index.json: weight_map: found '../model.safetensors'"),
    "absolute shard": (in_shards(lambda d, m: m.update({"lm_head.weight": "/etc/x.safetensors"})), "'/etc/x.safetens"),
    "pickled shard": (in_shards(lambda d, m: m.update({"lm_head.weight": "x.bin"})), "found 'x.bin', expected a .safe"),
    "duplicate": (in_shards(duplicate), "index.json: tensor lm_head.weight: found in model-00002.*, expected in model-00001"),
    "not in shard": (in_shards(lambda d, m: m.update(other="model-00001-of-00002.safetensors")),
                     "index.json: tensor other: found in None, expected in model-00001"),
    "not in index": (in_shards(lambda d, m: m.pop("lm_head.weight")), "tensor lm_head.weight: .*expected in None"),
    "bad index": (in_shards(lambda d, m: m.update({"lm_head.weight": 3})), "index.json: weight_map"),
    "stray shard": (in_shards(lambda d, m: save_file({"x": torch.ones(1)}, d / "model-00003-of-00003.safetensors")),
                    "model-00003-of-00003.safetensors is not in model.safetensors.index.json"),
    "adapter": (lambda d: [(d / f"adapter_{name}").write_text("{}") for name in ("config.json", "model.safetensors")],
                "found a model and a PEFT adapter"),
    "only adapter": (lambda d: (d / "config.json").rename(d / "adapter_config.json"), "found a PEFT adapter"),
}


@pytest.mark.parametrize("damage, words", WEIGHTS.values(), ids=WEIGHTS)
def test_damaged_weights(directory, damage, words):
    folder = directory()
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_model(folder)
    assert folder.name in str(caught.value) and "\n" not in str(caught.value)


def test_two_whole_shards_are_fine(theirs, directory):
    folder = directory()
    in_shards(lambda d, m: None)(folder)
    same(logits_of(load_model(folder)), logits_of(theirs("llama")[0]))


CONFIG = {
    "no config": (lambda p: p.unlink(), "no config.json"),
    "not json": (lambda p: p.write_text('{\n"vocab_size": 96,,\n}'), "config.json: .*line 2"),
    "not an object": (lambda p: p.write_text("[]"), "config.json: .*list"),
    "not UTF-8": (lambda p: p.write_bytes(b"\xff\xfe\x00"), "config.json"),
    "no model_type": (dict(model_type=...), "config.json: model_type: found None, expected one of llama, bloom"),
    "other model_type": (dict(model_type="mistral"), "config.json: model_type: found 'mistral'"),
    "odd model_type": (dict(model_type=[]), r"config.json: model_type: found \[\]"),
    "quantised": (dict(quantization_config={"bits": 4}), "config.json: quantization_config"),
    "no size": (dict(hidden_size=...), "config.json: .*hidden_size"),
    "negative": (dict(hidden_size=-32), "config.json: .*hidden_size.*-32"),
    "zero": (dict(vocab_size=0), "config.json: .*vocab_size.*0"),
    "a string": (dict(num_hidden_layers="2"), "config.json: .*num_hidden_layers.*'2'"),
    "a fraction": (dict(intermediate_size=48.5), "config.json: .*intermediate_size.*48.5"),
    "heads do not divide": (dict(num_attention_heads=5, head_dim=...), "config.json: .*num_attention_heads"),
    "groups do not divide": (dict(num_key_value_heads=3), "config.json: .*num_key_value_heads"),
    "sizes that overflow": (dict(hidden_size=2 * 10**9, intermediate_size=2 * 10**9), "config.json: sizes of which no"),
    "deep": (lambda p: p.with_name("generation_config.json").write_text('{"x": ' + "[" * 400 + "]" * 400 + "}"),
             "generation_config.json: found objects and lists nested more than 100 deep"),
    "surrogate": (lambda p: p.with_name("generation_config.json").write_text('{"note": "\\ud800"}'),
                  r"generation_config.json holds half of a surrogate pair, U\+D800"),
    "surrogate in a key": (lambda p: p.with_name("generation_config.json").write_text('{"\\uDC01": 1}'),
                           r"generation_config.json holds half of a surrogate pair, U\+DC01"),
    "nested": (lambda p: p.write_text("[" * 10**5), "config.json: no valid JSON"),
    "generation": (lambda p: p.with_name("generation_config.json").write_text('{"eos_token_id": [2,'),
                   "generation_config.json: no valid JSON, perhaps cut short"),
    "a billion layers": (dict(num_hidden_layers=10**9), "config.json: num_hidden_layers: found 1000000000"),
    "other size": (dict(vocab_size=98), r"2 misshaped: .*\(found \[97, 32\], expected \[98, 32\]\)"),
    "another model": (dict(model_type="bloom", n_head=4, n_layer=2), "missing: transf.*unexpected: model"),
}


@pytest.mark.parametrize("damage, words", CONFIG.values(), ids=CONFIG)
def test_damaged_config(directory, damage, words):
    folder = directory()
    if isinstance(damage, dict):
        edit_json(folder / "config.json", **damage)
    else:
        damage(folder / "config.json")
    with pytest.raises(UserError, match=words) as caught:
        load_model(folder)
    assert folder.name in str(caught.value)


@pytest.mark.parametrize("content, words", [(b"GGUF" + bytes(9), "a GGUF file"),
                                            (b"PK\x03\x04", "a zip archive, perhaps a PyTorch pickle")])
def test_a_file_in_place_of_a_directory(tmp_path, content, words):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(UserError, match=f"found {words}, expected a Hugging Face model directory"):
        load(tmp_path / "model")


def test_a_hub_snapshot_is_made_of_symbolic_links(theirs, directory, tmp_path):
    folder = directory()
    in_shards(lambda d, m: None)(folder)
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    same(logits_of(load_model(tmp_path / "snapshot")), logits_of(theirs("llama")[0]))


# ----------------------------------------------------------------------------------------------------- with a tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_sentencepiece(["one two three four five", "six seven eight nine ten"] * 50, path, 300)


def small(vocab_size):
    model = build(LlamaConfig(**LLAMA | {"vocab_size": vocab_size}))
    initialise(model, 0)
    return model


def test_initial_weights_are_those_of_transformers():
    model = build(LlamaConfig(**LLAMA | {"attention_bias": True, "initializer_range": 0.5}))
    initialise(model, 0)
    assert model.model["norm"].weight.eq(1).all() and model.blocks[0].self_attn.q_proj.bias.eq(0).all()
    assert 0.4 < model.embedding.weight.std() < 0.6


def test_load_gives_model_and_tokenizer(tokenizer, tmp_path):
    model = small(tokenizer.vocab_size + 20)  # a padded embedding
    save_model(model, tmp_path / "saved", tokenizer, {"temperature": 0.6, "do_sample": True, "eos_token_id": [77, 2]})
    loaded, again = load(tmp_path / "saved")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert again.encode("three six") == tokenizer.encode("three six")

    kept = read_generation_config(tmp_path / "saved")
    assert kept == {"temperature": 0.6, "do_sample": True, "bos_token_id": tokenizer.bos_id,
                    "eos_token_id": [tokenizer.eos_id, 77], "pad_token_id": tokenizer.pad_id}
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert generation.temperature == 0.6 and generation.eos_token_id == [tokenizer.eos_id, 77]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").bos_token_id == tokenizer.bos_id


def test_stop_tokens_of_a_model_without_generation_config_are_kept(tokenizer, tmp_path):
    model = build(LlamaConfig(**LLAMA | {"vocab_size": tokenizer.vocab_size, "eos_token_id": [2, 5, 7]}))
    initialise(model, 0)
    save_model(model, tmp_path / "saved", tokenizer, {})
    assert read_generation_config(tmp_path / "saved")["eos_token_id"] == [2, 5, 7]
    (tmp_path / "saved/generation_config.json").write_text('{"eos_token_id": null, "top_p": 0.9}')
    save_model(load_model(tmp_path / "saved"), tmp_path / "again", tokenizer,
               read_generation_config(tmp_path / "saved"))
    assert read_generation_config(tmp_path / "again")["eos_token_id"] == [2, 5, 7]


def test_stop_tokens_may_stand_in_generation_config_alone(tokenizer, tmp_path):
    model = build(LlamaConfig(**LLAMA | {"eos_token_id": 2}))
    initialise(model, 0)
    save_model(model, tmp_path / "saved")
    path = tmp_path / "saved/generation_config.json"
    for written, stops in (('{"eos_token_id": [2, 18]}', [2, 18]), ('{"eos_token_id": 0}', 0),
                           ('{"eos_token_id": null, "pad_token_id": null}', 2), ("{}", 2)):
        path.write_text(written)
        assert read_config(tmp_path / "saved").eos_token_id == stops
    path.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match="generation_config.json: eos_token_id: found '</s>', expected a token id"):
        read_config(tmp_path / "saved")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer, tmp_path):
    save_model(small(tokenizer.vocab_size - 1), tmp_path / "saved", tokenizer)
    with pytest.raises(UserError, match=f"tokenizer has {tokenizer.vocab_size} ids.*{tokenizer.vocab_size - 1} rows"):
        load(tmp_path / "saved")


def test_a_model_without_a_tokenizer_is_refused(theirs):
    with pytest.raises(UserError, match="tokenizer"):
        load(theirs("llama")[1])


# ------------------------------------------------------------------------------------------ whole or not at all


class FailingTokenizer(SimpleNamespace):
    def save(self, directory, max_length):
        raise OSError(28, "No space left on device")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_replaces_a_model_whole(tmp_path, monkeypatch):
    target = tmp_path / "out" / "model"
    monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", 20_000)
    save_model(small(96), target)
    assert (target / "model.safetensors.index.json").exists()
    monkeypatch.undo()
    model = small(96).to(torch.bfloat16)
    save_model(model, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "generation_config.json",
                                                             "model.safetensors"]
    assert torch.equal(load_model(target).embedding.weight, model.embedding.weight.float())
    assert os.listdir(tmp_path / "out") == ["model"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save_model(small(96), tmp_path / "model")
    before = contents(tmp_path)
    broken = FailingTokenizer(bos_id=1, eos_id=2, pad_id=None)
    with pytest.raises(UserError, match="model: not saved: .*No space left"):
        save_model(small(96), tmp_path / "model", broken)
    assert contents(tmp_path) == before

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # in the middle of the weights, which safetensors writes
    try:
        with pytest.raises(UserError, match="model: not saved: model.safetensors: .*File too large"):
            save_model(small(96), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(tmp_path) == before

    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if "partial" not in str(a) else 1 / 0)
    with pytest.raises(ZeroDivisionError):  # not a user's mistake: its traceback is kept
        save_model(small(96), tmp_path / "model")
    assert contents(tmp_path) == before


def test_a_save_killed_between_its_renames_is_mended_by_the_next(tmp_path):
    save_model(small(96), tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.old")
    broken = FailingTokenizer(bos_id=1, eos_id=2, pad_id=None)
    with pytest.raises(UserError):
        save_model(small(96), tmp_path / "model", broken)
    load_model(tmp_path / "model")


def test_nothing_but_a_model_is_replaced(tmp_path):
    save_model(small(96), tmp_path / "model")
    (tmp_path / "model" / ".DS_Store").write_bytes(b"a file manager's")
    save_model(small(96), tmp_path / "model")
    (tmp_path / "model" / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="model: holds thesis.tex"):
        save_model(small(96), tmp_path / "model")
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="found a file"):
        check_target(tmp_path / "model" / "config.json")


# --------------------------------------------------------------------------------------------------------------- memory

MEMORY = """
import resource, sys, torch
from minixllm.weights.hf_directory import build, initialise, save_model
from opened import load_model
from minixllm.models.llama import LlamaConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
large = dict(vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=8)
directory, action = sys.argv[1:]
if action == "make":
    model = build(LlamaConfig(**large))
    initialise(model, 0)
    before = peak()
    save_model(model, directory + "/large")
    print(peak() - before)
    model = build(LlamaConfig(**small))
    initialise(model, 0)
    save_model(model, directory + "/small")
else:
    load_model(directory + "/small")  # what imports and first calls take is not the model's
    before = peak()
    model = load_model(directory + "/large")
    print(peak() - before, sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters()))
"""


def test_peak_memory_is_the_model_and_one_tensor(tmp_path):
    def run(action):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), action], cwd=ROOT, check=True,
                              env={**os.environ, "PYTHONPATH": PYTHONPATH}, capture_output=True, text=True)
        return map(int, done.stdout.split())

    slack = 8 << 20
    [writing] = run("make")
    assert writing < slack  # plain fp32 tensors go straight from memory to the file
    loading, model, largest = run("load")
    assert 190e6 < model < 220e6
    assert loading < model + largest + slack, (loading, model, largest)


# -------------------------------------------------------------------------------------------------------- two processes

SHARDED = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from minixllm.weights import safetensors_files
from minixllm.weights.hf_directory import *
from minixllm.errors import UserError
from minixllm.settings import run

dist.init_process_group("gloo")

def sharded(directory):
    model = build(read_config(directory))
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model

class Full:
    bos_id = eos_id = pad_id = None
    def save(self, directory, max_length):
        raise OSError(28, "No space left on device")

read, original = [], safetensors_files.Stored.read
def counting(self, slices=...):
    tensor = original(self, slices)
    read.append(tensor.numel())
    return tensor
safetensors_files.Stored.read = counting

def check(directory, out):
    model = sharded(directory)
    total = sum(parameter.numel() for parameter in model.parameters())
    read.clear()
    load_weights(model, directory)
    assert sum(read) < 0.52 * total, (sum(read), total)
    if model.config.tie_word_embeddings:
        assert model.lm_head.weight is model.embedding.weight
    ids = torch.arange(48).reshape(2, 24) * 7 % 96
    with torch.no_grad():
        logits = model(ids)
    save_model(model, out + "/saved")
    try:
        save_model(model, out + "/saved", Full())  # rank 0 fails alone: both must say so, and neither hang
        raise SystemExit("the failure was not seen")
    except UserError as error:
        assert "No space left" in str(error)

    fresh = sharded(directory)
    initialise(fresh, 5)
    save_model(fresh, out + "/fresh")
    if dist.get_rank() == 0:
        torch.save(logits, out + "/logits.pt")

for directory, out in zip(sys.argv[1::2], sys.argv[2::2]):
    check(directory, out)
dist.destroy_process_group()
run(lambda argv: None)  # ends the process before gloo's threads can abort it
"""


def test_two_processes_hold_slices_of_the_same_model(theirs, tmp_path, torchrun):
    """All kinds in one run, for most of its time is the start of the processes."""
    directories = {kind: theirs(kind)[1] for kind in ("llama", "llama-tied", "bloom")}
    (tmp_path / "script.py").write_text(SHARDED)
    for kind in directories:
        (tmp_path / kind).mkdir()
    arguments = [path for kind, directory in directories.items() for path in (directory, tmp_path / kind)]
    torchrun(2, tmp_path / "script.py", *arguments)
    for kind, directory in directories.items():
        check_slices(directory, tmp_path / kind)


def check_slices(directory, out):
    same(torch.load(out / "logits.pt"), logits_of(load_model(directory)))
    assert contents(out / "saved")[Path("model.safetensors")]
    whole, saved = load_model(directory), load_model(out / "saved")
    for (name, one), other in zip(whole.named_parameters(), saved.parameters()):
        assert torch.equal(one, other), name

    fresh = build(read_config(directory))
    initialise(fresh, 5)
    saved = load_model(out / "fresh")
    for (name, one), other in zip(fresh.named_parameters(), saved.parameters()):
        assert torch.equal(one, other), name
        assert one.std() < 0.1 or one.min() == 1  # as Hugging Face initialises
    assert sorted(os.listdir(out)) == ["fresh", "logits.pt", "saved"]

