"""Other programs read a saved directory as this one does: `AutoTokenizer` gives our ids for every kind of tokenizer."""

import json

import pytest
import transformers

from minixllm.demo import cldr
from minixllm.models.lora import LoraSettings, add_lora
from minixllm.models import lora
from minixllm.tokenizers import load_tokenizer
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.weights import adapters, hf_directory

from tokenizer_samples import HARD, SENTENCES, train

TEMPLATE = "{{ messages[0]['content'] }}"
TEXTS = (SENTENCES + HARD + [f"{a} {b[:20]}" for a, b in zip(SENTENCES, SENTENCES[::-1])]
         + [f"{text}\n\n{text}" for text in HARD]
         + ["### Instruction:\nWrite this date in full.\n\n### Response:\n5. März 2031", "x</s>", "<pad><s>", "[I] a"])
TEXTS = list(dict.fromkeys(TEXTS + [text[i:] for text in SENTENCES for i in (3, 8)]))
assert len(TEXTS) >= 100


def sentencepiece(folder, **options):
    train_sentencepiece([f"{text}{options.get('pretokenization_delimiter', '')}" for text in SENTENCES * 5],
                        folder / "tokenizer.model", 1200, **options)


def of_transformers(folder):
    """LLaMA's as transformers 5 saves it, a tokenizer.json with byte fallback alone."""
    sentencepiece(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()


def padded(folder):
    sentencepiece(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": load_tokenizer(folder).vocab_size}))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "add_eos_token": true}')


KINDS = {
    "demo": lambda folder: sentencepiece(folder, **cldr.TOKENIZER),
    "prefix": sentencepiece, "no prefix": lambda folder: sentencepiece(folder, add_dummy_prefix=False),
    "padded": padded, "byte fallback": of_transformers,
    **{shape: lambda folder, shape=shape: train(shape, SENTENCES * 3, folder / "tokenizer.json", 1500)
       for shape in ("bloom", "llama3")},
}
# transformers puts no space before a text that begins with one, and SentencePiece does.
PUTS_A_SPACE = ("prefix", "padded")


def model_of(architecture, tokenizer):
    model = hf_directory.build(cldr.config(architecture, tokenizer))
    hf_directory.initialise(model, 0)
    return model


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
@pytest.mark.parametrize("kind", KINDS)
def test_autotokenizer_gives_our_ids(kind, architecture, tmp_path):
    """After each of three runs: instruction tuning, LoRA, and preference optimisation of what these saved."""
    source = tmp_path / "source"
    source.mkdir()
    KINDS[kind](source)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(source)
    model = model_of(architecture, tokenizer)
    folders = [tmp_path / name for name in ("sft", "lora", "dpo")]
    for folder in folders:
        if folder.name == "lora":
            add_lora(model, LoraSettings(2, 4.0))
            lora.initialise(model, 0)
            lora.merge(model)
        hf_directory.save_model(model, folder, tokenizer, {"eos_token_id": [2, 5], "top_p": 0.9})
        model, tokenizer = adapters.load(folder)
    for folder in (folders[0], folders[-1]):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            if not (kind in PUTS_A_SPACE and text.startswith((" ", "▁"))):
                ids = theirs(text, split_special_tokens=True).input_ids
                assert ids == tokenizer.encode(text, add_special_tokens=True), text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
            tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert theirs.chat_template == TEMPLATE
        assert theirs.model_max_length == (512 if architecture == "llama" else theirs.model_max_length)
        assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [2, 5]
    assert {path.name for path in folders[0].iterdir()} == {path.name for path in folders[2].iterdir()}


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}], ids=["prefix", "no prefix"])
def test_a_wrong_prefix_in_the_source_is_mended(options, tmp_path):
    sentencepiece(tmp_path, **options)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": bool(options)}))
    load_tokenizer(tmp_path).save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["add_prefix_space"] == (not options)


def test_a_model_without_bos_is_saved_as_such(tmp_path):
    sentencepiece(tmp_path, bos_id=-1)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("one two").input_ids == tokenizer.encode("one two", add_special_tokens=True)
