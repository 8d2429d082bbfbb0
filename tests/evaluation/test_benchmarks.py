"""The five file formats, the paper's wording, both modes, and what is said about files that are wrong."""

import json
import string
import unicodedata

import pytest

from minixllm import languages
from minixllm.errors import UserError
from minixllm.evaluation import benchmark_files, benchmarks, templates
from minixllm.evaluation.benchmarks import Wanted, read

PAWSX_ROWS = ["id\tsentence1\tsentence2\tlabel", "1\tHe \"ran\" home.\tHe ran home.\t1", "2\tNS\tNS\t0",
              "3\tCats sleep.\tDogs bark.\t0"]
XCOPA_ROWS = [{"premise": "物品用气泡纸包着。", "choice1": "它很易碎。", "choice2": "它很小。", "question": "cause", "label": 0,
               "idx": 7, "changed": False},
              {"premise": "我掏空了口袋。", "choice1": "票根。", "choice2": "武器。", "question": "effect", "label": 1, "idx": 8,
               "changed": True}]


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"
                            for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pawsx(tmp_path):
    for tag in ("en", "de", "zh"):
        lines(tmp_path / "pawsx" / tag / "test_2k.tsv", PAWSX_ROWS)
    return tmp_path / "pawsx"


@pytest.fixture
def xcopa(tmp_path):
    lines(tmp_path / "xcopa" / "test.zh.jsonl", XCOPA_ROWS)
    lines(tmp_path / "xcopa" / "test.it.jsonl", XCOPA_ROWS)
    return tmp_path / "xcopa"


@pytest.fixture
def flores(tmp_path):
    for name, text in {"eng": "One.", "fra": "Un.", "zho_simpl": "一。", "amh": "አንድ።", "swh": "Moja."}.items():
        lines(tmp_path / "flores" / f"{name}.devtest", [f"{text} {i}" for i in range(205)])
    return tmp_path / "flores"


def test_pawsx(pawsx):
    items, notes = read(pawsx, Wanted())
    assert [(i.group, i.id, i.reference) for i in items] == [(g, n, r) for g in ("deu", "eng", "zho_simpl") for n,
                                                             r in (("1", "yes"), ("3", "no"))]
    assert items[0].prompt() == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nThe following are two sentences:\nSentence1: He \"ran\" home.\nSentence2: He ran home..\n"
        "You should provide a yes or no answer to the "
        "question: Does Sentence1 paraphrase Sentence2?\nPlease only return either yes or no.\n\n### Response:")
    assert sum("1 rows skipped" in note and "NS" in note for note in notes) == 3
    assert items[0].choices == ("yes", "no") and {"ja", "yes"} <= set(items[0].words[0])
    items, _ = read(pawsx, Wanted(mode="understanding", languages=("German",)))
    assert "Ist Satz1 eine Paraphrase von Satz2?" in items[0].prompt() and items[0].choices == ("ja", "nein")
    assert items[1].reference == "nein"


def test_a_second_file_of_a_language_is_told(xcopa):
    lines(xcopa / "it" / "test.it.jsonl", XCOPA_ROWS)
    _, notes = read(xcopa, Wanted(languages=("it",)))
    assert "XCOPA: 1 files left out: it/test.it.jsonl is a second file of Italian (ita)" in notes


def test_xcopa(xcopa):
    items, notes = read(xcopa, Wanted())
    chinese = [i for i in items if i.group == "zho_simpl"]
    assert ("Here is a premise: 物品用气泡纸包着。. What is the cause? Help me pick the more plausible option: "
            "-A: 它很易碎。, -B: 它很小。.\n\n### Response:") in chinese[0].prompt()
    assert [i.reference for i in chinese] == ["它很易碎。", "武器。"] and chinese[1].id == "8"
    assert notes == ["XCOPA: generating mode, instructions in eng: as shipped"]
    italian, _ = read(xcopa, Wanted(mode="understanding", languages=("it",), limit=1))
    assert len(italian) == 1 and "Qual è la causa?" in italian[0].prompt()


def test_translation(flores):
    items, notes = read(flores, Wanted())
    assert len(items) == 8 * 200 and {i.column for i in items} == {"FLORES(f)", "FLORES(t)"}
    item = next(i for i in items if i.group == "eng-zho_simpl")
    assert ("Translate the following English sentence from English to Chinese.\nEnglish Sentence: One. 0\n"
            "Please only return the translated Chinese text.\n") in item.prompt()
    assert item.reference == "一。 0" and item.language == item.target == "zho_simpl"
    back = next(i for i in items if i.group == "swh-eng")
    assert back.language == "swh" and back.target == "eng"
    items, notes = read(flores, Wanted(languages=("fra", "deu"), limit=3))
    assert {i.group for i in items} == {"eng-fra", "fra-eng"} and len(items) == 6
    assert any("no file for deu" in note for note in notes)


def test_directions():
    codes = ["eng", "fra", "deu", "zho_simpl", "spa", "rus", "pol", "amh", "swh", "yor"]
    pairs = benchmarks.translation_directions(codes, ["high-low"], seed=3)
    assert len(pairs) == 15 and pairs == benchmarks.translation_directions(codes, ["high-low"], seed=3)
    assert pairs != benchmarks.translation_directions(codes, ["high-low"], seed=4)
    # languages beyond the 100, as FLORES-200 has them, change no draw
    assert pairs == benchmarks.translation_directions([*codes, "hat", "que"], ["high-low"], seed=3)
    every = ["eng", *languages.LANGUAGES]
    assert benchmarks.translation_directions([*every, "hat"], ["low-low"], 0) == benchmarks.translation_directions(
        every, ["low-low"], 0)
    assert all(column == "high-low" and source in codes[1:7] and target in codes[7:] for source, target,
               column in pairs)
    assert benchmarks.translation_directions(codes, ["de-fr", "to-english"], 0)[:2] == [("deu", "fra", "pairs"),
    ("fra", "eng", "t")]
    said = []
    assert benchmarks.translation_directions(codes, ["ita-fra"], 0, said.append) == [] and "ita-fra" in said[0]
    for wrong, named in (("sideways", "sideways"), ("high-middle", "'high'"), ("english-to", "'to'")):
        with pytest.raises(UserError, match=named):
            benchmarks.translation_directions(codes, [wrong], 0)
    assert benchmarks.translation_directions(["fra", "deu"], ["to-english", "de-fr"], 0, said.append) == [
        ("deu", "fra", "pairs")] and said[1] == "direction to-english: no English file"


@pytest.mark.parametrize("name, code", [
    ("fra.devtest", "fra"), ("fra_Latn.devtest", "fra"), ("zho_Hans.dev", "zho_simpl"),
    ("zho_trad.devtest", "zho_trad"),
    ("zho_simpl.devtest", "zho_simpl"), ("arb_Arab.devtest", "ara"),
    ("arb_Latn.devtest", None), ("kor_Hang.devtest", "kor"), ("newstest2019-ref.fra.txt", "fra"),
    ("newstest2019-src.eng.txt", "eng"),
    ("newstest2019-ref.zho-CN.txt", "zho_simpl"), ("zsm_Latn.devtest", "msa"), ("README.md", None), ("xyz.txt", None),
    ("cmn_Hans.devtest", "zho_simpl"), ("cmn_Hant.devtest", "zho_trad"), ("ekk_Latn.devtest", "est"),
    ("en-de.txt", None), ("newstest2019-ref.por-BR.txt", "por"), ("pt-br.txt", "por"), ("arz_Arab.devtest", None)])
def test_language_of_a_translation_file(tmp_path, name, code):
    (tmp_path / name).touch()
    assert benchmark_files.files("translation", tmp_path) == {tmp_path / name: code}


def test_the_file_of_the_language_itself_is_read_and_hidden_files_are_passed_over(tmp_path):
    for name in ("newstest2019-ref.eng-GB.txt", "newstest2019-src.eng.txt", "pes_Arab.txt", "prs_Arab.txt",
                 "._eng.txt"):
        (tmp_path / name).touch()
    files = {code: file.name for file, code in benchmark_files.files("translation", tmp_path).items()}  # the last wins
    assert files == {"eng": "newstest2019-src.eng.txt", "fas": "pes_Arab.txt"}
    for name in ("serbian_latin", "serbian_cyrillic"):
        (tmp_path / f"{name}_test.jsonl").touch()
    assert [file.name for file in benchmark_files.files("xlsum", tmp_path)] == [
        "serbian_latin_test.jsonl", "serbian_cyrillic_test.jsonl"]


def test_a_backup_or_an_archive_of_a_text_is_not_taken_for_it(flores):
    for name in ("fra.devtest~", "fra.devtest.bak", "fra.devtest.gz"):
        lines(flores / name, ["Old."] * 205)
    items, notes = read(flores, Wanted(directions=("eng-fra",), limit=1))
    assert items[0].reference == "Un. 0" and notes[0].endswith(
        "3 files of no known language left out: fra.devtest.bak, fra.devtest.gz, fra.devtest~")


@pytest.mark.parametrize("name, column", [
    ("{}.devtest", "FLORES(f)"), ("{}.dev", "FLORES(f)"), ("newstest2019-ref.{}.txt", "NTREX(f)"),
    ("{}.txt", "Translation(f)")])
def test_a_translation_column_is_named_after_its_set(tmp_path, name, column):
    for code in ("eng", "fra"):
        lines(tmp_path / name.format(code), [code])
    items, _ = read(tmp_path, Wanted(directions=("from-english",)))
    assert [item.column for item in items] == [column]


def test_files_left_out_of_a_translation_directory(flores):
    for name in ("fr.devtest", "README.md", "fra.jsonl"):
        lines(flores / name, [{"a": "b"}])
    items, notes = read(flores, Wanted(directions=("eng-fra",), limit=1))
    assert items[0].reference == "Un. 0" and notes[:2] == [
        "Translation: 2 files of no known language left out: README.md, fra.jsonl",
        "Translation: 1 files left out: fr.devtest is a second file of French (fra)"]


def test_xlsum_and_self_instruct(tmp_path):
    article = {"id": "a1", "url": "u", "title": "t", "summary": "Short {brace}.", "text": "Long text with {braces}."}
    for name in ("chinese_simplified", "scottish_gaelic", "english", "klingon"):
        lines(tmp_path / "xlsum" / f"{name}_test.jsonl", [article | {"id": f"a{n}"} for n in range(260)])
    items, notes = read(tmp_path / "xlsum", Wanted())
    assert [i.group for i in items[::250]] == ["eng", "gla", "zho_simpl"] and len(items) == 750   # in order of codes
    assert "klingon" in notes[0]
    lines(tmp_path / "empty" / "french_test.jsonl", [article | {"id": f"a{n}"} | more for n in range(90)
                                                  for more in ({"text": " "}, {}, {"summary": ""})])
    some, skipped = read(tmp_path / "empty", Wanted(limit=80))
    assert len(some) == 80 and "french_test.jsonl: 159 rows skipped, the article or its" in skipped[0]
    assert ("The following is an article.\nArticle: Long text with {braces}.\n"
            "Please summarize the provided article.\n") in items[0].prompt()
    assert "Article: Long\nPlease summarize the provided article." in items[0].prompt(4)   # cut from the article alone
    task = {"id": "t0", "instruction": "Schreibe {es} um.", "instances": [{"input": "Das da.", "output": "Dies."}]}
    lines(tmp_path / "self" / "de.jsonl", [task, {**task, "id": "t1",
                                                    "instances": [{"input": "", "output": "x"}]}])
    lines(tmp_path / "self" / "user_oriented_instructions.jsonl", [task])
    items, notes = read(tmp_path / "self", Wanted(mode="understanding"))
    assert notes == ["Self-Inst*: understanding mode, instructions as its files have them"]
    assert [i.group for i in items] == ["deu", "deu", "eng"]
    assert "### Instruction:\nSchreibe {es} um.\n\n### Input:\nDas da.\n" in items[0].prompt()
    assert "### Input" not in items[1].prompt()


def test_real_files(data):
    items, _ = read(data / "xcopa", Wanted())
    assert len(items) == 3000 and {i.group for i in items} == {"est", "ind", "ita", "swh", "tam", "zho_simpl"}
    items, notes = read(data / "ntrex", Wanted(directions=("from-english", "to-english", "low-high")))
    assert len(items) == (88 * 2 + 15) * 200
    assert notes == ["Translation: generating mode, instructions in eng: as shipped"]
    items, _ = read(data / "self_instruct", Wanted())
    assert len(items) == 252


def test_understanding_mode_is_shipped():
    shipped = templates.read_templates()
    codes = {name: {code for of, code in shipped if of == name} for name, _ in shipped}
    assert codes["pawsx"] == set("deu eng spa fra jpn kor zho_simpl".split())
    assert codes["xcopa"] == set("eng est hat ind ita que swh tam tha tur vie zho_simpl".split())
    assert codes["translation"] == codes["xlsum"] == {"eng", *languages.FEEDBACK_LANGUAGES}
    for (name, code), template in shipped.items():
        if name in ("translation", "xlsum") and code != "eng":
            script, text = languages.find(code).script, template["instruction"]
            letters = [c for c in text.replace("{", "}").split("}")[::2] for c in c if c.isalpha()]
            latin = sum("LATIN" in unicodedata.name(c) for c in letters) / len(letters)
            assert latin == (script == "Latn"), (name, code)
            wanted = ["source", "source_language", "target_language"] if name == "translation" else ["article"]
            assert {field for _, field, _, _ in string.Formatter().parse(text) if field} == set(wanted)


def test_languages_without_an_instruction_are_asked_in_english_and_named(flores, xcopa, tmp_path):
    lines(xcopa / "test.fi.jsonl", XCOPA_ROWS)
    items, notes = read(xcopa, Wanted(mode="understanding"))
    assert {i.group for i in items} == {"ita", "zho_simpl", "fin"}
    assert notes[0] == "XCOPA: no instruction in the language itself for 1 of 3, asked in English: fin"
    finnish = next(i for i in items if i.group == "fin")
    assert "Here is a premise" in finnish.prompt()
    lines(flores / "swe.devtest", [f"Ett. {i}" for i in range(205)])
    items, notes = read(flores, Wanted(mode="understanding", directions=("swe-fra", "fra-swe")))
    assert "Translation: no instruction in the language itself for 1 of 2, asked in English: swe" in notes
    by_group = {item.group: item.prompt() for item in items}
    assert "Swedish Sentence: Ett. " in by_group["swe-fra"] and "vers la langue svenska" in by_group["fra-swe"]
    mine = tmp_path / "mine.toml"
    mine.write_text('[translation.fra]\ninstruction = "Traduis du {source_language} : {source}"\n', encoding="utf-8")
    items, notes = read(flores, Wanted(mode="understanding", directions=("fra-eng", "eng-fra"), templates=mine))
    assert "Traduis du français : Un. 0" in items[0].prompt()
    assert notes == [f"Translation: understanding mode, instructions in fra: {mine}",
                     "Translation: understanding mode, instructions in eng: as shipped"]


def test_rows_with_nul_or_the_id_of_an_earlier_row_are_left_out_and_counted(tmp_path, flores):
    rows = [{**XCOPA_ROWS[0], "idx": 7}, {**XCOPA_ROWS[1], "idx": 7}, {**XCOPA_ROWS[1], "idx": 8, "premise": "a\0b"}]
    lines(tmp_path / "xcopa/test.it.jsonl", rows)
    items, notes = read(tmp_path / "xcopa", Wanted())
    assert [item.id for item in items] == ["7"]
    for what in ("the character NUL", "the id of an earlier row"):
        assert f"XCOPA: {tmp_path / 'xcopa'}: 1 rows left out, they hold {what}" in notes
    (flores / "fra.devtest").write_bytes(b"".join(b"Un. %d\r\n" % i for i in range(204)) + b"U\0n\r\n")
    items, notes = read(flores, Wanted(directions=("eng-fra",), limit=205))
    assert len(items) == 204 and items[5].reference == "Un. 5"
    assert any("1 rows left out, they hold the character NUL" in note for note in notes)


def test_a_template_that_cannot_be_filled_in_is_named(xcopa, tmp_path):
    for number, field in enumerate(("{premise:d}", "{premise:>{width}}", "{premise!x}")):
        mine = tmp_path / f"{number}.toml"
        mine.write_text(f'[xcopa.eng]\ninstruction = "{field}"\n', encoding="utf-8")
        with pytest.raises(UserError, match=r".toml: \[xcopa.eng\]: instruction: .* in '{premise.*expected fields"):
            read(xcopa, Wanted(templates=mine))


@pytest.mark.parametrize("text, said", [
    ("[xcopa.ita]\ninstruction = 5", r"\[xcopa.ita\]: instruction: found 5"),
    ("[copa.ita]\ninstruction = 'x'", r"\[copa\]: expected one of"),
    ("[xcopa.ita]\ninstruction = '{premisse}'", "unknown field {premisse}"),
    ("[xcopa.ita]\ninstruction = '{premise'", "premise"),
    ("[pawsx.fin]\ninstruction = 'x'", "yes: found None, expected a list"),
    ("[xcopa.ita]\ninstrution = 'x'", "unknown key 'instrution'"),
    ("[xcopa.italien]\ninstruction = 'x'", r"\[xcopa.italien\]: unknown language 'italien'.*did you mean italian"),
    ("[xcopa", "expected a TOML file"),
    ("a = " + "[" * 9999, "t.toml: expected a TOML file of instructions: "),
    ("a = " + "9" * 9999, "t.toml: expected a TOML file of instructions: Exceeds the limit"),
    ("a = '\0'", "expected a TOML file"), ("[xcopa.ita]\ninstruction = " + "[" * 99 + "]" * 99, "instruction: found"),
    ("[pawsx.deu]\nyes = [" + "'a'," * 999 + "5]", "yes: found .*expected a list of texts"),
    ("[xcopa.'" + "x" * 999 + "']\ninstruction = 'x'", "xxxx"),
    ("pawsx = 3", "expected one of")])
def test_wrong_templates(tmp_path, text, said):
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        templates.read_templates(tmp_path / "t.toml")
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("file, rows, said", [
    ("de/test_2k.tsv", PAWSX_ROWS + ["4\tone\ttwo"], "test_2k.tsv, line 5: 3 columns, expected 4"),
    ("de/test_2k.tsv", PAWSX_ROWS + ["4\tone\ttwo\tthree\t1"], "line 5: 5 columns"),
    ("de/test_2k.tsv", PAWSX_ROWS + ["4\tone\ttwo\t2"], "line 5: label: found '2', expected one of 0, 1"),
    ("de/test_2k.tsv", [], "test_2k.tsv: holds no rows, expected id"),
    ("de/test_2k.tsv", PAWSX_ROWS[:1], "test_2k.tsv: holds no rows, expected id"),
    ("test.it.jsonl", [{**XCOPA_ROWS[0], "label": 2}], "test.it.jsonl, line 1: label: found 2, expected one of 0, 1"),
    ("test.it.jsonl", [{**XCOPA_ROWS[0], "label": 1.0}], "line 1: label: found 1.0, expected one of 0, 1"),
    ("test.it.jsonl", [{**XCOPA_ROWS[0], "label": True}], "line 1: label: found True, expected one of 0, 1"),
    ("test.it.jsonl", [XCOPA_ROWS[0], {**XCOPA_ROWS[0], "question": "why"}],
     "line 2: question: found 'why', expected one of"),
    ("test.it.jsonl", [{k: v for k, v in XCOPA_ROWS[0].items() if k != "choice2"}], "line 1: choice2: found None"),
    ("test.it.jsonl", [{**XCOPA_ROWS[0], "choice1": " "}], "line 1: choice1: found ' '"),
    ("test.it.jsonl", ["{not json"], "line 1: not JSON"),
    ("welsh_test.jsonl", [{"id": "1", "summary": "s"}], "welsh_test.jsonl, line 1: text: found None"),
    ("cy.jsonl", [{"instruction": "a", "instances": []}], "cy.jsonl, line 1: instances"),
    ("cy.jsonl", [{"instruction": "a", "instances": [{"input": "", "output": ""}]}], "line 1: output: found ''"),
    ("cy_test.jsonl", [r'{"id": "1", "summary": "s", "text": "\ud83d"}'],
     "cy_test.jsonl, line 1: text holds half of a surrogate pair"),
    ("cy.jsonl", [r'{"id": "\udc00", "instruction": "a", "instances": [{"input": "", "output": "b"}]}'],
     "cy.jsonl, line 1: id holds half of a surrogate pair"),
])
def test_bad_files_are_named_with_their_line(tmp_path, file, rows, said):
    lines(tmp_path / file, rows)
    with pytest.raises(UserError, match=said):
        read(tmp_path, Wanted())


def test_bad_directories(tmp_path, flores):
    with pytest.raises(UserError, match="no such directory"):
        read(tmp_path / "absent", Wanted())
    with pytest.raises(UserError, match="fra.devtest: found a file; expected a directory of a benchmark's files"):
        read(flores / "fra.devtest", Wanted())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of the five benchmarks: found nothing"):
        read(tmp_path / "empty", Wanted())
    lines(tmp_path / "other" / "notes.doc", ["x"])
    with pytest.raises(UserError, match="found notes.doc"):
        read(tmp_path / "other", Wanted())
    lines(tmp_path / "x-final" / "de" / "dev_2k.tsv", PAWSX_ROWS)
    lines(tmp_path / "x-final" / "fr" / "dev_2k.tsv", PAWSX_ROWS)
    with pytest.raises(UserError, match="found de, fr; expected .*/test_2k.tsv"):
        read(tmp_path / "x-final", Wanted())
    lines(tmp_path / "data" / "it" / "val.it.jsonl", XCOPA_ROWS)
    lines(tmp_path / "data" / "et" / "val.et.jsonl", XCOPA_ROWS)
    with pytest.raises(UserError, match=r"found et, it; .*test\..*jsonl \(XCOPA\)"):
        read(tmp_path / "data", Wanted())
    lines(tmp_path / "records" / "deu.jsonl", [{"instruction": "a"}])
    lines(tmp_path / "records" / "eng.jsonl", [{"instruction": "a"}])
    with pytest.raises(UserError, match="found deu.jsonl, eng.jsonl; .* with instances"):
        read(tmp_path / "records", Wanted())
    lines(flores / "fra.devtest", ["Un."] * 204)
    with pytest.raises(UserError, match="eng.devtest has 205 lines, .*fra.devtest 204"):
        read(flores, Wanted())
    (flores / "fra.devtest").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="fra.devtest: not UTF-8 at byte 0"):
        read(flores, Wanted())


def test_a_directory_of_several_benchmarks(tmp_path, pawsx, xcopa, flores):
    """One of them alone would be evaluated, without a word about the others."""
    def refused(path, said):
        with pytest.raises(UserError) as error:
            read(path, Wanted())
        assert str(error.value) == str(UserError(f"{path}: holds {said}: expected each benchmark by itself"))

    refused(tmp_path, f"PAWS-X in {pawsx}, XCOPA in {xcopa}, Translation in {flores}")
    for each in (pawsx, xcopa, flores):
        assert read(each, Wanted())[0]
    # as published: PAWS-X in a folder more, XCOPA in one for each language
    both = tmp_path / "both"
    lines(both / "PAWS-X/x-final/de/test_2k.tsv", PAWSX_ROWS)
    with pytest.raises(UserError, match="both: holds PAWS-X below, expected one of: .*/PAWS-X/x-final$"):
        read(both, Wanted())
    lines(both / "xcopa/test.it.jsonl", XCOPA_ROWS)
    refused(both, f"PAWS-X in {both / 'PAWS-X/x-final'}, XCOPA in {both / 'xcopa'}")
    published = tmp_path / "published"
    for folder in ("data/it", "data/et", "data-gmt/it"):
        lines(published / folder / f"test.{folder[-2:]}.jsonl", XCOPA_ROWS)
    lines(published / "notes/broken.jsonl", ["{"])
    assert {item.group for item in read(published, Wanted())[0]} == {"ita", "est"}
    lines(tmp_path / "up/xcopa/data/it/test.it.jsonl", XCOPA_ROWS)
    with pytest.raises(UserError, match=r"expected one of: \S*/up/xcopa$"):   # not its folders, too
        read(tmp_path / "up", Wanted())
    lines(xcopa / "welsh_test.jsonl", [{"id": "1", "summary": "s", "text": "t"}])
    refused(xcopa, f"XCOPA in {xcopa}, XL-Sum in {xcopa}")


def test_what_else_stands_in_a_benchmarks_directory(xcopa, flores, tmp_path):
    for name in ("log.jsonl", "val.et.jsonl", "docs/en.md", "docs/fr.md", "lib/locale/de.po", "lib/locale/fr.po"):
        lines(xcopa / name, ["{bro"] if name == "val.et.jsonl" else [])
    assert benchmark_files.detect(xcopa) == "xcopa"
    lines(xcopa / "more/deu.txt", ["Eins."])
    lines(xcopa / "more/README.md", ["Notes."])
    assert benchmark_files.detect(xcopa) == "xcopa"   # one language is no translation
    lines(xcopa / "more/fra", ["Un."])
    with pytest.raises(UserError, match="holds XCOPA in .*xcopa, Translation in .*xcopa/more: expected each"):
        benchmark_files.detect(xcopa)
    for folder, suffix in (("a/dev", "dev"), ("a/devtest", "devtest")):
        for code in ("eng", "fra"):
            lines(tmp_path / f"root/{folder}/{code}.{suffix}", ["x"])
    lines(tmp_path / "root/log.jsonl", [])
    with pytest.raises(UserError, match="holds Translation below, expected one of: .*/a/dev, .*/a/devtest$"):
        benchmark_files.detect(tmp_path / "root")


def test_blank_lines_and_a_header_in_capitals(tmp_path):
    lines(tmp_path / "de/test_2k.tsv", [PAWSX_ROWS[0].upper(), *PAWSX_ROWS[1:], "", ""])
    assert [item.id for item in read(tmp_path, Wanted())[0]] == ["1", "3"]


def test_empty_sentences_are_not_asked(tmp_path, flores):
    lines(tmp_path / "pawsx/de/test_2k.tsv", [*PAWSX_ROWS, "4\t\t\t0", "5\tCats.\t \t1"])
    items, notes = read(tmp_path / "pawsx", Wanted())
    assert [item.id for item in items] == ["1", "3"] and "3 rows skipped, a sentence is empty or the" in notes[0]
    lines(flores / "fra.devtest", ["Un.", "", *["Un."] * 202, ""])  # the last is not reached
    items, notes = read(flores, Wanted(directions=("eng-fra",), limit=3))
    assert [item.id for item in items] == ["1", "3", "4"]
    assert notes[0] == "Translation: eng-fra: 1 lines skipped, a sentence is empty"


def test_line_separators_inside_a_sentence_do_not_shift_the_file(flores):
    for name in ("eng", "fra"):
        lines(flores / f"{name}.devtest", [f"a\u2028b\x0bc {name} {i}" for i in range(205)])
    items, _ = read(flores, Wanted(languages=("fra",), limit=2))
    assert items[0].reference == "a\u2028b\x0bc fra 0"


def test_nothing_left_says_why(xcopa):
    items, notes = read(xcopa, Wanted(languages=("fra",)))
    assert not items and notes == [f"XCOPA: no file for fra in {xcopa}",
                                   f"XCOPA: nothing of {xcopa} is left to evaluate"]
