"""Record files: what is read, and every complaint with its file and line."""

import itertools
import json
import os
import tracemalloc
from pathlib import Path

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
    assert first == Instruction("Grüß", "", "ہیلو", "deu", first.extra, 1)
    assert first.extra["source"] == "me" and first.extra["score"] == 3
    assert second == Instruction("Say hi", "", "hi", None, json.loads(GOOD), 3)


def test_array_and_lines_are_told_apart_by_content(tmp_path):
    entries = [{"instruction": f"i{k}", "input": "x", "output": "o"} for k in range(3)]
    array = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps(entries, indent=1))
    lines = write(tmp_path / "a.json", "\ufeff" + "\r\n".join(map(json.dumps, entries)))
    assert [r.line for r in read_instructions(array)] == [-1, -2, -3]
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
    (GOOD + "\n[1]", r"line 2: found \[1\], expected an object"),
    (GOOD + "\n{}", r"line 2: no field 'instruction': found none; expected instruction, output and optional"),
    ('{"instruction": "a", "answer": "b"}', r"line 1: no field 'output': found answer, instruction; expected"),
    ('{"messages": []}', "line 1: messages: found turns of nobody, expected one of the user and one of the assistant"),
    ('{"messages": {}}', "line 1: messages: found {}, expected a list"),
    ('{"messages": [7]}', "line 1: messages: turn 1: found 7, expected an object"),
    ('{"messages": [{"role": "user", "content": ["a"]}]}', r"line 1: messages: turn 1: content: found \['a'\], expected text"),
    ('{"conversations": [{"value": "a"}]}', "line 1: conversations: turn 1: role: found None, expected text"),
    ('{"a\\nb": 1}', "line 1: no field 'instruction': found a b; expected"),
    ("{" + ", ".join(f'"id{i}": 1' for i in range(9999)) + "}", r"found id0, id1, id10, .{50,80}\.\.\.; expected"),
    ("instruction,output\nSay hi,hi\n", r"line 1: not JSON .*; expected an object \{\.\.\.\} in each line"),
    (b"PAR1\x15\x04\xff", "a.jsonl: found a Parquet file, expected JSON or JSONL in UTF-8"),
    (b"\x1f\x8b\x08\x00...", "a.jsonl: found a gzip archive, expected JSON or JSONL"),
    ("version https://git-lfs.github.com/spec/v1\n", "a.jsonl: found a Git LFS pointer whose content was not downl"),
    (GOOD.encode("utf-16"), "a.jsonl: found text in UTF-16, expected JSON or JSONL in UTF-8"),
    ('{"instruction": "a", "output": 7}', r"line 1: output: found 7, expected text"),
    ('{"instruction": "a", "output": null}', r"line 1: output: found None, expected text"),
    ('{"instruction": ["a"], "output": "b"}', r"line 1: instruction: found \['a'\], expected text"),
    ('{"instruction": "a", "input": 1, "output": "b"}', r"line 1: input: found 1, expected text"),
    ('{"instruction": "a", "language": {}, "output": "b"}', r"line 1: language: found {}, expected text"),
    ('{"instruction": "\\ud800", "output": "b"}', r"line 1: instruction holds half of a surrogate pair"),
    (GOOD.encode() + b"\n" + '{"instruction": "é"}'.encode("latin-1"), r"line 2: not UTF-8 \(byte 0xe9\)"),
    (GOOD + "\n" + "[" * 100_000, r"line 2: not JSON \(nested too deeply"),
    (GOOD + "\n" + "9" * 5000, r"line 2: not JSON \(.*a number too long\)"),
    ("", r"a.jsonl: holds no records"),
    ("\n  \n", r"a.jsonl: holds no records"),
    ("[]", r"a.jsonl: holds no records"),
    (f"[\n{GOOD},\n{GOOD[:-1]}\n]", r"line 4: not JSON"),
    (f"[\n{GOOD}\n{GOOD}]", r"line 3: not JSON \(Expecting ',' delimiter, column 1\), in .*expected"),
    (f"[{GOOD}\n", r"line 2: not JSON \(Expecting ',' delimiter"),
    (f"[{GOOD},]", r"line 1: not JSON"),
    (f"[{GOOD}]\n{GOOD}", r"line 2: not JSON \(Extra data"),
    ("[\n1]", r"record 1: found 1, expected an object"),
    (f"[\n{GOOD},\n{{}}]", r"record 2: no field 'instruction'"),
    (b"[\n\xff]", r"line 2: not UTF-8"),
    (f"[{GOOD}]\n".encode() + b"\xc3", r"line 2: not UTF-8"),
    (f"[{GOOD},\n" + "[" * 100_000, r"line 1: not JSON \(nested too deeply"),
    (f"\ufeff{GOOD}\n\ufeff{GOOD}", r"line 2: not JSON \(a byte-order mark, U\+FEFF, inside the file.*remove it\)"),
    (f"[\n{GOOD}\n,\n\ufeff{GOOD}]", r"line 4: not JSON \(a byte-order mark, U\+FEFF, inside the file"),
])
def test_complaints(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint):
        list(read_instructions(write(tmp_path / "a.jsonl", text)))


def test_files_of_directories(tmp_path):
    for name in ("a.jsonl", "b.json", "c.JSONL", "d.jsonl.bak", "notes.txt", "state.json", "._a.jsonl", ".b.json",
                 "a.jsonl.gz"):
        write(tmp_path / name, GOOD)
    assert record_files([tmp_path, tmp_path / "notes.txt"]) == [
        tmp_path / name for name in ("b.json", "state.json", "a.jsonl", "c.JSONL", "notes.txt")]
    write(tmp_path / "e.jsonl.gz", GOOD)
    with pytest.raises(UserError, match="found e.jsonl.gz, which is not read: expected it to be unpacked"):
        record_files([tmp_path])
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
    for read in (lambda path: list(read_instructions(path)), lambda path: record_files([path])):
        with pytest.raises(UserError, match=r"no such file.*hf download --repo-type dataset owner/set --local-dir set"):
            read(Path("owner/set"))
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match="pipe: cannot be read .*only once.*write its content to a file first"):
            read(tmp_path / "pipe")
        os.remove(tmp_path / "pipe")


def test_chats_of_one_exchange(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river."},
             {"role": "assistant", "content": "The Rhine."}]
    shared = [{"from": name, "value": turn["content"]} for name, turn in zip(("system", "human", "gpt"), turns)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [
        {"messages": turns, "language": "eng", "id": 7}, {"messages": turns[1:]}, {"conversations": shared},
        {"conversations": shared[1:]}])))
    records = list(read_instructions(path))
    assert records[0] == Instruction("Be brief.\n\nName a river.", "", "The Rhine.", "eng", records[0].extra, 1)
    assert records[0].extra["id"] == 7
    assert [record.instruction for record in records[1:]] == ["Name a river.", records[0].instruction, "Name a river."]
    assert {record.output for record in records} == {"The Rhine."}
    path = write(tmp_path / "b.jsonl", "\n".join(json.dumps({"messages": each}) for each in (
        turns + turns[1:], turns[1:], turns[:2], turns[2:], [*turns, {"role": "tool", "content": "x"}])))
    left_out = []
    assert [record.line for record in read_instructions(path, None, left_out.append)] == [2]
    assert left_out == [1, 3, 4, 5]
    with pytest.raises(UserError, match="line 1: messages: found turns of system, user, assistant, user, assistant, exp"):
        list(read_instructions(path))


def test_lines_are_streamed(tmp_path):
    """The first comes before a broken second is looked at."""
    assert next(read_instructions(write(tmp_path / "a.jsonl", GOOD + "\nbroken"))).output == "hi"


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
        assert sum(sizes) == len(text) and len(sizes) == 5


# Preferences

def preference(tmp_path, **entry):
    return next(read_preferences(write(tmp_path / "p.jsonl", json.dumps(entry))))


def test_three_spellings(tmp_path):
    ours = preference(tmp_path, instruction="i", input="x", chosen="c", rejected="r", language="deu",
                      response_language="fra", judge="j")
    assert (ours.instruction, ours.input, ours.chosen, ours.rejected) == ("i", "x", "c", "r")
    assert (ours.language, ours.response_language, ours.prompt, ours.extra["judge"]) == ("deu", "fra", None, "j")
    theirs = preference(tmp_path, instruction="i", input="x", prefered_output="c", rejected_output="r")
    assert (theirs.instruction, theirs.input, theirs.chosen, theirs.rejected) == ("i", "x", "c", "r")
    trl = preference(tmp_path, prompt="p", chosen="c", rejected="r")
    assert (trl.prompt, trl.instruction, trl.chosen, trl.rejected) == ("p", "", "c", "r")
    both = preference(tmp_path, instruction="i", prompt="p", chosen="c", rejected="r")
    assert (both.prompt, both.instruction, both.extra["prompt"]) == (None, "i", "p")


@pytest.mark.parametrize("entry, complaint", [
    (dict(instruction="i", chosen="c"), "p.jsonl, line 1: no field 'rejected': found chosen, instruction; expected"),
    (dict(instruction="i", rejected="c"), r"line 1: no field 'chosen'"),
    (dict(chosen="c", rejected="r"), r"line 1: no field 'instruction': found .*; or prompt, chosen, rejected"),
    (dict(prompt=[{"role": "user", "content": "p"}], chosen="c", rejected="r"), r"line 1: prompt: found \[{.*}\], expected text"),
])
def test_preference_complaints(tmp_path, entry, complaint):
    with pytest.raises(UserError, match=complaint):
        preference(tmp_path, **entry)
