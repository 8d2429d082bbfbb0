"""BPE with byte fallback in a tokenizer.json, as transformers 5 saves LLaMA 1 and 2: the ids of `tokenizers`."""

import json
import pickle
import random
import shutil

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minixllm.errors import UserError
from minixllm.tokenizers import load_tokenizer
from minixllm.tokenizers.fallback_bpe import ByteFallbackBPE

from tokenizer_samples import HARD, SENTENCES

STEPS = {
    "first": (None, pre_tokenizers.Metaspace("▁", "first", split=False)),
    "always": (None, pre_tokenizers.Metaspace("▁", "always", split=False)),
    "never": (None, pre_tokenizers.Metaspace("▁", "never", split=False)),
    "prepend": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "replace": (normalizers.Replace(" ", "▁"), None),
    "across words": (None, pre_tokenizers.Metaspace("▁", "first", split=False)),
}
SPECIAL = ["<unk>", "<s>", "</s>"]


@pytest.fixture(scope="module", params=STEPS)
def pair(request, tmp_path_factory):
    """(the oracle, ours), trained by `tokenizers`; "across words" also has tokens of several words."""
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    oracle = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    normalizer, pre_tokenizer = STEPS[request.param]
    trained_on = pre_tokenizers.Metaspace("▁", "first", split=request.param != "across words")
    oracle.pre_tokenizer = trained_on
    oracle.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False,
        limit_alphabet=300))
    if normalizer:
        oracle.normalizer = normalizer
    content = json.loads(oracle.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    if not pre_tokenizer:
        content["pre_tokenizer"] = None
    oracle = tokenizers.Tokenizer.from_str(json.dumps(content))
    if pre_tokenizer:
        oracle.pre_tokenizer = pre_tokenizer
    strip = [] if request.param in ("never", "replace") else [decoders.Strip(" ", 1, 0)]
    oracle.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    oracle.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    oracle.save(str(path))
    (path.parent / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    oracle.encode_special_tokens = True
    ours = load_tokenizer(path.parent)
    assert isinstance(ours, ByteFallbackBPE) and ours.in_words == (request.param != "across words")
    return oracle, ours


def check(oracle, ours, texts):
    for text, encoding in zip(texts, oracle.encode_batch(texts, add_special_tokens=False)):
        ids = ours.encode(text)
        assert ids == encoding.ids, repr(text)
        assert ours.decode(ids) == oracle.decode(ids), repr(text)
        assert ours.encode(text, add_special_tokens=True) == [1, *ids]


def test_ids_are_those_of_tokenizers(pair):
    rng = random.Random(0)
    characters = "".join(SENTENCES) + "   \n\t▁<>/s"
    generated = ["".join(rng.choice(characters) * rng.choice((1, 1, 1, 2, 9)) for _ in range(rng.randint(0, 60)))
                 for _ in range(1500)]
    check(*pair, SENTENCES + HARD + generated)


def test_stream_joined_is_decode(pair):
    rng, ours = random.Random(1), pair[1]
    for _ in range(500):
        ids = rng.choices(range(ours.vocab_size + 5), k=rng.randint(0, 30))
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)


def test_special_tokens_typed_are_text(pair):
    assert not {0, 1, 2}.intersection(pair[1].encode("</s> <s>a<unk>"))
    assert pair[1].decode([1, *pair[1].encode("a</s>"), 2, 99_999]).strip() == "a</s>"


def test_a_saved_directory_is_the_same_tokenizer(pair, tmp_path):
    oracle, ours = pair
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint == pickle.loads(pickle.dumps(again)).fingerprint


def llama(folder):
    """transformers' tokenizer of a directory with a tokenizer.model."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_llama_as_transformers_saves_it(data, tmp_path):
    """Real texts in 88 languages; the ids are SentencePiece's too, but where spaces stand in a row."""
    shutil.copy(data / "llama_tokenizer" / "tokenizer.model", tmp_path)
    theirs, original = llama(tmp_path), load_tokenizer(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.model").exists()
    ours, oracle = load_tokenizer(tmp_path / "saved"), theirs._tokenizer
    assert (ours.bos_id, ours.eos_id, ours.vocab_size, ours.prefix) == (1, 2, 32_000, [1])
    oracle.encode_special_tokens = True
    texts = [line for file in sorted((data / "ntrex").glob("*.txt"))
             for line in file.read_text("utf-8").split("\n")[:40]]
    check(oracle, ours, texts + HARD)
    # transformers orders merges otherwise than SentencePiece does where a text holds runs of spaces.
    assert all(ours.encode(text) == original.encode(text) for text in texts if "  " not in text)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(normalizer={"type": "NFKC"}), "normalizer and pre_tokenizer: found .*NFKC.*those of LLaMA"),
    (lambda c: c.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                                       "split": True}), "normalizer and pre_tokenizer: found"),
    (lambda c: c.update(decoder={"type": "ByteLevel"}), "decoder: found .*expected LLaMA's"),
    (lambda c: c.update(decoder={"type": "Sequence", "decoders": [3]}), "decoder: found 3, expected an object"),
    (lambda c: c["model"]["vocab"].pop("<0x0A>"), "model.vocab: found 'no <0x0A>', expected a token for each"),
    (lambda c: c["model"].update(ignore_merges=True), "model.ignore_merges: found True, expected false"),
    (lambda c: c["added_tokens"].append({"id": 9999, "content": "<call>"}), "added_tokens: '<call>': .*a special one"),
], ids=["normalizer", "split", "decoder", "decoder of a number", "byte", "ignore_merges", "added"])
def test_what_is_not_llamas_is_refused(pair, tmp_path, change, message):
    content = json.loads(pair[1].path.read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
