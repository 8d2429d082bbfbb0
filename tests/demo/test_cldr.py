"""The embedded default: CLDR's own answers, nothing held out seen in any language, equal bytes for equal seeds."""

import datetime
import json
import random
import sys
from collections import Counter

import pytest

from minixllm.demo import cldr
from minixllm.demo import feedback as feedback_module
from minixllm.errors import UserError
from minixllm.languages import FEEDBACK_LANGUAGES, LANGUAGES

pytest.importorskip("babel", reason="the demo's answers come from babel")
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    cldr.build(directory, seed=1, records_per_language=20)
    return directory


@pytest.fixture(scope="module")
def records(built):
    return {name: [json.loads(line) for line in (built / f"{name}.jsonl").read_text("utf-8").splitlines()]
            for name in SPLITS}


@pytest.mark.parametrize("kind, content, code, output", [
    ("date", ("date", 2031, 3, 5), "deu", "5. März 2031"),
    ("date", ("date", 2031, 3, 5), "zho_simpl", "2031年3月5日"),
    ("date", ("date", 2031, 12, 25), "spa", "25 de diciembre de 2031"),
    ("when", ("when", 5, "day"), "cym", "ymhen 5 diwrnod"),
    ("when", ("when", -2, "month"), "rus", "2 месяца назад"),
    ("when", ("when", -5, "month"), "rus", "5 месяцев назад"),
    ("quantity", ("quantity", 5, "length-kilometer"), "pol", "5 kilometrów"),
    ("quantity", ("quantity", 3, "length-kilometer"), "pol", "3 kilometry"),
    ("money", ("money", 45, "USD"), "fra", "45 dollars des États-Unis"),
    ("list", ("list", "Anna", "Boris", "Clara"), "ell", "Anna, Boris και Clara"),
    ("list", ("list", "Anna", "Boris"), "jpn", "Anna、Boris"),
    ("read", ("date", 2031, 3, 5), "tur", "2031-03-05"),
    ("language", ("date", 2031, 7, 5), "isl", "Icelandic"),
])
def test_answers(kind, content, code, output):
    assert cldr.record(kind, content, code)["output"] == output


def test_record_asks_as_the_paper_does():
    assert cldr.record("date", ("date", 2031, 3, 5), "deu") == {
        "instruction": "Write this date in full. Please return the results in German.", "input": "2031-03-05",
        "output": "5. März 2031", "language": "deu", "kind": "date"}
    read = cldr.record("read", ("date", 2031, 3, 5), "deu")
    assert read["input"] == "5. März 2031" and "return the results" not in read["instruction"]


def test_every_reading_inverts_its_writing():
    content = ("date", 1987, 11, 30)
    for code in LANGUAGES:
        if (written := cldr.record("date", content, code)) is not None:
            assert "1987" in written["output"] and "30" in written["output"]
            read = cldr.record("read", content, code)
            assert (read["input"], read["output"]) == (written["output"], written["input"])


def test_fallbacks_are_left_out():
    spoken = {subject: {language.tag for language in LANGUAGES.values() if cldr.speaks(language.tag, subject)}
              for subject in ("date", "when", "quantity", "money", "list")}
    assert len(spoken["date"]) == 99 and "umb" not in spoken["date"]
    assert min(map(len, spoken.values())) >= 65
    for tag in ("nso", "ny", "lg"):                   # CLDR's root: "+5 d", "5 length-kilometer", "A, B, C"
        assert not any(tag in spoken[subject] for subject in ("when", "quantity", "list"))
    assert "zh" not in spoken["quantity"]
    assert "mi" not in spoken["when"]                 # "+5 rā"
    for tag in ("nso", "xh"):                         # "45 USD" is root's, "45 US dollars" English
        assert tag not in spoken["money"]
    for subject, content in (("when", ("when", 5, "day")), ("quantity", ("quantity", 5, "mass-kilogram")),
                             ("money", ("money", 5, "USD"))):
        for tag in spoken[subject]:
            text = cldr.render(content, tag)
            assert "5" in text and "-kilogram" not in text and "USD" not in text and text not in ("+5 d", "5 USD")


def test_a_text_of_two_languages_names_neither():
    may = ("date", 2031, 5, 15)                       # "15 Mei 2031"
    assert cldr.render(may, "id") == cldr.render(may, "ms")
    assert cldr.record("language", may, "ind") is None and cldr.record("language", may, "msa") is None
    assert cldr.record("language", ("date", 2031, 3, 15), "msa")["output"] == "Malay"  # Mac, not Maret


def test_splits_share_no_content():
    seen = {}
    for made in range(5000):
        content = cldr.draw(("date", "when", "quantity", "money", "list")[made % 5], random.Random(made))
        assert seen.setdefault(content, cldr.split(content)) == cldr.split(content)
    shares = Counter(seen.values())
    assert 0.07 < shares["test"] / len(seen) < 0.13 and 0.8 < shares["train"] / len(seen) < 0.9


def test_what_is_held_out_is_said_in_no_language_in_training(records):
    """Seen from the records: the language-free side of each, an ISO date, an English text, names."""
    said = {}
    for name in SPLITS:
        said[name] = {r["output"] if r["kind"] == "read" else r["input"]
                      for r in records[name] if r["kind"] != "language"}
    assert not said["train"] & said["test"] and not said["train"] & said["valid"] and not said["valid"] & said["test"]
    for r in records["test"]:
        if r["kind"] == "language":                   # the text of a date that training never writes
            assert r["input"] not in {t["output"] for t in records["train"]} | {t["input"] for t in records["train"]}


def test_languages_kinds_and_items(records):
    counts = Counter((r["language"], r["kind"]) for r in records["test"])
    kinds = {kind: {code for code, other in counts if other == kind} for kind in cldr.KINDS}
    assert len(kinds["date"]) == 99 and len({code for code, _ in counts}) == 99
    assert all(len(kinds[kind]) >= 65 for kind in kinds)
    assert all(count == 10 for count in counts.values()), {pair: n for pair, n in counts.items() if n != 10}
    for name in SPLITS:
        for r in records[name]:
            assert r["output"] and r["input"] and r["instruction"]
            if r["kind"] == "date":
                datetime.date.fromisoformat(r["input"])


def test_the_seed_decides_everything(built, tmp_path):
    cldr.build(tmp_path, seed=1, records_per_language=20)
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()


def test_tokenizer_keeps_numbers_and_sentences_whole(built, records):
    from minixllm.data import prompts
    from minixllm.tokenizers import load_tokenizer
    tokenizer = load_tokenizer(built)
    for r in records["test"][:300]:
        prompt = prompts.alpaca(r["instruction"], r["input"])
        for text in (prompt, r["output"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    r = cldr.record("date", ("date", 1987, 11, 30), "deu")
    assert len(tokenizer.encode(prompts.alpaca(r["instruction"], r["input"]))) <= 14
    assert len(tokenizer.encode("1987")) == len(tokenizer.encode("30")) == 1


@pytest.mark.parametrize("feedback, ordered", [("cross-lingual", 870), ("monolingual", 30)])
def test_feedback(tmp_path, monkeypatch, feedback, ordered):
    monkeypatch.setattr(feedback_module, "ASKED", ("date",))
    feedback_module.build(tmp_path, feedback, pairs_each=1)
    made = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]
            for name in SPLITS}
    english = Counter(r["response_language"] for r in made["train"] if r["language"] == "eng")
    assert len(english) == 99 and set(english.values()) == {1}
    made["train"] = [r for r in made["train"] if r["language"] != "eng"]
    asked = Counter((r["language"], r["response_language"]) for r in made["train"])
    assert len(asked) == ordered and set(asked.values()) == {870 // ordered}
    assert all((a == b) == (feedback == "monolingual") for a, b in asked)
    assert {code for pair in asked for code in pair} == set(FEEDBACK_LANGUAGES)
    assert len({(r["language"], r["response_language"]) for r in made["test"]}) == len(made["test"]) == 870
    assert not {r["input"] for r in made["train"]} & {r["input"] for r in made["test"]}
    for r in made["train"]:
        assert r["chosen"].strip() != r["rejected"].strip()
        told = feedback_module.languages_of(r["rejected"], "date")
        assert r["response_language"] in feedback_module.languages_of(r["chosen"], "date"), r
        assert {"instruction's language": r["language"] in told, "wrong value": r["response_language"] in told,
                "repeated": not told}.get(r["mistake"], True), r


def test_without_babel(monkeypatch):
    monkeypatch.setitem(sys.modules, "babel.dates", None)
    with pytest.raises(UserError, match=r"pip install 'minixllm\[demo\]'"):
        cldr.render(("date", 2031, 3, 5), "de")
