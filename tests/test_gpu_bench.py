"""The benches that a borrowed GPU is asked, at sizes that a CPU runs, on our side alone: none fails for a silly reason.

`python -m bench.gpu OUTPUT --tiny` runs them all, the peers' sides too.
"""

import os
import subprocess
import sys

import pytest

from bench import gpu
from conftest import PATIENCE, ROOT

PARTS = {name: command for name, _, command in gpu.parts(gpu.TINY)}


@pytest.mark.parametrize("name", ["sft-llama-7b-nf4", "switches-llama-1b", "dpo-llama-1b"])
def test_our_side(name):
    command = list(PARTS[name])
    if "--sides" in command:
        command[command.index("--sides") + 1:] = ["ours"]
    if command[0] == "bench/dpo.py":
        command += ["--side", "ours"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens/s" in done.stdout or "pairs/s" in done.stdout
    if name.startswith("switches"):
        assert "64 of 64 answers equal" in done.stdout and done.stdout.count("training, ") == 6


def test_a_part_that_fails_or_takes_too_long_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda size: [
        ("fails", 60, ["-c", "print('so far'); raise SystemExit(3)"]),
        ("hangs", 1, ["-c", "import time; time.sleep(60)"]),
        ("works", 60, ["-c", "print('7 tokens/s')"])])
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path), "--tiny"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code
    table = (tmp_path / "results.md").read_text("utf-8")
    assert all(said in table for said in ("exit 3", "so far", "exit cut off", "exit 0", "7 tokens/s"))
