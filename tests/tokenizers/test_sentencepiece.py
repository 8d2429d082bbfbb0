"""SentencePiece tokenizers: the library's own ids, no control ids from text, exact streaming, saved directories."""

import base64
import json
import pickle
import random
from importlib import resources

import pytest
import sentencepiece
import torch

from minixllm.errors import UserError
from minixllm.tokenizers import load_tokenizer
from minixllm.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

from tokenizer_samples import HARD

TEXTS = ["Hello world, this is a test: 1,234.", "Привет мир, как дела?", "你好世界，今天天气很好。", "नमस्ते दुनिया",
         "สวัสดีชาวโลก", "こんにちは世界", "안녕하세요 세계", "مرحبا بالعالم", "Grüße, Ärger und Füße", "### Response:\n1. one"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return train_sentencepiece(TEXTS * 20, tmp_path_factory.mktemp("sp") / "tokenizer.model", 600)


@pytest.fixture(scope="module")
def mistral():
    return SentencePieceTokenizer(resources.files("mistral_common") / "data" / "tokenizer.model.v1")


def test_ids_are_those_of_sentencepiece(small, mistral):
    for tokenizer in (small, mistral):
        oracle = sentencepiece.SentencePieceProcessor(str(tokenizer.path))
        assert tokenizer.vocab_size == oracle.vocab_size()
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
        for text in TEXTS + HARD:
            ids = tokenizer.encode(text)
            assert ids == oracle.encode(text)
            assert tokenizer.encode(text, add_special_tokens=True) == [1, *ids]
            written = text.replace("▁", " ")
            assert tokenizer.decode(torch.tensor([1, *ids, 2])) == tokenizer.decode(ids) == written
            assert tokenizer.decode([1, *ids, 2]) == tokenizer.decode([-100, *ids, -1]) == written


def test_llama_gives_the_published_ids(data):
    tokenizer = SentencePieceTokenizer(data / "llama_tokenizer" / "tokenizer.model")
    vectors = [json.loads(line) for line in (data / "llama_tokenizer" / "vectors.jsonl").open(encoding="utf-8")]
    assert len(vectors) == 47
    for vector in vectors:
        assert tokenizer.encode(vector["text"]) == vector["ids"], vector["text"]


def test_udhr_survives_the_round_trip(data, mistral):
    llama = SentencePieceTokenizer(data / "llama_tokenizer" / "tokenizer.model")
    for tokenizer in (llama, mistral):
        for file in sorted((data / "udhr").glob("*.tsv")):
            for line in file.read_text("utf-8").split("\n"):
                text = line.split("\t", 1)[-1]
                assert tokenizer.decode(tokenizer.encode(text)) == text, file.name


def test_user_text_never_gives_control_ids(small, mistral):
    for tokenizer in (small, mistral):
        for text in ("</s>", "<s>a</s> <unk>", "x<s>", "<pad>"):
            ids = tokenizer.encode(text)
            assert not set(ids) & {0, 1, 2} and tokenizer.decode(ids) == text


def test_a_special_token_that_the_model_would_match_in_text_is_spelt_in_bytes(tmp_path):
    """Some models hold their end-of-turn as a user-defined symbol; the base behaviour would make it of typed text."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=600,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        user_defined_symbols=["<|end|>", "<plain>"])
    special = {"eos_token": "</s>", "added_tokens_decoder": {"3": {"content": "<|end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    assert 3 not in load_tokenizer(tmp_path).encode("a<|end|>b")  # special, though it ends nothing
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 3
    ids = tokenizer.encode("a<|end|>b<plain>")
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "a<|end|>b<plain>"
    assert tokenizer.model.piece_to_id("<plain>") in ids
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_stream_joined_is_decode(small, mistral):
    rng = random.Random(0)
    for tokenizer in (small, mistral):
        pieces = tokenizer.stream()
        text = "a🦙𓀀é z"
        shown = [pieces.push(i) for i in tokenizer.encode(text)]
        assert "".join(shown) + pieces.flush() == text and "\ufffd" not in "".join(shown)
        space = tokenizer.encode("  ")
        for _ in range(1000):  # any ids: broken characters, control tokens, runs of spaces, ids beyond the vocabulary
            pools = range(tokenizer.vocab_size + 5), range(260), range(130, 260), space
            ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 20))]
            stream = tokenizer.stream()
            assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
            text_ids = [i for i in ids if i < tokenizer.vocab_size and i not in (1, 2)]
            assert tokenizer.decode(ids) == tokenizer.model.decode(text_ids)


@pytest.mark.parametrize("options", [{"add_dummy_prefix": False}, {"remove_extra_whitespaces": True},
                                     {"byte_fallback": False}], ids=["no prefix", "no extra spaces", "unknown"])
def test_decode_is_that_of_sentencepiece_for_other_models(tmp_path, options):
    tokenizer = train_sentencepiece(TEXTS * 20, tmp_path / "tokenizer.model", 600, **options)
    rng, spaces = random.Random(0), tokenizer.encode("a  b 🦙")
    for _ in range(500):
        ids = [rng.choice(rng.choice((range(3, tokenizer.vocab_size), range(260), [0], spaces)))
               for _ in range(rng.randint(0, 12))]
        assert tokenizer.decode(ids) == tokenizer.model.decode([i for i in ids if i not in (1, 2)])


def test_a_model_damaged_in_one_byte_is_opened_or_refused_in_one_line(small, tmp_path):
    rng, content = random.Random(0), small.path.read_bytes()
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        try:
            tokenizer = load_tokenizer(tmp_path)
            tokenizer.decode(range(tokenizer.vocab_size))
        except UserError as error:
            assert "tokenizer.model: not a SentencePiece model" in str(error)


def test_lone_surrogates_are_refused(small):
    with pytest.raises(UserError, match=r"U\+DC80 at character 1"):
        small.encode("a\udc80")


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_transformers_opens_what_is_saved(small, tmp_path, model_type):
    """No leading or double spaces: there `transformers` 5 departs from sentencepiece whatever it is told."""
    from transformers import AutoTokenizer

    small.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS + ["a\n\nb", "</s> x", "🦙 é"]:
        assert theirs(text, split_special_tokens=True).input_ids == small.encode(text, add_special_tokens=True)
        assert theirs.decode(small.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, small.vocab_size)


def test_a_saved_directory_is_the_same_tokenizer(small, tmp_path):
    small.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == small.fingerprint == pickle.loads(pickle.dumps(again)).fingerprint
    again.save(tmp_path)  # onto itself
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == small.encode(TEXTS[0])


def test_choices_of_the_configuration(small, tmp_path):
    small.save(tmp_path)
    size = small.vocab_size
    config = {"add_bos_token": False, "add_eos_token": True, "pad_token": {"content": "<pad>"}, "eos_token": "<s>",
              "added_tokens_decoder": {"1": {"content": "<s>", "special": True},
                                       str(size): {"content": "<pad>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (size, 1, size + 1)
    ids = tokenizer.encode("a <pad>", add_special_tokens=True)
    assert ids == small.encode("a <pad>") + [1]
    assert tokenizer.decode([*ids, size]) == "a <pad>"
    assert tokenizer.fingerprint != small.fingerprint
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint and again.encode("a <pad>", add_special_tokens=True) == ids
    config["added_tokens_decoder"][str(size)]["special"] = False
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"added_tokens_decoder: {size}: {size} .'<pad>'. is no special token"):
        load_tokenizer(tmp_path)


def test_added_tokens_begin_where_the_model_ends(small, tmp_path):
    small.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<unk>": 0, "<s>": 1, "<pad>": small.vocab_size}))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (small.vocab_size, small.vocab_size + 1)
    assert tokenizer.decode([tokenizer.pad_id]) == "" and tokenizer.encode("<pad>") == small.encode("<pad>")


def test_whatever_changes_ids_changes_the_fingerprint(small, tmp_path):
    def padding(name):
        return {"added_tokens_decoder": {str(small.vocab_size): {"content": name, "special": True}}}
    found = []
    for config in ({}, {"add_bos_token": False}, {"add_eos_token": True}, {"bos_token": "</s>", "eos_token": "<s>"},
                   {"add_bos_token": False, "bos_token": "</s>"}, {"eos_token": "<s>"}, {"pad_token": "</s>"},
                   padding("<pad>"), padding("<end>")):
        small.save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        found.append(load_tokenizer(tmp_path).fingerprint)
    assert len(set(found)) == len(found) and found[0] == small.fingerprint


def test_models_without_bos_and_eos_and_with_others_at_0(tmp_path):
    neither = train_sentencepiece(TEXTS * 20, tmp_path / "a/tokenizer.model", 600, bos_id=-1, eos_id=-1)
    (tmp_path / "a/tokenizer_config.json").write_text('{"add_eos_token": true}')
    neither = load_tokenizer(tmp_path / "a")
    assert (neither.bos_id, neither.eos_id, neither.pad_id) == (None, None, None)
    assert neither.encode("one", add_special_tokens=True) == neither.encode("one")
    first = train_sentencepiece(TEXTS * 20, tmp_path / "b/tokenizer.model", 600, pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    assert (first.pad_id, first.bos_id, first.eos_id) == (0, 1, 2)
    first.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["pad_token"] == "<pad>"


def test_an_unknown_token_that_pads_is_still_what_unknown_text_gives(tmp_path):
    train_sentencepiece(TEXTS * 20, tmp_path / "tokenizer.model", 300, byte_fallback=False)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<unk>"}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("one 🦙")
    assert tokenizer.pad_id == 0 and ids == tokenizer.model.encode("one 🦙") and ids[-1] == 0
    assert tokenizer.decode(ids) == tokenizer.model.decode(ids)


def test_digits_of_a_trained_model_stand_apart(tmp_path):
    tokenizer = train_sentencepiece(["in 2024 and 2024"] * 50, tmp_path / "tokenizer.model", 300)
    assert tokenizer.decode(ids := tokenizer.encode("2024")) == "2024"
    assert len(ids) in (4, 5)                                         # a space before them, maybe


def test_a_long_text_is_trained_on(tmp_path):
    tokenizer = train_sentencepiece(["paragraph " * 2000], tmp_path / "tokenizer.model", 300)
    assert len(tokenizer.encode("paragraph")) == 1


@pytest.mark.parametrize("config, message", [
    ({"eos_token": "<|nope|>"}, "eos_token '<|nope|>' is no token"),
    ({"add_bos_token": "yes"}, "add_bos_token: found 'yes', expected true or false"),
    ({"added_tokens_decoder": {"9999": {"content": "<call>", "special": False}}}, "<call>.*no special token"),
    ({"added_tokens_decoder": {"x": {"content": "<call>"}}}, "added_tokens_decoder: found 'x', expected a token id"),
    ({"added_tokens_decoder": {"3": {"special": True}}}, "added_tokens_decoder: 3: content: found None, expected text"),
    ({"added_tokens_decoder": [3]}, r"added_tokens_decoder: found \[3\], expected an object"),
    ({"bos_token": ["<s>"]}, r"bos_token \['<s>'\] is no token"),
    ([], "expected a JSON object"),
])
def test_bad_configurations_are_named(small, tmp_path, config, message):
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "tokenizer_config.json" in str(error.value)


def test_corrupt_models_are_named(small, tmp_path):
    path = tmp_path / "tokenizer.model"
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    for content in (b"", b"junk", small.path.read_bytes()[:1000], b'{"model": {}}', ranks):
        path.write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model"):
            load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_llama3s_list_of_ranks_gives_way_to_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: model: found None"):
        load_tokenizer(tmp_path)


def test_two_kinds_in_one_directory_are_refused(small, tmp_path):
    small.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}))
    with pytest.raises(UserError, match="tokenizer.model is SentencePiece and tokenizer.json byte-level"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"decoder": None}))  # such as converted from the model
    assert load_tokenizer(tmp_path).encode("one") == small.encode("one")
    (tmp_path / "added_tokens.json").write_text('{"<pad>": "32000"}')
    with pytest.raises(UserError, match="added_tokens.json: '<pad>': found '32000', expected a whole number"):
        load_tokenizer(tmp_path)


def test_training_that_cannot_be_done(tmp_path):
    for texts, size in ((["a b c"], 100), ([], 500)):
        with pytest.raises(UserError, match=f"no SentencePiece model of {size} pieces"):
            train_sentencepiece(texts, tmp_path / "tokenizer.model", size)
    assert not list(tmp_path.iterdir())
