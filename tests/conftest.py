"""What every test may use: the real-data folder, and `torchrun` on this machine."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # of the scripts that tests start
REAL_GPU = "MINIXLLM_TEST_CUDA" in os.environ
PATIENCE = 600  # seconds for what takes a few: the machine may be slow, or busy with other things
if not REAL_GPU:  # the tests and the processes they start run on the CPU, on machines that have GPUs as on others
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A shell starts what it runs in the background with Ctrl-C ignored, and so would be the processes that tests send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # tests that run side by side take a core each
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real text and tokenizers named by MINIXLLM_TEST_DATA; tests that need it are skipped without it.

    ntrex/{code}.txt: NTREX-128, 500 aligned lines a language. udhr/{code}.tsv: article, paragraph of the Declaration of
    Human Rights. tatoeba/{code}.tsv: English, other language. xcopa/test.{tag}.jsonl, and self_instruct's
    user_oriented_instructions.jsonl, as published. llama_tokenizer: LLaMA's tokenizer.model, and vectors.jsonl of texts
    with their ids. {code} is FLORES-101's.
    """
    folder = os.environ.get("MINIXLLM_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MINIXLLM_TEST_DATA names no folder of test data")
    return Path(folder)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def torchrun():
    """torchrun(nproc, script, *args) runs the script under torchrun on the CPU and returns the finished process.

    The repository root is the working directory and on the import path. One thread a process, so that results do
    not depend on how the machine's cores are shared out.
    """

    def run(nproc: int, script, *args, timeout: float = PATIENCE, check: bool = True, env: dict | None = None):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", "--standalone",
                   str(script), *map(str, args)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, **(env or {})}
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} exited {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
