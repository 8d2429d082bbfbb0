"""Training beside a base in NF4: the same losses as over bitsandbytes' layers with peft, and models of whole weights."""

import json
import random

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch import nn

import train_dpo
import train_sft
from minixllm import distributed
from minixllm.distributed import full_tensor
from minixllm.errors import UserError
from minixllm.models import lora, nf4
from minixllm.models.bloom import Bloom, BloomConfig
from minixllm.models.llama import Llama, LlamaConfig
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.training.meter import Meter
from minixllm.training.model import open_model
from minixllm.weights.hf_directory import initialise, read_config, save_model

WORDS = "red green blue one two three four five cat dog bird fish runs sleeps sings".split()
TRAIN = ["--lora-r", "4", "--base", "nf4", "--batch-size", "6", "--micro-batch-size", "2", "--steps", "4",
         "--warmup-steps", "1", "--learning-rate", "0.05", "--held-out-per-language", "2", "--save-every", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two tiny models, of widths that a block of 64 divides and that it does not, instructions and pairs."""
    folder, rng = tmp_path_factory.mktemp("files"), random.Random(0)

    def say(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    tokenizer = train_sentencepiece([say(9, 9) for _ in range(300)], folder / "tokenizer.model", vocab_size=300)
    size = {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 2, "num_attention_heads": 4,
            "initializer_range": 0.2}
    for name, model in (
            ("llama", Llama(LlamaConfig(hidden_size=64, intermediate_size=128, num_key_value_heads=2, **size))),
            ("bloom", Bloom(BloomConfig(hidden_size=36, **size)))):
        initialise(model, seed=1)
        save_model(model, folder / name, tokenizer)
    with open(folder / "sft.jsonl", "w") as sft, open(folder / "pairs.jsonl", "w") as pairs:
        for _ in range(60):
            instruction, good, bad = say(3, 3), say(1, 6), say(1, 6)
            sft.write(json.dumps({"instruction": instruction, "output": good}) + "\n")
            pairs.write(json.dumps({"instruction": instruction, "chosen": good + " a", "rejected": bad + " b"}) + "\n")
    return folder


def settings(**changes):
    return train_sft.Settings(**{"model": ".", "data": ["."], "lora_r": 4, "lora_dropout": 0.0, "base": "nf4",
                                 "dtype": "float32", **changes})


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_forward_and_backward_are_those_of_the_rounded_weights(arch, files):
    world, config = distributed.setup("cpu"), read_config(files / arch)
    model = open_model(config, world, settings(), files / arch)
    plain = open_model(config, world, settings(base="fp32"), files / arch)
    assert {type(layer) for layer in lora.lora_layers(model).values()} == {lora.LoraNF4Linear}
    # embedding, norms and head are held in bf16
    for name, parameter in plain.named_parameters():
        if name in nf4.nf4_layers(model):
            rounded = nf4.dequantize(nf4.quantize(parameter.detach()), parameter.shape, torch.float32)
            parameter.data.copy_(rounded)
        elif not lora.is_adapter(name):
            assert dict(model.named_parameters())[name].dtype == torch.bfloat16
            parameter.data.copy_(parameter.data.bfloat16())
    ids = torch.randint(0, 300, (2, 17))
    for each in (model, plain):
        each.zero_grad()
        for layer in lora.lora_layers(each).values():
            nn.init.constant_(layer.lora_B.weight, 0.01)
        each.logits = each(ids[:, :-1], labels=ids[:, 1:])
        each.logits.sum().backward()
    torch.testing.assert_close(model.logits, plain.logits)
    for (name, layer), other in zip(lora.lora_layers(model).items(), lora.lora_layers(plain).values()):
        torch.testing.assert_close(full_tensor(layer.lora_A.weight.grad), other.lora_A.weight.grad, msg=name)


def test_twenty_steps_lose_as_over_bitsandbytes_layers_with_peft(files):
    model = open_model(read_config(files / "llama"), distributed.setup("cpu"), settings(), files / "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(files / "llama", dtype=torch.float32)
    for part in (theirs.model.embed_tokens, theirs.model.norm, theirs.lm_head, *(
            norm for block in theirs.model.layers for norm in (block.input_layernorm, block.post_attention_layernorm))):
        part.weight.data = part.weight.data.bfloat16().float()
    for name, layer in list(theirs.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            quantised = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                                          compute_dtype=torch.float32)
            quantised.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            theirs.model.layers.set_submodule(name, quantised.to("cpu"))
    theirs.is_loaded_in_4bit = True
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for (name, layer) in lora.lora_layers(model).items():
        theirs.get_submodule(f"base_model.model.{name}").lora_A.default.weight.data.copy_(full_tensor(layer.lora_A.weight.data))
    optimizers = [torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01)
                  for each in (model, theirs)]
    generator = torch.Generator().manual_seed(0)
    losses = []
    ids = torch.randint(3, 300, (3, 12), generator=generator)
    for _ in range(20):
        ours = -model(ids[:, :-1], labels=ids[:, 1:]).mean()
        expected = theirs(input_ids=ids, labels=ids).loss
        losses.append((ours.item(), expected.item()))
        for loss, optimizer in zip((ours, expected), optimizers):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert max(abs(a - b) for a, b in losses) < 1e-3, losses
    assert losses[0][0] - losses[-1][0] > 0.01  # and something was learnt


@pytest.mark.parametrize("script, data, arch", [(train_sft, "sft", "llama"), (train_sft, "sft", "bloom"),
                                                (train_dpo, "pairs", "llama"), (train_dpo, "pairs", "bloom")],
                         ids=["sft-llama", "sft-bloom", "dpo-llama", "dpo-bloom"])
def test_the_merged_model_is_the_original_with_the_update(script, data, arch, files, tmp_path, torchrun):
    def flags(output):
        return [*TRAIN, *["--lora-dropout", "0"] * (data == "sft"), "--dtype", "float32", "--model", str(files / arch), "--data", str(files / f"{data}.jsonl"),
                "--output", str(output), "--cache", str(files / "cache")]

    script.main(flags(tmp_path / "one"))
    adapter = load_file(tmp_path / "one/adapter/adapter_model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (files / arch, tmp_path / "one/model"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in adapter:
            update = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"] * 4
            assert update.abs().max() > 0.01
            weight = weight.bfloat16().float() + update
        assert after[name].dtype == torch.bfloat16 and torch.equal(after[name], weight.bfloat16()), name
    stored = dcp.FileSystemReader(tmp_path / "one/checkpoints/step-00000004").read_metadata().state_dict_metadata
    assert stored and all(lora.is_adapter(name) for name in stored)
    if arch == "llama":  # each process holds the base whole; the adapters are sharded as ever
        torchrun(2, f"{script.__name__}.py", *flags(tmp_path / "two"))
        for name, tensor in load_file(tmp_path / "two/adapter/adapter_model.safetensors").items():
            torch.testing.assert_close(tensor, adapter[name], rtol=1e-3, atol=1e-5)


def test_what_a_step_costs_does_not_depend_on_how_the_base_is_held(files):
    world, config = distributed.setup("cpu"), read_config(files / "llama")
    costs = {base: Meter(open_model(config, world, settings(base=base), files / "llama"), world).per_token
             for base in ("nf4", "bf16", "fp32")}
    assert costs["nf4"] == costs["bf16"] == costs["fp32"] > 0


def test_mistakes_are_named(files, tmp_path):
    with pytest.raises(UserError, match="--base nf4 without --lora-r: expected a rank above 0"):
        train_sft.main(["--base", "nf4", "--model", str(files / "llama"), "--data", str(files / "sft.jsonl")])
    folder = tmp_path / "quantised"
    folder.mkdir()
    config = json.loads((files / "llama/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(UserError, match="quantization_config: .*give the original weights: --base nf4 quantises"):
        read_config(folder)
