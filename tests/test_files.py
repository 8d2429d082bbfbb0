"""JSON files: what can be read can be written again. Directories appear whole."""

import os

import pytest

from minixllm.errors import UserError
from minixllm.files import read_json, replacing, write_json


@pytest.mark.parametrize("content", [
    b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": "\xed\xa0\x80"}', b'{"\xed\xbf\xbf": 1}',
    '{"a": "\\ud800"}'.encode("utf-16"), '{"a": "\ud800"}'.encode("utf-16-le", "surrogatepass"),
], ids=["escaped", "escaped key", "raw", "raw key", "escaped in UTF-16", "raw in UTF-16"])
def test_half_of_a_surrogate_pair_is_refused_in_any_spelling(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a.json.*surrogate|a.json: no valid JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ['{"a": "é 😀"}', '{"a": "\\u00e9 \\ud83d\\ude00"}'], ids=["plain", "escaped"])
def test_what_is_read_is_written_again(tmp_path, encoding, text):
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    write_json(tmp_path / "b.json", read_json(tmp_path / "a.json"))
    assert read_json(tmp_path / "b.json") == {"a": "é 😀"}


def test_a_directory_takes_its_name_when_its_files_are_on_the_disk(tmp_path, monkeypatch):
    """Or a power cut might leave files empty that have their names."""
    on_disk, fsync, rename = set(), os.fsync, os.rename

    def renamed(old, new):
        assert {path.stat().st_ino for path in old.iterdir()} == on_disk
        rename(old, new)

    monkeypatch.setattr(os, "fsync", lambda file: (on_disk.add(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "rename", renamed)
    with replacing(tmp_path / "a") as partial:
        (partial / "one").write_text("1")
        (partial / "two").write_text("2")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["one", "two"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "b") as partial:
        (partial / "one").write_text(str(1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
