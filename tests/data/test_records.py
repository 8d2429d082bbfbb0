"""Record files: what is read, and every complaint with its file and line."""

import itertools
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minixllm.data import records
from minixllm.data.records import Instruction, read_instructions, read_objects, read_preferences, record_files
from minixllm.errors import UserError

GOOD = '{"instruction": "Say hi", "output": "hi"}'


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_fields_languages_and_extras(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"instruction": "Grüß", "input": null, "output": "ہیلو", "language": "deu", '
                 '"source": "me", "score": 3}\n\n' + GOOD + "\n")
    first, second = read_instructions(path)
    assert first == Instruction("Grüß", "", "ہیلو", "deu", {"source": "me", "score": 3}, 1)
    assert second == Instruction("Say hi", "", "hi", None, {}, 3)


def test_array_and_lines_are_told_apart_by_content(tmp_path):
    entries = [{"instruction": f"i{k}", "input": "x", "output": "o"} for k in range(3)]
    array = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(entries, indent=1))
    lines = write(tmp_path / "a.json", "\ufeff" + "\r\n".join(map(json.dumps, entries)))
    assert [r.line for r in read_instructions(array)] == [2, 7, 12]
    one_line = write(tmp_path / "one line.json", f'[{GOOD}, {GOOD}, {{"instruction": "a"}}]')
    with pytest.raises(UserError, match="one line.json, record 3: no field 'output'"):
        list(read_instructions(one_line))
    assert [(r.instruction, r.input) for r in read_instructions(array)] == \
           [(r.instruction, r.input) for r in read_instructions(lines)] == [("i0", "x"), ("i1", "x"), ("i2", "x")]


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3) |
                           st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), min_size=1, max_size=5),
       st.sampled_from([None, 0, 2]), st.booleans())
def test_any_json_reads_as_json_reads_it(tmp_path, entries, indent, ascii):
    def dump(entry, **options):
        return json.dumps(entry, ensure_ascii=ascii, **options).encode("utf-8", "replace")

    array = write(tmp_path / "a.json", dump(entries, indent=indent))
    lines = write(tmp_path / "b.json", b"\n".join(map(dump, entries)))
    assert [entry for _, entry in read_objects(array)] == json.loads(array.read_bytes())
    assert list(read_objects(lines)) == [(k + 1, json.loads(line)) for k, line in
                                         enumerate(lines.read_bytes().split(b"\n"))]


@pytest.mark.parametrize("text, complaint", [
    (GOOD + "\n{not json}\n", r"a.jsonl, line 2: not JSON \(.*column 2\), in '{not json}'"),
    (GOOD + "\n" + GOOD[:-5], r"line 2: not JSON"),
    (GOOD + "\n[1]", r"line 2: found a list, expected an object"),
    (GOOD + "\n{}", r"line 2: no field 'instruction': found none; expected instruction, output and optional"),
    ('{"instruction": "a", "answer": "b"}', r"line 1: no field 'output': found answer, instruction; expected"),
    ('{"messages": []}', "line 1: no field 'instruction': found messages; expected instruction, output and optional"),
    ("{" + ", ".join(f'"id{i}": 1' for i in range(9999)) + "}", r"found id0, id1, id10, .{50,80}\.\.\.; expected"),
    ("instruction,output\nSay hi,hi\n", r"line 1: not JSON .*; expected an object \{\.\.\.\} in each line"),
    (b"PAR1\x15\x04\xff", "a.jsonl: found a Parquet file, expected JSON or JSONL in UTF-8"),
    (b"\x1f\x8b\x08\x00...", "a.jsonl: found a gzip archive, expected JSON or JSONL"),
    (GOOD.encode("utf-16"), "a.jsonl: found text in UTF-16, expected JSON or JSONL in UTF-8"),
    ('{"instruction": "a", "output": 7}', r"line 1: field 'output' holds a number, expected text"),
    ('{"instruction": "a", "output": null}', r"line 1: field 'output' holds null, expected text"),
    ('{"instruction": ["a"], "output": "b"}', r"line 1: field 'instruction' holds a list, expected text"),
    ('{"instruction": "a", "input": 1, "output": "b"}', r"line 1: field 'input' holds a number"),
    ('{"instruction": "a", "language": {}, "output": "b"}', r"line 1: field 'language' holds an object"),
    ('{"instruction": "\\ud800", "output": "b"}', r"line 1: field 'instruction' holds half of a surrogate pair"),
    (GOOD.encode() + b"\n" + '{"instruction": "é"}'.encode("latin-1"), r"line 2: not UTF-8 \(byte 0xe9\)"),
    (GOOD + "\n" + "[" * 100_000, r"line 2: not JSON \(nested too deeply\)"),
    (GOOD + "\n" + "9" * 5000, r"line 2: not JSON \(a number too long\)"),
    ("", r"a.jsonl: holds no records"),
    ("\n  \n", r"a.jsonl: holds no records"),
    ("[]", r"a.jsonl: holds no records"),
    (f"[\n{GOOD},\n{GOOD[:-1]}\n]", r"line 4: not JSON"),
    (f"[\n{GOOD}\n{GOOD}]", r"line 3: the array of records ends in .*expected ',' or '\]'"),
    (f"[{GOOD}\n", r"line 2: the array of records ends in nothing"),
    (f"[{GOOD},]", r"line 1: not JSON"),
    (f"[{GOOD}]\n{GOOD}", r"the array of records ends in .*nothing after"),
    ("[\n1]", r"line 2: found a number, expected an object"),
    (f"[\n{GOOD},\n{{}}]", r"line 3: no field 'instruction'"),
    (b"[\n\xff]", r"line 2: not UTF-8"),
    (f"[{GOOD}]\n".encode() + b"\xc3", r"line 2: not UTF-8"),
    (f"[{GOOD},\n" + "[" * 100_000, r"line 2: not JSON \(nested too deeply\)"),
])
def test_complaints(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint):
        list(read_instructions(write(tmp_path / "a.jsonl", text)))


def test_files_of_directories(tmp_path):
    for name in ("a.jsonl", "b.json", "c.jsonl", "d.jsonl.bak", "notes.txt", "state.json"):
        write(tmp_path / name, GOOD)
    assert record_files([tmp_path, tmp_path / "notes.txt"]) == [
        tmp_path / name for name in ("b.json", "state.json", "a.jsonl", "c.jsonl", "notes.txt")]
    for number, (kind, arrow) in enumerate(itertools.product(("state.json", "dataset_dict.json"),
                                                             ("x.arrow", "x/y.arrow"))):
        folder = tmp_path / f"{number}"
        (folder / arrow).parent.mkdir(parents=True)
        for name in (kind, arrow, "a.jsonl"):
            write(folder / name, GOOD)
        with pytest.raises(UserError, match=f"{number}: found an Arrow data set, .* expected JSON or JSONL"):
            record_files([folder])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="absent.jsonl: cannot be read"):
        list(read_instructions(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_instructions(tmp_path))


@pytest.mark.parametrize("text", [GOOD + "\nbroken", f"[{GOOD},\nbroken"])
def test_records_are_streamed(tmp_path, text):
    """The first comes before a broken second is looked at."""
    assert next(read_instructions(write(tmp_path / "a.jsonl", text))).output == "hi"


def test_an_array_takes_no_more_memory_than_its_longest_record(tmp_path):
    long = json.dumps({"instruction": "é" * 300_000, "output": "\n"}, indent=1, ensure_ascii=False)
    path = write(tmp_path / "a.json", "[" + ",\n".join([GOOD + " " * 200] * 30_000 + [long] + [GOOD] * 3) + "\n]")
    tracemalloc.start()
    try:
        lines = [record.line for record in read_instructions(path)]
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size // 2
    finally:
        tracemalloc.stop()
    assert lines == [-1, *range(2, 30_002), 30_005, 30_006, 30_007]
    with open(path, "ab") as file:
        file.write(b"\n,\xff")
    with pytest.raises(UserError, match="a.json, line 30009: not UTF-8"):
        list(read_instructions(path))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_where_an_array_is_cut_does_not_matter(tmp_path, monkeypatch, chunk):
    text = "\ufeff [\n" + ",\n\n".join([GOOD, '{"instruction": "Grüß", "output": "\\u00e9 ہیلو"}', GOOD]) + "\n] \n"
    path = write(tmp_path / "a.json", text)
    whole = list(read_instructions(path))
    monkeypatch.setattr(records, "CHUNK", chunk)
    assert list(read_instructions(path)) == whole and [record.line for record in whole] == [2, 4, 6]
    for broken, complaint in ((text[:-10], "line 6: not JSON"), (text + "x", "line 8: .*ends in 'x'"),
                              (text.replace("] ", ", "), "line 8: the array of records ends in nothing")):
        with pytest.raises(UserError, match=complaint):
            list(read_instructions(write(path, broken)))


def test_a_line_of_100_megabytes_is_one_error_and_little_memory(tmp_path):
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(GOOD.encode() + b'\n{"instruction": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="a.jsonl, line 2: longer than 16,777,216 bytes"):
            list(read_instructions(tmp_path / "a.jsonl"))
        assert tracemalloc.get_traced_memory()[1] < 4 * records.LONGEST_LINE
    finally:
        tracemalloc.stop()


def test_progress_adds_up_to_the_file(tmp_path):
    for text in ("\n".join([GOOD] * 5), json.dumps([json.loads(GOOD)] * 5)):
        path, sizes = write(tmp_path / "a.json", text), []
        list(read_instructions(path, sizes.append))
        assert 0.8 * len(text) < sum(sizes) <= len(text)


# Preferences

def preference(tmp_path, **entry):
    return next(read_preferences(write(tmp_path / "p.jsonl", json.dumps(entry))))


def test_three_spellings(tmp_path):
    ours = preference(tmp_path, instruction="i", input="x", chosen="c", rejected="r", language="deu",
                      response_language="fra", judge="j")
    assert (ours.instruction, ours.input, ours.chosen, ours.rejected) == ("i", "x", "c", "r")
    assert (ours.language, ours.response_language, ours.prompt, ours.extra) == ("deu", "fra", None, {"judge": "j"})
    theirs = preference(tmp_path, instruction="i", input="x", prefered_output="c", rejected_output="r")
    assert (theirs.instruction, theirs.input, theirs.chosen, theirs.rejected) == ("i", "x", "c", "r")
    trl = preference(tmp_path, prompt="p", chosen="c", rejected="r")
    assert (trl.prompt, trl.instruction, trl.chosen, trl.rejected) == ("p", "", "c", "r")
    both = preference(tmp_path, instruction="i", prompt="p", chosen="c", rejected="r")
    assert (both.prompt, both.instruction, both.extra) == (None, "i", {"prompt": "p"})


@pytest.mark.parametrize("entry, complaint", [
    (dict(instruction="i", chosen="c"), "p.jsonl, line 1: no field 'rejected': found chosen, instruction; expected"),
    (dict(instruction="i", rejected="c"), r"line 1: no field 'chosen'"),
    (dict(chosen="c", rejected="r"), r"line 1: no field 'instruction': found .*; or prompt, chosen, rejected"),
    (dict(prompt=[{"role": "user", "content": "p"}], chosen="c", rejected="r"), r"field 'prompt' holds a list"),
])
def test_preference_complaints(tmp_path, entry, complaint):
    with pytest.raises(UserError, match=complaint):
        preference(tmp_path, **entry)
