"""Byte-level BPE against `tokenizers`: the same ids on every text, and the text back from them."""

import functools
import json
import pickle
import random
import re
import unicodedata

import pytest
import tokenizers
from tokenizers import processors

from minixllm.errors import UserError
from minixllm.tokenizers import bpe, byte_bpe, load_tokenizer
from minixllm.tokenizers.byte_bpe import ByteLevelBPE

from tokenizer_samples import SENTENCES, SHAPES, train


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """(shape, the oracle, ours) with a vocabulary learnt from SENTENCES."""
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    oracle = train(request.param, SENTENCES * 3, path, 1500)
    return request.param, oracle, load_tokenizer(path.parent)


def check(shape, oracle, ours, texts):
    for text, encoding in zip(texts, oracle.encode_batch(texts, add_special_tokens=False)):
        ids = ours.encode(text)
        assert ids == encoding.ids, repr(text)
        if shape == "smollm2":  # the bytes it has no token for are lost, there as here
            text = re.sub("[\x04\x13]", "", text)
        if shape == "qwen2":
            text = unicodedata.normalize("NFC", text)
        assert ours.decode(ids) == text


@functools.cache
def assigned() -> list[str]:
    """All characters of this Python's Unicode, which is older than the oracle's."""
    return [chr(cp) for cp in range(0x110000) if unicodedata.category(chr(cp)) not in ("Cn", "Cs", "Co")]


def test_sentences(pair):
    shape, oracle, ours = pair
    check(shape, oracle, ours, SENTENCES + ["", " ", "  ", "\n", " \n ", "a  b", "a \n\n b", "\t\tx", "\u3000x \u00a0y",
                                            "I'LL 'ſ 'S don'T", "\x1c \x1d", "\x85\u2028\u2029", "|(|)|", " (", ",  x"])


def test_every_character_is_classed_alike(pair):
    _, oracle, ours = pair
    written = [f"a{c}9 {c}{c}.  {c}\n'{c}" for c in assigned()]
    for i in range(0, len(written), 500):
        text = ours.normalize("\n".join(written[i:i + 500]))
        expected = [end - start for _, (start, end) in oracle.pre_tokenizer.pre_tokenize_str(text)]
        pieces = ours.split(text)
        assert "".join(pieces) == text and list(map(len, pieces)) == expected


def test_generated_strings(pair):
    shape, oracle, ours = pair
    rng, characters = random.Random(0), assigned()
    sources = ["".join(SENTENCES), " \n\t\r\xa0\u2009", "0123456789²½१Ⅷ", "'sStTrReEvVmMlLdD ", ".,!?…。，、।۔،()|-_",
               "\u0301\u0323\u200d\u200c\ufe0f\u094d", "👩🏽‍🦰🇫🇷🏴", "\x00\x01\x04\x13\x1b\x1c\x1d\x1e\x1f\x7f\x85",
               characters]
    texts = []
    for _ in range(4000):
        some = rng.sample(sources, rng.randint(1, 4))
        texts.append("".join(rng.choice(rng.choice(some)) * rng.choice((1, 1, 1, 1, 2, 7))
                             for _ in range(rng.randint(0, 40))))
    texts += ["".join(rng.choices("ab", k=n)) for n in range(bpe.LONG - 5, bpe.LONG + 5)]  # both merge loops
    check(shape, oracle, ours, texts)


def test_long_runs_take_n_log_n_steps(pair, monkeypatch):
    """Searching a list, which is quadratic, is for short pieces. In a long one each merge adds two heap entries."""
    shape, oracle, ours = pair
    merge, heappop, searched, pops = bpe.Merger.merge, bpe.heapq.heappop, [0], []
    monkeypatch.setattr(bpe.Merger, "merge", lambda self, ids: searched.append(len(ids)) or merge(self, ids))
    monkeypatch.setattr(bpe.heapq, "heappop", lambda heap: pops.append(1) or heappop(heap))
    for text in ("a" * 100_000, " " * 100_000, "เ" * 50_000, "ab" * 50_000, "," * 100_000):
        pops.clear()
        check(shape, oracle, ours, [text])
        assert max(searched) < bpe.LONG and len(pops) <= 3 * len(text.encode())


def test_special_tokens_typed_are_text(pair):
    shape, oracle, ours = pair
    texts = ["</s>", "a <s>b</s> <pad><unk>", "<s><s>"]
    check(shape, oracle, ours, texts)
    for text in texts:
        assert not set(ours.encode(text)) & {0, 1, 2, 3}
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 3)
    assert ours.decode([1, *ours.encode("hé"), 2, 3, 999_999]) == "hé"


def test_a_special_token_may_take_the_spaces_around_it(pair, tmp_path):
    """Text never gives it: what it would take there is nothing to refuse a file for."""
    shape, oracle, ours = pair
    content = json.loads(ours.path.read_text())
    content["added_tokens"][3] |= {"lstrip": True, "rstrip": True, "single_word": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    check(shape, oracle, ByteLevelBPE(tmp_path / "tokenizer.json"), ["a <pad> b", *SENTENCES])


def test_post_processor_adds_bos(pair):
    shape, oracle, ours = pair
    expected = oracle.encode("hello", add_special_tokens=True).ids
    assert ours.encode("hello", add_special_tokens=True) == expected
    assert (expected[0] == 1) == (shape == "llama3")


def test_post_processor_adds_eos(pair, tmp_path):
    oracle = tokenizers.Tokenizer.from_file(str(pair[2].path))
    oracle.post_processor = processors.TemplateProcessing(single="<s> $A </s> <pad>", special_tokens=[
        ("<s>", 1), ("</s>", 2), ("<pad>", 3)])
    oracle.save(str(tmp_path / "tokenizer.json"))
    ours = ByteLevelBPE(tmp_path / "tokenizer.json")
    ids = ours.encode("hello", add_special_tokens=True)
    assert ids == oracle.encode("hello").ids == [1, *ours.encode("hello"), 2, 3]


def test_older_files_do_not_say_that_bytes_are_split_by_gpt2s_pattern(pair, tmp_path):
    shape, oracle, ours = pair
    content = json.loads(ours.path.read_text())
    for part in content["pre_tokenizer"].get("pretokenizers", [content["pre_tokenizer"]]):
        if part.get("use_regex"):
            del part["use_regex"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    check(shape, oracle, ByteLevelBPE(tmp_path / "tokenizer.json"), SENTENCES)


def test_stream_holds_back_incomplete_characters(pair):
    _, _, ours = pair
    rng = random.Random(1)
    stream = ours.stream()
    pieces = [stream.push(i) for i in ours.encode("🦙𓀀é")]
    assert "".join(pieces) + stream.flush() == "🦙𓀀é" and "\ufffd" not in "".join(pieces)
    for _ in range(500):  # any ids at all, broken characters and control tokens among them
        ids = rng.choices(range(ours.vocab_size + 5), k=rng.randint(0, 30))
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)


def test_lone_surrogates_are_refused(pair):
    with pytest.raises(UserError, match=r"U\+D800 at character 2"):
        pair[2].encode("ab\ud800cd")


def test_transformers_opens_what_is_saved(pair, tmp_path):
    from transformers import AutoTokenizer

    shape, oracle, ours = pair
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in SENTENCES:
        assert theirs(text, split_special_tokens=True).input_ids == ours.encode(text, add_special_tokens=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint == pickle.loads(pickle.dumps(ours)).fingerprint
    again.save(tmp_path)  # onto itself
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint


def test_added_tokens_that_are_not_special_are_found(pair, tmp_path):
    shape, oracle, ours = pair
    oracle = tokenizers.Tokenizer.from_file(str(ours.path))
    oracle.add_tokens(["<call>", "<call>er", "ö§"])
    oracle.add_special_tokens(["<end>"])
    oracle.encode_special_tokens = True
    oracle.save(str(tmp_path / "tokenizer.json"))
    check(shape, oracle, ByteLevelBPE(tmp_path / "tokenizer.json"),
          ["a<call>b <call>er<end>x <call", "ö§ö§", "<end><call>", "x <s>ö§</s>"])


@pytest.mark.parametrize("added", [
    [("<to", False), ("<tool>", True)], [("<to", True), ("<tool>", False)], [("</s", True)], [("</s", False)]])
def test_added_tokens_are_found_those_first_that_are_not_normalized(added, pair, tmp_path):
    shape, oracle, ours = pair
    oracle = tokenizers.Tokenizer.from_file(str(ours.path))
    oracle.add_tokens([tokenizers.AddedToken(text, normalized=normalized) for text, normalized in added])
    oracle.encode_special_tokens = True
    oracle.save(str(tmp_path / "tokenizer.json"))
    check(shape, oracle, ByteLevelBPE(tmp_path / "tokenizer.json"), ["a <tool> b<to", "x</s></s> y", "<to</s><tool>"])


def test_older_files_write_merges_as_strings(pair, tmp_path):
    shape, oracle, ours = pair
    content = json.loads(ours.path.read_text())
    assert isinstance(content["model"]["merges"][0], list)
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    check(shape, oracle, ByteLevelBPE(tmp_path / "tokenizer.json"), SENTENCES)


def test_the_cache_of_pieces_is_bounded(pair):
    merger = pair[2].merger
    small = bpe.Merger(merger.symbols, merger.merges, merger.merged, merger.whole)
    small.ROOM = 50
    for number in range(1000):
        assert small[f"x{number}"] == tuple(pair[2].merger[f"x{number}"])
        assert len(small) <= 50
    assert small["y" * 1000] and "y" * 1000 not in small


def change(key, value):
    def edit(content):
        *path, last = key.split(".")
        for part in path:
            content = content[part]
        content[last] = value
    return edit


def pre_tokens(*parts):
    return {"type": "Sequence", "pretokenizers": [*parts]}


def bloom_split(**other):
    return {"type": "Split", "pattern": {"Regex": byte_bpe.BLOOM}, "behavior": "Isolated", "invert": False} | other


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize("edit, message", [
    (lambda c: c["model"]["merges"].insert(3, ["q", "nope"]), r"merges\[3\].*'nope' is no token"),
    (lambda c: c["model"]["merges"].insert(3, "a b c"), r"merges\[3\].*expected two tokens"),
    (lambda c: c["model"]["merges"].insert(3, 7), r"merges\[3\]: found 7"),
    (lambda c: c["model"]["vocab"].update(a=5), "id 5 is given twice"),
    (lambda c: c["model"]["vocab"].update(a="5"), "model.vocab: found"),
    (lambda c: c["model"]["vocab"].update({"你好": 90_000}), "model.vocab: found '你好'"),
    (change("model.vocab", {}), "model.vocab"),
    (change("model.vocab", None), "model.vocab: found None"),
    (change("model", None), "model: found None"),
    (change("model.type", "Unigram"), "model.type: found 'Unigram'"),
    (lambda c: (c["model"].update(byte_fallback=True), c.update(pre_tokenizer={"type": "Metaspace"})),
     "normalizer and pre_tokenizer: found .*Metaspace.*, expected those of LLaMA"),
    (change("normalizer", {"type": "NFKC"}), "normalizer: found {'type': 'NFKC'}, expected none or NFC$"),
    (change("normalizer", {"type": "NFC", "x": 1}), "normalizer: found .*expected none or NFC$"),
    (change("pre_tokenizer", {"type": "Split", "pattern": {"Regex": ["x"]}, "behavior": "Isolated", "invert": False}),
     r"pre_tokenizer: found .*\['x'\]"),
    (lambda c: c["added_tokens"].append({"id": 9999, "content": "a", "special": True}),
     "added_tokens: 'a': found 9999"),
    (lambda c: c["model"]["vocab"].update(a=2**31), "model.vocab: found"),
    (lambda c: c["added_tokens"].append({"id": True, "content": "new"}), "added_tokens: found|model.vocab: found"),
    (change("pre_tokenizer", {"type": "Metaspace"}), "pre_tokenizer: found .*Metaspace"),
    (change("pre_tokenizer", None), "pre_tokenizer: found None, expected one of"),
    (change("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}), "add_prefix_space': True"),
    (change("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}), "pre_tokenizer: found"),
    (change("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}),
     "pre_tokenizer: found .*'Regex': 'x'"),
    (change("pre_tokenizer", pre_tokens(bloom_split(behavior="Removed"), BYTES)), "pre_tokenizer: found .*Removed"),
    (change("pre_tokenizer", pre_tokens(bloom_split(invert=True), BYTES)), "pre_tokenizer: found .*'invert': True"),
    (change("pre_tokenizer", pre_tokens(bloom_split())), "pre_tokenizer: found .*expected one of BLOOM's"),
    (change("pre_tokenizer", pre_tokens({"type": "Digits", "individual_digits": False}, BYTES | {"use_regex": True})),
     "pre_tokenizer: found .*'individual_digits': False"),
    (change("decoder", {"type": "WordPiece"}), "decoder: found 'WordPiece'"),
    (change("decoder", None), "decoder: found None"),
    (change("post_processor", {"type": "RobertaProcessing"}), "post_processor: found .*RobertaProcessing"),
    *[(change("post_processor", {"type": "TemplateProcessing", "single": single}),
       "post_processor.single: found .*" + said)
      for single, said in (([{"SpecialToken": {"id": "<nope>"}}], "<nope>"), ([{"Sequence": {"id": "B"}}], "'B'"),
                           ([{"Sequence": {"id": "A"}}] * 2, "'A'"))],
    (change("post_processor", {"type": "Sequence", "processors": None}), "post_processor.processors: found None"),
    (change("post_processor", {"type": "Sequence", "processors": ["x"]}), "post_processor: found 'x'"),
    (change("added_tokens", [{"id": 1}]), "added_tokens: found"),
    *[(change("added_tokens", [{"id": 9999, "content": "<x>", "special": False, flag: True}]), "added_tokens: '<x>'")
      for flag in ("lstrip", "rstrip", "single_word")],
    *[(change(f"model.{key}", value), f"model.{key}: found {value!r}, expected none")
      for key, value in (("dropout", 0.1), ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>"))],
    (lambda c: c["model"]["vocab"].update(a=-1), r"model.vocab: found \('a', -1\)"),
    (lambda c: (c["model"]["vocab"].pop("a"), c["model"].update(merges=[], unk_token="<unk>")),
     "model.unk_token: found '<unk>', expected none, as some bytes have no token"),
])
def test_damaged_files_are_named(pair, tmp_path, edit, message):
    content = json.loads(pair[2].path.read_text())
    edit(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert f"{tmp_path.name}/tokenizer.json" in str(error.value)


@pytest.mark.parametrize("where", ["an added token that is not special", "the vocabulary alone"])
def test_an_end_that_the_file_does_not_call_special_is_no_text(pair, tmp_path, where):
    content = json.loads(pair[2].path.read_text())
    new = max(pair[2].pieces) + 1
    if where == "the vocabulary alone":
        content["model"]["vocab"]["</end>"] = new
    else:
        content["added_tokens"].append({"id": new, "content": "</end>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</end>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == new and new not in (ids := tokenizer.encode("a</end>b"))
    if where == "the vocabulary alone":  # and a token added to be found in text is found
        content["added_tokens"].append({"id": new + 1, "content": "[X]", "special": False})
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert new + 1 in load_tokenizer(tmp_path).encode("a[X]b")
    assert tokenizer.decode(ids) == "a</end>b" and tokenizer.decode([new]) == ""
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == new


def test_an_end_that_merges_would_make_is_no_text(pair, tmp_path):
    content = json.loads(pair[2].path.read_text())
    left, right = next(merge for merge in content["model"]["merges"] if "".join(merge).isascii())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": left + right, "model_max_length": 77}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == content["model"]["vocab"][left + right]
    written = pair[2].pieces[tokenizer.eos_id].decode()
    assert tokenizer.eos_id in pair[2].encode(written)
    for text in (written, *SENTENCES):
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == tokenizer.normalize(text)
    tokenizer.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["model_max_length"] == 77


def test_a_token_that_no_merge_makes_is_found_where_merges_are_ignored(pair, tmp_path):
    content = json.loads(pair[2].path.read_text())
    content["model"]["vocab"]["Ġxyzzy"] = new = max(pair[2].pieces) + 5
    if pair[0] != "smollm2":
        content["model"]["unk_token"] = "<unk>"                       # of no use where all bytes have tokens
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = ByteLevelBPE(tmp_path / "tokenizer.json")
    oracle = tokenizers.Tokenizer.from_file(str(ours.path))
    check(pair[0], oracle, ours, ["a xyzzy, xyzzy"])
    assert (new in ours.encode("a xyzzy")) == (pair[0] == "llama3") and ours.vocab_size == new + 1


def test_truncated_and_absent_files(pair, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(pair[2].path.read_bytes()[:5000])
    with pytest.raises(UserError, match="tokenizer.json: no valid JSON, perhaps cut short"):
        load_tokenizer(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        load_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer to read"):
        ByteLevelBPE(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_real_text(shape, data, tmp_path):
    """Every UDHR paragraph and every Tatoeba line, with a vocabulary learnt from news in 88 languages."""
    news = [line for file in sorted((data / "ntrex").glob("*.txt"))
            for line in file.read_text("utf-8").split("\n")[:60]]
    oracle = train(shape, news, tmp_path / "tokenizer.json", 20_000)
    ours = load_tokenizer(tmp_path)
    for folder in ("udhr", "tatoeba"):
        for file in sorted((data / folder).glob("*.tsv")):
            check(shape, oracle, ours, [line.split("\t", 1)[-1] for line in file.read_text("utf-8").split("\n")])
