"""Runs that are ended at random moments and started again leave what an undisturbed run leaves, bit for bit.

    python -m bench.kills [--count 200] [--seed 0] [--only NAME]

Trainings, evaluations and builds of tiny data sets are ended up to three times, and started again as the README says
until they end by themselves. All files are compared but checkpoints, locks and stored answers, and of metrics.jsonl
all but timings: nothing temporary may be left. Every end must be without a traceback and within a minute. A full disk
is a limit to the size of files (RLIMIT_FSIZE), set from outside while the run goes on.

For moments that hit the work and not the import of torch, runs are forked from this process, which has imported it; as
torchrun does, it sends SIGTERM to the process that is left when another dies. The seed gives the same jobs, ends and
moments; what is going on at a moment depends on the machine. Linux only.
"""

import argparse
import collections
import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "GOOGLE_API_KEY": "key-of-a-server"}  # no thread may run when this process forks

import torch._dynamo  # noqa: F401  (an optimizer imports it)
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
sys.modules["matplotlib"] = None  # its pictures would take half of a run's time

import fake_services

import eval  # noqa: F401  (so that a run that is forked has nothing to import)
import train_dpo  # noqa: F401
import train_sft  # noqa: F401
from minixllm.building import feedback, filters, instructions  # noqa: F401
from minixllm.files import write_json_lines
from minixllm.models.llama import LlamaConfig
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.weights import hf_directory

filters.language_id.identifier = fake_services.identifier  # in whose words an identifier sees no language
PATIENCE = 60  # seconds
WORDS = ["river", "house", "old", "flows", "town", "mile", "amber", "quiet", "seven", "lantern"]
ENDS = "SIGKILL", "SIGTERM", "Ctrl-C", "full disk", "SIGKILL of one"
SIGTERM = {0, 130, -signal.SIGTERM}  # the exit statuses after it
RIGHT = {"SIGTERM": SIGTERM, "Ctrl-C": {0, 130}, "full disk": {2, *SIGTERM}}  # a full disk may end one, then the other


def good_files(folder: Path) -> None:
    """A model, and data of each kind."""
    texts = [" ".join(random.Random(i).choices(WORDS, k=12)) + f" {i}." for i in range(200)]
    tokenizer = train_sentencepiece([*texts, "Below is an instruction that describes a task. ### Response:"] * 3,
                                    folder / "sp.model", 400)
    model = hf_directory.build(LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512))
    hf_directory.initialise(model, 0)
    hf_directory.save_model(model, folder / "model", tokenizer)
    records = [{"instruction": f"Describe {text}", "input": "", "output": f"It is {texts[-i]}", "id": str(i),
                "language": ("deu", "tha")[i % 2]} for i, text in enumerate(texts)]
    pairs = [record | {"chosen": record["output"], "rejected": f"No. {record['instruction']}",
                       "response_language": "deu"} for record in records]
    choices = [{"premise": text, "choice1": texts[i - 1], "choice2": texts[i - 2], "label": i % 2, "idx": i,
                "question": ("cause", "effect")[i % 2]} for i, text in enumerate(texts)]
    for name, content in {"records": records, "pairs": pairs, "xcopa/test.it": choices, "xcopa/test.sw": choices,
                          **{name: [record | {"language": name[-3:]} for record in records]
                             for name in ("eng", "built/wol", "built/umb")}}.items():
        write_json_lines(folder / f"{name}.jsonl", content)


def jobs(good: Path, out: Path, port: int) -> dict[str, tuple[list[str], int]]:
    """{name: (script and flags, processes)}."""
    url, training = f"http://127.0.0.1:{port}/v1", (
        f"--model {good}/model --cache {out}/cache --batch-size 8 --micro-batch-size 2 --max-length 256 --steps 12 "
        "--save-every 3 --eval-every 4")
    sft = f"train_sft.py {training} --data {good}/records.jsonl --max-new-tokens 4"
    dpo = f"train_dpo.py {training} --data {good}/pairs.jsonl"
    alone = {
        "instructions": f"minixllm.building instructions --data {good}/eng.jsonl --languages mri nya "
                        f"--translator google@{url} --generator chat:m@{url} --quality-sample 10",
        "feedback": f"minixllm.building feedback --data {good}/built --languages wol umb --pairs-each 60 "
                    f"--generators chat:m@{url} --judge chat:m@{url}"}
    both = {"SFT": sft, "LoRA": f"{sft} --lora-r 4", "DPO": dpo, "DPO, cached": f"{dpo} --reference cached",
            "eval.py": f"eval.py --model {good}/model --benchmarks {good}/xcopa --max-new-tokens 12"}
    return {name: ([*flags.split(), "--output", f"{out}/output"], processes) for name, flags, processes in (
        *((name, flags, 1) for name, flags in (alone | both).items()),
        *((f"{name}, 2 processes", flags, 2) for name, flags in both.items()))}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Running:
    """A run of one or two processes, and what they print."""

    def __init__(self, argv: list[str], processes: int):
        self.pipe, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 1 << 20)  # what is printed, all of it
        self.living, self.statuses = [], []
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        sys.stdout.flush()
        for rank in map(str, range(processes)):
            if not (pid := os.fork()):
                run_script(argv, world | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}, theirs)
            self.living.append(pid)
        os.close(theirs)

    def ended(self, seconds: float) -> bool:
        """Whether it ends within this time; the process that is left when another fails gets SIGTERM."""
        until = time.monotonic() + seconds
        while self.living and time.monotonic() < until:
            for pid in list(self.living):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.living.remove(pid)
                    self.statuses.append(os.waitstatus_to_exitcode(status))
                    if status:
                        self.send(signal.SIGTERM)
            time.sleep(0.002)
        return not self.living

    def send(self, number: int) -> None:
        for pid in self.living:
            os.kill(pid, number)

    def said(self) -> str:
        os.set_blocking(self.pipe, False)
        with open(self.pipe, "rb") as pipe:
            return (pipe.read() or b"").decode("utf-8", "replace")[-3000:]

    def disturb(self, how: str, rng: random.Random) -> str | None:
        """End it; what was wrong with its end."""
        if how == "full disk":
            size = int(10 ** rng.uniform(0, 5))
            for pid in self.living:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        elif how == "SIGKILL of one":
            os.kill(rng.choice(self.living), signal.SIGKILL)
        else:
            self.send({"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}[how])
        if not self.ended(PATIENCE):
            self.send(signal.SIGKILL)
            return f"no end within {PATIENCE} s" * (not self.ended(PATIENCE)) or f"an end after {PATIENCE} s only"
        said = self.said()
        if "Traceback" in said or not RIGHT.get(how, set(self.statuses)).issuperset(self.statuses):
            return f"it ended with {self.statuses}: {said}"


def run_script(argv: list[str], environment: dict, output: int) -> None:
    """Become the process that runs this script."""
    status = 130
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        sys.argv[:] = argv
        if argv[0].endswith(".py"):
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        status = exit.code or 0
    except KeyboardInterrupt:  # before the script could take it
        pass
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def left_by(folder: Path) -> dict[str, bytes | list]:
    """What is compared: all files but those that may differ."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = {name: content for name, content in found.items()
             if not name.endswith(".lock") and "checkpoints/step-" not in name and "cache.sqlite" not in name}
    if log := found.get("output/metrics.jsonl"):
        found["output/metrics.jsonl"] = [
            row | dict.fromkeys(("seconds", "tokens_per_second", "mfu")) for row in map(json.loads, log.splitlines())]
    return found


def case(argv: list[str], processes: int, whole: dict, seconds: float, out: Path, rng: random.Random):
    """([how each of its attempts was ended], [what was wrong]) of a run that is started until it ends by itself."""
    shutil.rmtree(out, ignore_errors=True)
    ends, faults = [], []
    for attempt in range(4):
        running = Running(argv + ["--resume"] * ("train" in argv[0] and attempt > 0), processes)
        if running.ended(rng.uniform(0, seconds) if attempt < 3 else 10 * PATIENCE):
            if any(running.statuses):
                faults.append(f"started again it ended with {running.statuses}: {running.said()}")
            break
        ends.append(rng.choice(ENDS[:3 + processes]))
        if fault := running.disturb(ends[-1], rng):
            faults.append(f"{ends[-1]}: {fault}")
        if not any(running.statuses):  # it was about to end anyway
            break
    found = left_by(out)
    return ends, faults + [f"after {', '.join(ends)}: {name} differs" for name in sorted(found.keys() | whole.keys())
                           if found.get(name) != whole.get(name)]


def campaign(named: dict, count: int, seed: int, out: Path) -> bool:
    """Print what was wrong as it happens, then a row a job; whether nothing was."""
    whole, seconds, counts = {}, {}, collections.defaultdict(collections.Counter)
    for name, (argv, processes) in named.items():
        began, running = time.monotonic(), Running(argv, processes)
        if not running.ended(PATIENCE) or any(running.statuses):
            raise SystemExit(f"{name}: an undisturbed run ended with {running.statuses}\n{running.said()}")
        seconds[name], whole[name] = time.monotonic() - began, left_by(out)
        shutil.rmtree(out)
    halves = [[name for name in named if ("eval" in name) == evaluation] or list(named) for evaluation in (True, False)]
    with tqdm(total=count, unit="end") as bar, contextlib.suppress(KeyboardInterrupt):
        while bar.n < count:
            number = sum(each["runs"] for each in counts.values())
            rng = random.Random(f"{seed} {number}")
            name = rng.choice(halves[number % 2])
            ends, wrong = case(*named[name], whole[name], seconds[name], out, rng)
            counts[name].update([*ends, "runs"], wrong=len(wrong))
            for fault in wrong:
                bar.write(f"{name}, case {number}: {fault}")
            bar.update(len(ends))
    columns = "runs", *ENDS, "wrong"
    print(f"| job | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in named:
        print(f"| {name} | {' | '.join(str(counts[name][column]) for column in columns)} |")
    return not any(each["wrong"] for each in counts.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many ends, about half of them of eval.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only jobs whose names hold this")
    args = parser.parse_args()
    tqdm.monitor_interval = 0  # no thread
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, too, Ctrl-C gives the table so far
    port = free_port()
    server = subprocess.Popen([sys.executable, ROOT / "tests/fake_services.py", str(port)],
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        with tempfile.TemporaryDirectory() as scratch:
            good, out = Path(scratch) / "good", Path(scratch) / "run"
            maker = multiprocessing.get_context("spawn").Process(target=good_files, args=(good,))  # it makes threads
            maker.start()
            maker.join()
            named = {name: job for name, job in jobs(good, out, port).items() if args.only in name}
            right = campaign(named, args.count, args.seed, out)
    finally:
        server.terminate()
    raise SystemExit(not right)


if __name__ == "__main__":
    main()
