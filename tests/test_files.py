"""JSON files: what can be read can be written again. Files and directories appear whole, with nothing beside them."""

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from minixllm.errors import UserError
from minixllm.files import atomic_write, read_json, replacing, save_array, write_json


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


def test_a_killed_process_leaves_its_file_only_until_the_next_is_written(tmp_path):
    """What another process still writes stays, and so does what looks alike."""
    alike = [".a.jsonl.old", ".a.jsonl", ".b.jsonl.12345678.partial", ".a.jsonl.12345678.partial.gz"]
    for name in alike:
        (tmp_path / name).write_text("")
    code = ("import sys; from minixllm.files import atomic_write\n"
            "with atomic_write(sys.argv[1]): print(flush=True); sys.stdin.read()")
    killed, writing = [subprocess.Popen([sys.executable, "-c", code, tmp_path / "a.jsonl"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE) for _ in range(2)]
    for process in (killed, writing):
        process.stdout.readline()
    assert len(list(tmp_path.iterdir())) == len(alike) + 2
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    with atomic_write(tmp_path / "a.jsonl") as file:
        file.write("whole")
    assert len(list(tmp_path.iterdir())) == len(alike) + 2  # the new file, and that which is still written
    writing.communicate()
    assert writing.returncode == 0 and {path.name for path in tmp_path.iterdir()} == {*alike, "a.jsonl"}


def test_numpys_short_write_is_called_a_full_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="No space left on device.*a.npy"):
            with atomic_write(tmp_path / "a.npy", "wb") as file:
                save_array(file, np.zeros(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
