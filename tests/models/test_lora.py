"""LoRA against peft, and the invariants that make it safe to train and to merge."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minixllm import distributed
from minixllm.errors import UserError
from minixllm.models import lora
from minixllm.models.llama import Llama, LlamaConfig
from minixllm.models.lora import LoraLinear, LoraSettings, add_lora
from minixllm.training.model import open_model
from minixllm.weights import adapters, hf_directory
from minixllm.weights.adapters import base_directory, load, merge_adapter, read_adapter_config, save_adapter

from opened import load_model

TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"),
           "bloom": ("query_key_value", "dense", "dense_4h_to_h")}
IDS = torch.randint(0, 90, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama", "bloom"])
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def base(arch, tmp_path_factory):
    """A tiny random model saved by transformers."""
    import transformers

    torch.manual_seed(1)
    if arch == "llama":
        config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
        model = transformers.BloomForCausalLM(config)
    directory = tmp_path_factory.mktemp(arch)
    model.save_pretrained(directory)
    return directory


def adapted(base, arch, r=4, dropout=0.0, trained=True):
    """Our model with adapters, B filled as training would, so that they matter."""
    model = load_model(base)
    config = LoraSettings(r, 2.0 * r, list(TARGETS[arch]))
    config.lora_dropout = dropout
    add_lora(model, config)
    lora.initialise(model, seed=3)
    if trained:
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B.weight, std=0.2)
    return model.eval(), config


def test_an_untrained_adapter_changes_nothing_and_only_adapters_train(base, arch):
    model, _ = adapted(base, arch, trained=False)
    assert torch.equal(model(IDS), load_model(base)(IDS))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if lora.is_adapter(name)} and trainable


def test_peft_opens_our_adapter(base, arch, tmp_path):
    import peft
    import transformers

    model, config = adapted(base, arch)
    save_adapter(model, tmp_path, config, base=str(base))
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(IDS), load_model(base)(IDS), atol=1e-2)


@pytest.mark.parametrize("init", adapters.INITS)
def test_we_open_an_adapter_of_peft(base, arch, init, tmp_path):
    import peft
    import transformers

    torch.manual_seed(5)
    targets = [*TARGETS[arch], *["lm_head"] * (arch == "llama")]  # BLOOM's head is its embedding
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=targets, init_lora_weights=init, task_type="CAUSAL_LM")).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    config = read_adapter_config(tmp_path)
    assert (config.lora_r, config.lora_alpha) == (4, 7)
    model = load_model(base)
    merge_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(IDS), theirs.merge_and_unload()(IDS).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_directory_opens_as_its_base_with_it_merged(base, arch, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_directory, "load_tokenizer", lambda directory: SimpleNamespace(vocab_size=97))
    model, config = adapted(base, arch, dropout=0.25)
    save_adapter(model, tmp_path, config, base=str(base))
    assert read_adapter_config(tmp_path) == config
    opened, _ = load(tmp_path)
    assert not opened.training and torch.equal(load(base)[0](IDS), load_model(base)(IDS))
    torch.testing.assert_close(opened(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert base_directory(tmp_path) == base_directory(base) == base
    said = "base_model_name_or_path: found '{}', expected the directory of the adapted model"
    save_adapter(model, tmp_path, config, base="meta/llama")
    monkeypatch.chdir(tmp_path)
    told = said.format("meta/llama") + f"; a relative path starts from .*{tmp_path.name}$"
    with pytest.raises(UserError, match=told):
        load(tmp_path)
    save_adapter(model, tmp_path, config, base="/meta/llama")
    with pytest.raises(UserError, match=said.format("/meta/llama") + "$"):
        load(tmp_path)
    (tmp_path / "config.json").touch()  # of a model that is there itself
    assert base_directory(tmp_path) == tmp_path
    needed = {"peft_type": "LORA", "r": 4, "lora_alpha": 8.5, "lora_dropout": 0, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(needed))
    assert read_adapter_config(tmp_path) == LoraSettings(4, 8.5, ["q_proj"])


def test_gradients_are_those_of_peft(base, arch, tmp_path):
    import peft
    import transformers

    model, config = adapted(base, arch)
    save_adapter(model, tmp_path, config, base=str(base))
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path,
                                            is_trainable=True).eval()
    labels = IDS.roll(-1, 1)
    labels[:, -1] = -100
    logps = model(IDS, labels=labels)
    loss = theirs(IDS, labels=IDS).loss  # the mean over the 20 tokens with a label
    torch.testing.assert_close(-logps.sum() / 20, loss)
    (-logps.sum() / 20).backward()
    loss.backward()
    expected = {name.replace(".default", "").removeprefix(adapters.PREFIX): parameter.grad
                for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


def test_merged_equals_unmerged(base, arch):
    model, _ = adapted(base, arch)
    unmerged = model(IDS)
    names = [name for name, _ in load_model(base).named_parameters()]
    lora.merge(model)
    torch.testing.assert_close(model(IDS), unmerged, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names


def test_merging_adds_in_fp32_and_rounds_once(base, arch):
    """In bf16 an update far below a weight's own rounding would otherwise be rounded before it is added."""
    model, _ = adapted(base, arch)
    layers = {name: (layer.weight.detach().bfloat16(), layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
              for name, layer in lora.lora_layers(model).items()}
    for name, (weight, *_) in layers.items():
        model.get_submodule(name).weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    lora.merge(model)
    for name, (weight, A, B, scaling) in layers.items():
        assert torch.equal(model.get_submodule(name).weight, (weight.float() + B @ A * scaling).bfloat16())


def test_disabled_adapters_leave_the_base_model(base, arch):
    model, _ = adapted(base, arch)
    with lora.disabled(model):
        assert torch.equal(model(IDS), load_model(base)(IDS))
        assert torch.equal(model(IDS, labels=IDS), load_model(base)(IDS, labels=IDS))
    with pytest.raises(ZeroDivisionError), lora.disabled(model):
        1 / 0
    assert not torch.equal(model(IDS), load_model(base)(IDS))


def test_dropout_acts_on_the_adapter_alone_and_only_in_training(base, arch):
    model, _ = adapted(base, arch, dropout=0.5)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    with lora.disabled(model):
        assert torch.equal(model(IDS), load_model(base)(IDS))


def test_a_target_that_is_no_layer_is_named(base):
    with pytest.raises(UserError, match="'q_prj' names no linear layer of this model; it has .*"):
        add_lora(load_model(base), LoraSettings(4, 8.0, ["q_prj"]))
    with pytest.raises(UserError, match="'roj' names no linear layer"):  # only whole parts of a name are looked for
        add_lora(load_model(base), LoraSettings(4, 8.0, ["roj"]))
    with pytest.raises(UserError, match="LoRA target 'lm_head': found the head, expected layers below it"):
        add_lora(load_model(base), LoraSettings(4, 8.0, ["lm_head"]))
    with pytest.raises(UserError, match="lora_r: found 0, expected a whole number of at least 1"):
        add_lora(load_model(base), LoraSettings(0, 8.0))


@pytest.mark.parametrize("pattern", [r".*layers\.1\.self_attn\.[qv]_proj|.*h\.1\..*query_key_value",
                                     ".*dense|.*o_proj"])
def test_targets_of_an_adapter_may_be_a_regular_expression(base, pattern, tmp_path):
    import peft
    import transformers

    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(
        r=3, target_modules=pattern, init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(base)
    merge_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_a_head_that_is_the_embedding_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}))
    save_file({adapters.PREFIX + "lm_head.lora_A.weight": torch.ones(2, 8),
               adapters.PREFIX + "lm_head.lora_B.weight": torch.ones(9, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"found an adapter of lm_head, which is the embedding, too"):
        merge_adapter(Llama(LlamaConfig(9, 8, 8, 1, 1, tie_word_embeddings=True)), tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"peft_type": "IA3"}, "peft_type: found 'IA3'"),
    ({"use_dora": True}, "use_dora"),
    ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
    ({"use_qalora": True}, "use_qalora: found True, expected plain LoRA without it"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ({"of_a_later_peft": 3}, "of_a_later_peft: found 3"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: found 'pissa_niter_4', which changes the base"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"init_lora_weights": "corda"}, "init_lora_weights"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    ({"bias": "all"}, "bias: found 'all'"),
    ({"r": "8"}, "r: found '8', expected a whole number of at least 1"),
    ({"r": 0}, "r: found 0"),
    ({"r": 2.5}, "r: found 2.5"),
    ({"lora_alpha": float("inf")}, "lora_alpha: found inf, expected a number above 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha: found nan"),
    ({"lora_alpha": 0}, "lora_alpha: found 0"),
    ({"target_modules": "all-linear"}, "target_modules: LoRA target 'all-linear' names no linear layer"),
    ({"target_modules": "(q_proj"}, "target_modules: missing \\)"),
    ({"target_modules": [3]}, "target_modules: found 3, expected text"),
    ({"target_modules": None}, "target_modules: found None, expected text"),
])
def test_an_adapter_that_is_not_plain_lora_is_refused_by_name(change, message, base, arch, tmp_path):
    model, config = adapted(base, arch)
    save_adapter(model, tmp_path, config)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="adapter_config.json: " + message):
        merge_adapter(load_model(base), tmp_path)


def test_adapter_tensors_that_do_not_fit_are_named(base, arch, tmp_path):
    model, config = adapted(base, arch)
    save_adapter(model, tmp_path, config)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"r": 5}))
    with pytest.raises(UserError, match=r"lora_A.weight \(found \[4, 32\], expected \[5, 32\]\)"):
        merge_adapter(load_model(base), tmp_path)
    path.write_text(json.dumps(saved | {"target_modules": saved["target_modules"][:1]}))
    with pytest.raises(UserError, match="unexpected"):
        merge_adapter(load_model(base), tmp_path)
    path.write_text(json.dumps(saved))
    model = load_model(base)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name, _ = tensors.popitem()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"1 missing: {name}"):
        merge_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="adapter_model.safetensors"):
        merge_adapter(model, tmp_path)


@pytest.mark.parametrize("dtype, held", [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_the_base_is_held_once_and_adapters_in_fp32(base, dtype, held):
    config = hf_directory.read_config(base)
    settings = SimpleNamespace(dtype=dtype, lora_r=4, lora_alpha=8.0, lora_dropout=0.3, lora_targets=[], seed=0,
                               base="auto")
    model = open_model(config, distributed.setup("cpu"), settings, base)
    assert {layer.dropout.p for layer in lora.lora_layers(model).values()} == {0.3}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if lora.is_adapter(name) else held), name
        assert parameter.requires_grad == lora.is_adapter(name)
    settings.lora_r = 0
    whole = open_model(config, distributed.setup("cpu"), settings, base)
    assert {(p.dtype, p.requires_grad) for p in whole.parameters()} == {(torch.float32, True)}


def test_what_is_random_follows_the_seed(base):
    drawn = []
    for seed in (0, 5, 5):
        settings = SimpleNamespace(dtype="float32", lora_r=4, lora_alpha=8.0, lora_dropout=0.0, lora_targets=[],
                                   seed=seed, base="auto")
        model = open_model(hf_directory.read_config(base), distributed.setup("cpu"), settings)
        drawn.append([model.embedding.weight, *(layer.lora_A.weight for layer in lora.lora_layers(model).values())])
    for first, other, again in zip(*drawn):
        assert torch.equal(other, again) and not torch.equal(first, other)


def test_adapters_start_gaussian_with_the_size_of_their_input(base, arch):
    model, _ = adapted(base, arch, r=200, trained=False)
    for name, layer in lora.lora_layers(model).items():
        A = layer.lora_A.weight.detach() * layer.in_features ** 0.5
        assert abs(A.mean()) < 0.05 and abs(A.std() - 1) < 0.05, name
        assert 0.03 < (A.abs() > 1.96).float().mean() < 0.07  # a uniform one would have none there
        assert not layer.lora_B.weight.any()


def test_checkpointing_changes_no_gradient_under_dropout(base, arch):
    model, _ = adapted(base, arch, dropout=0.5)
    model.train()
    gradients = []
    for model.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        model(IDS).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and all(grad.any() for grad in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_every_layer_of_a_target_is_adapted(base, arch):
    model, _ = adapted(base, arch)
    assert all(isinstance(layer, LoraLinear) for layer in lora.lora_layers(model).values())
    assert len(lora.lora_layers(model)) == 2 * 3
