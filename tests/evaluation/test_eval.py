"""eval.py as a user runs it: predictions, likelihoods, tables; killed and continued; one process or two."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from minixllm import languages
from minixllm.demo import benchmarks as stand_ins
from minixllm.errors import UserError
from minixllm.evaluation import benchmark_files, benchmarks, language_id, predict, report, scorers, templates
from minixllm.evaluation.benchmarks import Item
from minixllm.evaluation.predict import Prediction
from minixllm.evaluation.significance import democratization
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from tests.evaluation.test_benchmarks import PAWSX_ROWS, XCOPA_ROWS, lines
from minixllm.weights import adapters, hf_directory

import eval as script
from conftest import PATIENCE, ROOT

ALONE = SimpleNamespace(rank=0, size=1, first=True, gather=lambda value: [value])
WORDS = "the dog cat saw a red house by sea and old man went home early today because it was late".split()


def make_model(folder: Path, architecture: str = "llama", positions: int = 1024) -> Path:
    """A tiny random model, but far from its initial weights, so that its answers differ and some of them end."""
    kind = {"llama": "llama", "bloom": "bloom"}[architecture]
    texts = [templates.read_templates()["pawsx", "eng"]["instruction"], "Below is an instruction that describes a task.",
             *XCOPA_ROWS[0].values()]
    tokenizer = train_sentencepiece([str(text) for text in texts] * 3, folder / "tokenizer.model", vocab_size=400)
    values = {"llama": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2,
                            max_position_embeddings=positions),
              "bloom": dict(hidden_size=32, n_layer=2, n_head=4)}[kind]
    config_class = hf_directory.ARCHITECTURES[kind].config_class
    config = config_class.from_dict({"model_type": kind, "vocab_size": tokenizer.vocab_size, **values})
    model = hf_directory.build(config)
    hf_directory.initialise(model, seed=0)
    with torch.no_grad():
        for i, parameter in enumerate(model.blocks.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    hf_directory.save_model(model, folder / kind, tokenizer)
    return folder / kind


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """All five benchmarks, a few items each."""
    folder = tmp_path_factory.mktemp("five")
    lines(folder / "pawsx/de/test_2k.tsv", PAWSX_ROWS)
    lines(folder / "pawsx/zh/test_2k.tsv", PAWSX_ROWS)
    for tag in ("it", "sw"):
        lines(folder / f"xcopa/test.{tag}.jsonl",
              [{**XCOPA_ROWS[0], "premise": " ".join(WORDS[i % 9:i % 9 + 2 + i % 7]), "idx": i} for i in range(30)])
    for code in ("eng", "deu", "zho_simpl", "amh", "kam"):
        lines(folder / f"flores/{code}.devtest", [" ".join(WORDS[i:i + 5]) for i in range(6)])
    for name in ("french", "yoruba"):
        lines(folder / f"xlsum/{name}_test.jsonl",
              [{"id": f"{i}", "summary": "the red dog", "text": " ".join(WORDS * (i + 1))} for i in range(4)])
    lines(folder / "self/de.jsonl",
          [{"id": f"a{i}", "instruction": "Say it.", "instances": [{"input": "", "output": "the dog saw"}]}
           for i in range(3)])
    return [str(folder / name) for name in ("pawsx", "xcopa", "flores", "xlsum", "self")]


def items_of(folders, **wanted):
    return [item for folder in folders for item in benchmarks.read(folder, benchmarks.Wanted(**wanted))[0]]


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_answers_and_likelihoods_are_those_of_each_item_alone(five, tmp_path, architecture):
    if architecture not in hf_directory.ARCHITECTURES:
        pytest.skip(f"no {architecture}")
    directory = make_model(tmp_path, architecture)
    model, tokenizer = adapters.load(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    items = items_of(five)
    predictions = predict.predict(model, tokenizer, items, ALONE, tmp_path / "out",
                                  predict.How(batch_tokens=1000, max_new_tokens=12))
    assert len({p.answer for p in predictions}) > 5 and [p.item for p in predictions] == items
    for number, (item, prediction) in enumerate(zip(items, predictions)):
        assert prediction.prompt == item.prompt() and prediction.cut == 0
        ids = torch.tensor([tokenizer.encode_prompt(item.prompt())])
        with torch.no_grad():
            for choice, logp in zip(item.choices, prediction.logps or []):
                tokens = tokenizer.encode(choice)
                logits = theirs(torch.cat([ids, torch.tensor([tokens])], 1)).logits[0, ids.shape[1] - 1:-1]
                expected = logits.double().log_softmax(-1)[range(len(tokens)), tokens].sum().item()
                assert logp == pytest.approx(expected, abs=1e-5, rel=1e-5)
            if number % 5:                                # generation of theirs takes long
                continue
            new = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_id,
                                  pad_token_id=0,
                                  attention_mask=torch.ones_like(ids))[0, ids.shape[1]:].tolist()
            assert prediction.answer == tokenizer.decode(new[:new.index(tokenizer.eos_id)]
                                                            if tokenizer.eos_id in new else new)


def test_a_broken_model_is_not_scored(model_directory, five, tmp_path):
    """The largest of log-probabilities that are NaN is the first, which is often right."""
    model, tokenizer = adapters.load(model_directory)
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight holds infinite numbers or NaN"):
        predict.predict(model, tokenizer, items_of(five), ALONE, tmp_path)


@pytest.mark.parametrize("architecture, positions, max_length", [("llama", 200, None), ("llama", 1024, 200),
                                                                 ("bloom", None, 200)])
def test_a_prompt_too_long_is_cut_from_the_article_alone(tmp_path, five, architecture, positions, max_length):
    model, tokenizer = adapters.load(make_model(tmp_path, architecture, positions))
    article = items_of(five[3:4])[3]
    ids, prompt, cut = predict.fit(tokenizer, article, 180)
    assert 0 < cut < len(article.fields["article"]) and len(ids) <= 180
    assert prompt == article.prompt(len(article.fields["article"]) - cut)
    assert prompt.endswith("Please summarize the provided article.\n\n### Response:")
    one_more = article.prompt(len(article.fields["article"]) - cut + 1)
    assert len(tokenizer.encode_prompt(one_more)) > 180               # no smaller cut would do
    assert predict.fit(tokenizer, article, 195)[2] < cut
    pawsx = items_of(five[:1])[0]
    assert predict.fit(tokenizer, pawsx, 10)[2] is None                # nothing there may be cut
    new = 201 - len(tokenizer.encode_prompt(pawsx.prompt()))           # one token too many
    how = predict.How(max_new_tokens=new, choice_tokens=new, max_length=max_length)
    short, long = predict.predict(model, tokenizer, [article, pawsx], ALONE, tmp_path / "out", how)
    assert short.cut > 0 and long.cut is None and long.answer == "" and long.parsed is None
    assert long.logps is None
    scores = report.score([long])
    assert scores["accuracy"].value == scores["acc"].value == 0


def test_every_benchmark_has_a_main_score():
    assert report.MAIN.keys() == benchmark_files.TITLES.keys()


def item(benchmark="xcopa", column="XCOPA", group="ita", target="ita", reference="a", choices=()):
    return Item(benchmark, column, group, target, target, "1", "", "", {}, reference, choices)


def chosen(parsed, cut=0, logps=(-1.0, -2.0), **where):
    """A prediction of a choice task whose right answer is "a"."""
    return Prediction(item(choices=("a", "b"), **where), "", cut, "raw", parsed, logps and list(logps))


def test_the_report_says_what_was_unread_cut_and_too_long():
    predictions = [chosen("a"), chosen(None), chosen(None, None, None), chosen("a", 3), chosen("a", 9)]
    table = report.results({"m": predictions})
    entry = table["XCOPA"]["models"]["m"]["groups"]["ita"]
    assert (entry["unparsed"], entry["cut"], entry["too_long"], entry["items"]) == (2, 2, 1, 5)
    result = entry["scores"]["accuracy"]
    assert result["value"] == 60 and entry["scores"]["acc"]["value"] == 80
    row = report.details(table).split("| ita (high, 5) ")[1].split("|")[1]
    assert row.strip() == f"60.00 ({result['low']:.1f}-{result['high']:.1f}), 40 % unread, 40 % cut, 20 % too long"
    assert "- in brackets the 95 % interval" in report.details(table)
    assert "%" not in report.details(report.results({"m": predictions[:1]})).split("| ita (high, 1) ")[1].split("|")[1]


def test_a_model_is_tested_against_the_one_before_it():
    wrong, right = [chosen("b")] * 40, [chosen("a")] * 40
    for after, p in ((wrong, 1), (right, 2 / 2**40)):
        table = report.results({"one": wrong, "two": after})
        models = table["XCOPA"]["models"]
        assert models["two"]["groups"]["ita"]["scores"]["accuracy"]["p"] == pytest.approx(p)
        assert "p" not in models["one"]["groups"]["ita"]["scores"]["accuracy"] and models["two"]["against"] == "one"
        assert f", p {p:.3f} |" in report.details(table) and "- p: two against one" in report.details(table)
        assert models["two"]["tiers"]["accuracy"]["high"]["p"] == pytest.approx(p)   # of one language


def test_p_values_are_corrected_for_all_comparisons_of_their_table():
    """60 right against 45 to 49 of 60, by the same items: each alone would count."""
    codes = ["ita", "vie", "tur", "ind", "est"]
    before = [chosen("b" if i < 11 + n else "a", group=code, target=code)
              for n, code in enumerate(codes) for i in range(60)]
    after = [chosen("a", group=code, target=code) for code in codes for _ in range(60)]
    table = report.results({"one": before, "two": after})
    written = report.details(table)
    groups = table["XCOPA"]["models"]["two"]["groups"]
    for n, code in enumerate(codes):
        cell = groups[code]["scores"]["accuracy"]
        assert cell["p"] == pytest.approx(2 / 2 ** (11 + n)) and cell["p_holm"] == pytest.approx(
            max((1 + k) * 2 / 2 ** (11 + k) for k in range(n, 5)))
        assert f", p {cell['p_holm']:.3f} |" in written
    mean = table["XCOPA"]["models"]["two"]["tiers"]["accuracy"]["all"]
    assert mean["value"] == 100 and mean["languages"] == mean["of"] == 5 and mean["low"] < 100 and mean["p"] < 0.01


def test_choices_are_asked_by_likelihood_by_answers_or_both():
    predictions = {"m": [chosen("a", logps=(-2.0, -1.0))]}
    assert list(report.score(predictions["m"])) == ["accuracy", "acc", "acc_char", "acc_byte"]
    assert list(report.score(predictions["m"], choices="answers")) == ["accuracy"]
    table = report.results(predictions, choices="likelihood")
    assert table["XCOPA"]["main"] == "acc" and table["XCOPA"]["models"]["m"]["democratization"] == 0


def test_answers_leave_room_for_prompts(tmp_path, five, capsys):
    """A model of 512 positions or fewer, asked for the default's 512 tokens, would have no prompt fit beside them."""
    directory = make_model(tmp_path, positions=400)
    script.main(["--model", str(directory), "--benchmarks", five[4], "--output", str(tmp_path / "out")])
    [prediction, *_] = map(json.loads, (tmp_path / "out/llama/predictions.jsonl").read_text("utf-8").splitlines())
    assert prediction["answer"] and prediction["cut"] == 0
    assert "llama: answers of 200 tokens at most, half of the 400" in capsys.readouterr().out
    config = SimpleNamespace(max_position_embeddings=400)
    assert predict.limits(config, 200) == (200, 400) and predict.limits(config, 300, 900) == (300, 900)
    assert predict.limits(SimpleNamespace(), 2000) == (1024, 2048)


def test_a_model_without_positions_is_asked_2048_tokens(tmp_path):
    """BLOOM's ALiBi has no last position, but memory has an end."""
    model, tokenizer = adapters.load(make_model(tmp_path, "bloom"))
    lines(tmp_path / "yoruba_test.jsonl", [{"id": "1", "summary": "dog", "text": " ".join(WORDS * 200)}])
    [prediction] = predict.predict(model, tokenizer, items_of([tmp_path]), ALONE, tmp_path / "out",
                                   predict.How(max_new_tokens=8))
    assert prediction.cut > 0
    assert 2030 < len(tokenizer.encode_prompt(prediction.prompt)) <= 2040


def test_a_choice_without_tokens_is_refused(model_directory, five, tmp_path, monkeypatch):
    """It would have probability 1 and win every time."""
    model, tokenizer = adapters.load(model_directory)
    monkeypatch.setattr(tokenizer, "encode", lambda text, **_: [])
    item = benchmarks.read(five[1], benchmarks.Wanted(limit=1))[0][0]
    with pytest.raises(UserError, match=f"XCOPA {item.group} {item.id}: a choice gives no token"):
        predict.predict(model, tokenizer, [item], ALONE, tmp_path)


def test_likelihood_metrics_divide_by_what_they_say():
    predictions = [Prediction(item(choices=choices, reference=reference), "", 0, None, None, logps)
                   for logps, choices, reference in (
                       ([-4.0, -5.0], ("abc", "abcdef"), "abcdef"),     # by length the second
                       ([-4.0, -3.9], ("яяя", "abcd"), "яяя"),          # by bytes, not characters, the first
                       ([-2.0, -2.0], ("aa", "bb"), "aa"))]             # a tie goes to the first
    assert {name: score.value for name, score in report.likelihood(predictions).items()} == pytest.approx(
        {"acc": 100 / 3, "acc_char": 200 / 3, "acc_byte": 100})


def prediction(benchmark, target, parsed, reference, column="", group=""):
    return Prediction(item(benchmark, column, group, target, reference), "", 0, parsed, parsed)


def test_translations_are_scored_in_the_tokens_of_their_language():
    """13a would take a sentence written without spaces for one word."""
    expected = {"jpn": "char", "tha": "char", "lao": "char", "khm": "char", "mya": "char", "zho_simpl": "zh",
                "zho_trad": "zh"}
    for language in languages.LANGUAGES | languages.BENCHMARK_ONLY:
        scores = report.score([prediction("translation", language, "a b c d e", "a b c d f")])
        assert f"|tok:{expected.get(language, '13a')}|" in scores["BLEU"].signature, language
        assert set(scores) == {"BLEU", "chrF++"}
    assert scores["chrF++"].signature.startswith("chrF2++|") and "|nw:2|" in scores["chrF++"].signature
    assert scores["chrF++"].value == scorers.chrf(["a b c d e"], ["a b c d f"], 2).value
    assert "|tok:char|" in report.score([prediction("translation", "deu", "a", "a")], "char")["BLEU"].signature


def test_free_texts_are_scored_by_rouge_and_exact_match(monkeypatch):
    pair = [prediction("self-instruct", "deu", *texts) for texts in (("Ja. ", "Ja."), ("ja.", "Ja."))]
    scores = report.score(pair)
    assert scores["rouge1"].value == 100 and scores["exact_match"].value == 50
    monkeypatch.setattr(report, "word_segmenter", lambda code: (str.split, f"words-{code}"))
    for segment, said in ((False, "|tok:xlsum-char|"), (True, "|tok:xlsum-words-deu|")):   # into words only if asked
        assert said in report.score(pair, segment=segment)["rougeL"].signature


def test_off_target_rates_are_reported_where_the_identifier_knows_the_language():
    said = [("a", "fra"), ("b", "deu"), ("", "deu"), ("c", "deu")]
    lines = [prediction("translation", code, text, "x", "FLORES(f)", f"eng-{code}")
             for code in ("deu", "kam") for text, _ in said]
    fake = language_id.Identifier("fake-1", frozenset({"deu", "fra"}), dict(said).get)
    table = report.results({"m": lines}, identifier=fake)
    entry = table["FLORES(f)"]["models"]["m"]
    german = entry["groups"]["eng-deu"]["scores"]["off_target"]
    assert german["value"] == 50 and german["signature"].startswith("off_target|lid:fake-1|")
    assert "off_target" not in entry["groups"]["eng-kam"]["scores"]
    assert entry["groups"]["eng-deu"]["unparsed"] == 0   # though one is empty
    tiers = entry["tiers"]["off_target"]
    assert {tier: (of["value"], of["languages"], of["of"]) for tier, of in tiers.items()} == {
        "high": (50, 1, 1), "all": (50, 1, 2)}
    assert "| FLORES(f) all (2) " in report.overview(table)   # of two tiers
    written = report.overview(table).partition("## Off-target rate (%, less is better)\n\n")[2]
    assert written.splitlines()[2].startswith("| FLORES(f) high (1) | 50.00 (15.0-85.0) |")
    assert "Not in the means of FLORES(f), for no identifier knows them: eng-kam" in written


@pytest.mark.parametrize("code, module, text, words", [
    ("zho_simpl", "jieba", "我来到北京清华大学", ["我", "来到", "北京", "清华大学"]),
    ("tha", "pythainlp", "ฉันรักภาษาไทย", ["ฉัน", "รัก", "ภาษาไทย"])])
def test_rouge_over_words_where_no_spaces_are_written(code, module, text, words):
    pytest.importorskip(module)
    segment, name = report.word_segmenter(code)
    assert segment(text) == words and name == module
    pair = [prediction("self-instruct", code, text, text.replace(words[-1], words[0]))]
    by_word, by_character = (report.score(pair, segment=segmented)["rouge1"] for segmented in (True, False))
    assert f"|tok:xlsum-{module}|" in by_word.signature and "|tok:xlsum-char|" in by_character.signature
    assert by_word.value == pytest.approx(100 * (len(words) - 1) / len(words)) != by_character.value


def test_tables_of_five_benchmarks_and_two_models(model_directory, five, tmp_path, capsys):
    other = make_model(tmp_path / "other")
    arguments = ["--model", str(model_directory), str(other), "--names", "base", "SFT", "--benchmarks", *five,
                 "--max-new-tokens", "12"]
    script.main([*arguments, "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "| XCOPA low " in said and "| FLORES(f) high " in said and "stand-ins" not in said
    assert max(len(line) for line in said.splitlines() if line.startswith("|")) <= 80
    results = json.loads((tmp_path / "out/results.json").read_text())
    table = {column: of["models"]["SFT"] for column, of in results["benchmarks"].items()}
    assert set(table) == {"PAWS-X", "XCOPA", "FLORES(f)", "FLORES(t)", "XL-Sum", "Self-Inst*"}
    swahili = table["XCOPA"]["groups"]["swh"]
    assert swahili["items"] == 30 and swahili["tier"] == "low" and {"accuracy", "acc", "acc_char",
                                                                    "acc_byte"} == set(swahili["scores"])
    assert table["FLORES(f)"]["groups"]["eng-zho_simpl"]["scores"]["BLEU"]["signature"].count("tok:zh")
    assert "p" in swahili["scores"]["accuracy"]
    assert swahili["scores"]["accuracy"]["p"] == 1        # the same model twice
    values = {group: entry["scores"]["rouge1"]["value"] for group, entry in table["XL-Sum"]["groups"].items()}
    assert table["XL-Sum"]["democratization"] == pytest.approx(democratization(values))
    tiers = {tier: of["value"] for tier, of in table["XL-Sum"]["tiers"]["rouge1"].items()}
    assert tiers == pytest.approx({"high": values["fra"], "low": values["yor"], "all": sum(values.values()) / 2})
    predictions = [json.loads(line)
                   for line in (tmp_path / "out/base/predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(predictions) == 4 + 60 + 48 + 8 + 3 and {"prompt", "answer", "parsed", "reference",
                                                        "language"} <= set(predictions[0])
    assert (tmp_path / "out/scores.png").stat().st_size > 1000
    written = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    tables = written[written.index("## Scores"):].partition("\n## PAWS-X")[0]
    assert tables in said and "## PAWS-X" not in said and "## PAWS-X: accuracy" in written
    assert "- XCOPA: generating mode, instructions in eng: as shipped" in written
    note = "XCOPA: generating mode, instructions in eng: as shipped"
    assert note in results["benchmarks"]["XCOPA"]["notes"] and said.count(note) == 1
    assert any(note.endswith("cannot tell kam: no off-target rates there")
               for note in results["benchmarks"]["FLORES(f)"]["notes"])
    assert written.split("## Off-target rate")[1].split("\n")[2].split() == ["|", "|", "base", "|", "SFT", "|"]
    assert not list((tmp_path / "out").glob("*/.partial*"))


def test_a_report_is_not_replaced_by_one_of_other_models_or_benchmarks(model_directory, five, tmp_path):
    def evaluate(*names, benchmarks=five[:1], more=()):
        script.main(["--model", *[str(model_directory)] * len(names), "--names", *names, "--benchmarks", *benchmarks,
                     "--max-new-tokens", "2", "--output", str(tmp_path), *more])
        found = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
        return {name for of in found.values() for name in of["models"]}

    assert evaluate("base") == {"base"}
    written = (tmp_path / "report.md").read_text()
    with pytest.raises(UserError, match="found results of base on PAWS-X, which would be lost; expected another --out"):
        evaluate("SFT")
    with pytest.raises(UserError, match=r"found results of 2 items of PAWS-X deu \(now 0\), which would be lost"):
        evaluate("base", more=["--languages", "zh"])
    with pytest.raises(UserError, match=r"of 2 items of PAWS-X deu \(now 1\), 2 items of PAWS-X zho_simpl \(now 1\),"):
        evaluate("base", more=["--limit", "1"])
    (tmp_path / "mine.toml").write_text("")
    with pytest.raises(UserError, match="found results of PAWS-X with --mode 'generating', PAWS-X with --templates '', "):
        evaluate("base", more=["--mode", "understanding", "--templates", str(tmp_path / "mine.toml")])
    with pytest.raises(UserError, match="found results of PAWS-X with --choices 'both', which would be lost"):
        evaluate("base", more=["--choices", "likelihood"])
    assert (tmp_path / "report.md").read_text() == written
    assert evaluate("base", "SFT") == evaluate("SFT", "base", benchmarks=[five[0], five[4]]) == {"base", "SFT"}


def test_other_benchmarks_join_the_report(model_directory, five, tmp_path):
    def evaluate(benchmark, name):
        script.main(["--model", str(model_directory), "--names", name, "--benchmarks", benchmark, "--max-new-tokens",
                     "2", "--limit", "2", "--output", str(tmp_path)])

    evaluate(five[0], "base")
    alone = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["PAWS-X"]
    evaluate(five[4], "base")
    evaluate(five[1], "SFT")
    found = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert list(found) == ["PAWS-X", "Self-Inst*", "XCOPA"] and found["PAWS-X"] == alone
    assert list(found["XCOPA"]["models"]) == ["SFT"]
    written = (tmp_path / "report.md").read_text()
    assert "## PAWS-X: accuracy" in written and "| XCOPA all (2) " in written
    lines = [json.loads(line) for line in (tmp_path / "base/predictions.jsonl").read_text("utf-8").splitlines()]
    assert [line["column"] for line in lines] == ["PAWS-X"] * 4 + ["Self-Inst*"] * 2
    evaluate(five[4], "base")                             # again: its lines are not written twice
    assert len((tmp_path / "base/predictions.jsonl").read_text("utf-8").splitlines()) == 6


@pytest.mark.parametrize("found", [
    {"benchmarks": []}, {"benchmarks": None}, {"benchmarks": ["m1"]}, {"benchmarks": {"XCOPA": []}}, {"a": 1},
    {"benchmarks": {"XCOPA": {"models": {"m": {"groups": {"ita": {"items": "x"}}}}, "settings": {}}}}])
def test_results_of_something_else_are_not_replaced(five, tmp_path, found):
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="results.json: found no results of eval.py in it, expected another --output"):
        report.check_output(tmp_path, {"m": ""}, items_of(five[1:2]), {"mode": "generating", "templates": "", "choices": "both"})


def test_stand_ins_may_go(five, tmp_path):
    entry = {"models": {"m": {"groups": {"deu": {"items": 20}}}}, "settings": {"mode": "x", "templates": "t"}}
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": {"PAWS-X stand-in": entry}}))
    report.check_output(tmp_path, {"m": ""}, items_of(five[1:2]), {"mode": "generating", "templates": "", "choices": "both"})


def test_a_benchmark_with_nothing_left_is_named_and_the_rest_run(model_directory, five, tmp_path, capsys):
    base = ["--model", str(model_directory), "--max-new-tokens", "2", "--benchmarks"]
    script.main([*base, *five[:2], "--languages", "de", "--output", str(tmp_path / "de")])
    said = capsys.readouterr().out
    assert "2 items of PAWS-X, " in said and f"XCOPA: nothing of {five[1]} is left" in said
    script.main([*base, five[1], five[3], "--mode", "understanding", "--languages", "it", "--output",
                 str(tmp_path / "it")])
    said = capsys.readouterr().out
    assert "30 items of XCOPA, " in said and f"XL-Sum: nothing of {five[3]} is left" in said
    with pytest.raises(UserError, match="nothing to evaluate: PAWS-X: no file for it.*; XL-Sum: .*is left to evaluate"):
        script.main([*base, five[0], five[3], "--languages", "it"])


def arguments(model_directory, five, output):
    return ["--model", str(model_directory), "--benchmarks", *five, "--max-new-tokens", "16", "--output", str(output),
            "--names", "m"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 items, three chunks."""
    folder = tmp_path_factory.mktemp("many")
    for tag in ("it", "sw", "et"):
        lines(folder / f"test.{tag}.jsonl",
              [{**XCOPA_ROWS[0], "premise": " ".join(WORDS[i % 9:i % 9 + 2 + i % 7]) + f" {i}", "idx": i}
               for i in range(100)])
    return [str(folder)]


@pytest.fixture(scope="module")
def undisturbed(model_directory, many, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    command(arguments(model_directory, many, output)).wait(120)
    return (output / "m/predictions.jsonl").read_bytes()


def command(argv):
    return subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *argv], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_killed_and_run_again(model_directory, many, undisturbed, tmp_path):
    assert undisturbed.count(b"\n") == 300
    argv = arguments(model_directory, many, tmp_path)
    running = command(argv)
    while running.poll() is None and not any(file.read_bytes() for file in tmp_path.glob("m/.partial*")):
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "m/predictions.jsonl").exists()
    [partial] = tmp_path.glob("m/.partial*")
    kept = len(partial.read_bytes().splitlines())
    with open(partial, "ab") as file:                     # a kill in the middle of a line
        file.write(b'{"key": "5')
    assert len(predict._whole_lines(partial)) == kept
    assert partial.read_bytes().endswith(b"\n")           # or the next line would be glued to the torn one
    again = command(argv)
    out = again.communicate(timeout=PATIENCE)[0].decode()
    assert again.returncode == 0, out
    assert (tmp_path / "m/predictions.jsonl").read_bytes() == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_says_how_many_items_are_kept(model_directory, many, undisturbed, tmp_path, number):
    running = command(arguments(model_directory, many, tmp_path))
    while running.poll() is None and not any(file.read_bytes() for file in tmp_path.glob("m/.partial*")):
        time.sleep(0.005)
    running.send_signal(number)
    said = running.communicate(timeout=PATIENCE)[0].decode()
    assert running.returncode == 130, said
    [partial] = tmp_path.glob("m/.partial*")
    kept = len({line["key"] for line in predict._whole_lines(partial)})
    assert f"stopped: {kept} items of m are kept, the same command goes on from there" in said and 0 < kept <= 300


def test_finished_items_are_kept_one_by_one_and_asked_no_more(model_directory, five, tmp_path, monkeypatch):
    """Also with other batches and other benchmarks beside them: the key is what changes an answer."""
    model, tokenizer = adapters.load(model_directory)
    items, how = items_of(five[3:]), predict.How(max_new_tokens=6)
    whole = predict.predict(model, tokenizer, items, ALONE, tmp_path / "whole", how)
    generate, asked = predict.generation.generate, []

    def interrupted(model, tokenizer, prompts, new, finished, **options):
        def one(i, ids):
            finished(i, ids)
            asked.append(prompts[i])
            if len(asked) == 3:
                raise KeyboardInterrupt
        return generate(model, tokenizer, prompts, new, finished=one, **options)

    monkeypatch.setattr(predict.generation, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict.predict(model, tokenizer, items, ALONE, tmp_path / "half", how)
    other, more = predict.How(max_new_tokens=6, batch_tokens=700), items_of(five[1:2])
    assert predict.predict(model, tokenizer, more + items, ALONE, tmp_path / "half", other)[len(more):] == whole
    prompts = {tuple(prompt) for prompt in asked}
    assert len(asked) == len(prompts)                                  # no prompt twice, the interrupted ones included


def test_an_answer_ends_where_its_reading_cannot_change(model_directory, five, tmp_path, monkeypatch):
    """A base model goes on with a further turn, which is not read."""
    model, tokenizer = adapters.load(model_directory)
    ends = {}

    def generate(model, tokenizer, prompts, new, finished, until, **options):
        for i in range(len(prompts)):
            text = "Yes.\n\n### Instruction:\nNo."
            ids = tokenizer.encode(text)
            ends[new] = next(([*ids[:n]] for n in range(1, len(ids) + 1) if until(i, ids[:n])), ids)
            finished(i, ends[new])

    monkeypatch.setattr(predict.generation, "generate", generate)
    for name, items in (("choices", items_of(five[:1])), ("text", items_of(five[4:]))):
        for prediction in predict.predict(model, tokenizer, items, ALONE, tmp_path / name, predict.How("answers")):
            assert ("No." not in prediction.answer) == bool(prediction.item.choices)
            assert prediction.logps is None


def test_likelihood_alone_generates_nothing_for_choices(model_directory, five, tmp_path, monkeypatch):
    model, tokenizer = adapters.load(model_directory)
    items = items_of(five[:2])
    both = predict.predict(model, tokenizer, items, ALONE, tmp_path / "both", predict.How(max_new_tokens=2))
    monkeypatch.setattr(predict.generation, "generate", None)
    alone = predict.predict(model, tokenizer, items, ALONE, tmp_path / "alone", predict.How("likelihood"))
    for one, other in zip(alone, both):
        assert one.answer is None and one.logps == pytest.approx(other.logps)


def test_a_model_behind_a_server_is_asked_for_free_answers(five, tmp_path, capsys):
    from fake_services import Server
    refused = []

    def fault(number, body):
        if "Sentence1" in body["messages"][-1]["content"] and not refused:
            refused.append(body)
            return "400 Bad Request"

    with Server(fault) as server:
        argv = ["--model", f"chat:org/tiny@{server.url}", "--benchmarks", five[0], five[4], "--output", str(tmp_path)]
        script.main(argv)
        asked = server.number
        script.main(argv)                                  # what was answered is not asked again
        assert server.number <= asked + 3
    said = capsys.readouterr().out
    assert "tiny: 2 items without an answer, the last: " in said and "from free answers alone" in said
    lines = [json.loads(line) for line in (tmp_path / "tiny/predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 7 and all(line["answer"] for line in lines) and lines[0]["logps"] is None
    assert "### Response" not in lines[0]["prompt"] and lines[0]["prompt"].startswith("The following are two sentences")
    with pytest.raises(UserError, match="--choices likelihood: found a model behind a server"):
        script.main([*argv, "--choices", "likelihood"])
    with pytest.raises(UserError, match="cannot be asked"):   # nobody is there any more
        script.main([*argv[:-1], str(tmp_path / "new")])


def test_two_processes_predict_as_one(model_directory, many, undisturbed, tmp_path, torchrun):
    torchrun(2, "eval.py", *arguments(model_directory, many, tmp_path))
    assert (tmp_path / "m/predictions.jsonl").read_bytes() == undisturbed


def test_other_weights_do_not_continue_a_partial_evaluation(model_directory, five, tmp_path):
    model, tokenizer = adapters.load(model_directory)
    items = items_of(five[:1])
    first = predict.predict(model, tokenizer, items, ALONE, tmp_path, predict.How(max_new_tokens=8))
    with torch.no_grad():
        model.lm_head.weight.neg_()
    second = predict.predict(model, tokenizer, items, ALONE, tmp_path, predict.How(max_new_tokens=8))
    assert first[0].logps != second[0].logps
    predict.forget(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, said", [
    (["--benchmarks", "/nowhere"], "/nowhere: no such directory"), (["--names", "a", "b"], "2 names for 1 models"),
    (["--names", "a/b"], "without '/'"), (["--names", ""], "called '': expected different names, not empty"),
    *[(["--names", name], f"called '{name}': .* not those of files") for name in ("results.json", "report.md",
                                                                                 "scores.png")],
    (["--limit", "-5"], "--limit: found -5, expected a whole number of at least 1"), (["--batch-tokens", "0"], "--batch-tokens: found 0"),
    (["--max-new-tokens", "0"], "--max-new-tokens: found 0"), (["--max-length", "0"], "--max-length: found 0"),
    (["--max-length", "2"], "--max-length is 2, expected more than --max-new-tokens, 2"),
    (["--languages", "germn"], "unknown language 'germn'"),
    (["--directions", "upward", "--benchmarks", "{flores}"], "upward"),
    (["--model", "/nowhere"], "/nowhere"), (["--mode", "reading"], "reading"),
    (["--templates", "/nowhere.toml"], "/nowhere.toml"),
    (["--benchmarks", "{flores}", "{flores}/../xcopa", "{flores}/"],
     r"flores and .*/flores/ both have item 1 of FLORES\(f\) eng-amh: expected each benchmark once"),
    (["--bleu-tokenizer", "13A", "--benchmarks", "{flores}"], "13A: expected 13a, zh, char or a SentencePiece model")])
def test_mistakes(model_directory, five, tmp_path, monkeypatch, argv, said):
    """All of them before a model answers."""
    monkeypatch.setattr(adapters, "load", None)
    argv = [text.format(flores=five[2]) for text in argv]
    base = ["--model", str(model_directory), "--benchmarks", five[0], "--output", str(tmp_path), "--max-new-tokens",
            "2"]
    with pytest.raises(UserError, match=said):
        script.main(base + argv)


def test_a_model_is_named_by_its_resolved_path(model_directory, tmp_path, monkeypatch):
    shutil.copytree(model_directory, tmp_path / "sft/model")
    monkeypatch.chdir(tmp_path / "sft")
    assert script.name_models(["model"], []) == {"sft": "model"}
    monkeypatch.chdir(tmp_path / "sft/model")
    assert script.name_models(["."], []) == {"sft": "."}


def test_without_models_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run train_sft.py first"):
        script.main([])


def test_stand_ins_are_read_as_the_published_files_and_held_out(tmp_path, monkeypatch):
    pytest.importorskip("babel")
    from minixllm.demo import cldr
    rendered, render = {}, cldr.render

    def remember(content, tag):
        text = render(content, tag)
        rendered.setdefault(text, set()).add(content)
        return text

    def contents(text):                                   # what it says, in no language
        if text.count("-") == 2 and len(text) == 10:
            return {("date", *map(int, text.split("-")))}
        return rendered.get(text) or {("list", *text.split(", "))}

    monkeypatch.setattr(cldr, "render", remember)
    folders, templates = stand_ins.build(tmp_path / "a")
    assert [benchmark_files.detect(folder) for folder in folders] == ["pawsx", "xcopa", "translation", "xlsum",
                                                                      "self-instruct"]
    items = items_of(folders, templates=templates)
    assert len(items) > 1000 and len({(item.column, item.group, item.id) for item in items}) == len(items)
    telling = {"pawsx": ["sentence1"], "xcopa": ["premise"], "translation": ["source"], "xlsum": ["article"],
               "self-instruct": ["input"]}
    subjects = set()
    for item in items:                                    # nothing asked was seen in training, in any language
        asked = [item.fields[name] for name in telling[item.benchmark]]
        answer = [] if item.benchmark in ("pawsx", "self-instruct") else [item.reference]
        for text in asked + answer:
            assert "test" in map(cldr.split, contents(text)), (item, text)
        subjects |= {(item.benchmark, content[0]) for content in contents(asked[0])}
        assert not item.choices or item.choices[0] != item.choices[1]
    assert {subject for benchmark, subject in subjects if benchmark == "translation"} == {"date", "quantity", "list"}
    stand_ins.build(tmp_path / "b")
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


# ---- a real model, against lm-evaluation-harness ----

def test_accuracies_are_those_of_lm_evaluation_harness(data, tmp_path):
    """XCOPA with the same prompts, SmolLM2-135M. As a rule 30 items of three languages with short prompts, for time;
    MINIXLLM_ALL_OF_XCOPA=1 takes all items of all languages there with the paper's prompts."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from real_models import smollm2
    directory = smollm2()
    model, tokenizer = adapters.load(directory)
    everything = bool(os.environ.get("MINIXLLM_ALL_OF_XCOPA"))
    items = items_of([data / "xcopa"], **{} if everything else {"languages": ("id", "it", "zh"), "limit": 30})

    def prompt(item):
        return item.prompt() if everything else f"{item.fields['premise']} {item.fields['question']}:"

    tables = {}
    contexts = [(tokenizer.encode_prompt(prompt(i)), [tokenizer.encode(c) for c in i.choices])
                for i in items]
    for item, logps in zip(items, predict.generation.choice_logps(model, contexts)):
        tables.setdefault(item.group, []).append(Prediction(item, "", 0, None, None, logps))
    del model

    lm = HFLM(pretrained=transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
              tokenizer=transformers.AutoTokenizer.from_pretrained(directory), batch_size=8)
    for code, predictions in tables.items():
        mine = [item for item in items if item.group == code]
        lines(tmp_path / f"{code}.json",
              [{"prompt": prompt(i), "choices": list(i.choices), "label": i.choices.index(i.reference)} for i in mine])
        task = ConfigurableTask(config={
            "task": f"xcopa_{code}", "dataset_path": "json",
                                        "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{code}.json")}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "prompt", "doc_to_choice": "choices",
            "doc_to_target": "label", "target_delimiter": "",
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True}
                            for m in ("acc", "acc_norm", "acc_bytes")]})
        found = evaluate(lm, {f"xcopa_{code}": task}, bootstrap_iters=0, log_samples=True)
        theirs = [sample["filtered_resps"]
                  for sample in sorted(found["samples"][f"xcopa_{code}"], key=lambda s: s["doc_id"])]
        for prediction, responses in zip(predictions, theirs, strict=True):
            assert prediction.logps == pytest.approx([float(r[0]) for r in responses], abs=1e-3, rel=1e-5)
        values, ours = found["results"][f"xcopa_{code}"], report.likelihood(predictions)
        for name, their_name in (("acc", "acc"), ("acc_char", "acc_norm"), ("acc_byte", "acc_bytes")):
            assert ours[name].value == pytest.approx(100 * values[f"{their_name},none"]), (code, name)
