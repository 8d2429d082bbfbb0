"""All that one GPU is asked in one go: tests, training, preference optimisation, decoding, each beside its peers.

    bash bench/gpu.sh OUTPUT              # at most nine minutes on one H200
    python -m bench.gpu OUTPUT --tiny     # the same commands at sizes that any CPU runs: can they fail for a silly reason?

Each part is a command of its own with a time limit. What it printed is in OUTPUT/PART.txt as soon as it ends, and
OUTPUT/results.json and OUTPUT/results.md hold all parts so far: a part that fails or is cut off costs no other.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench import machine

ROOT = Path(__file__).resolve().parent.parent
BIG = {"1b": "1b", "7b": "7b", "rows": "8", "length": "2048", "steps": "5", "pairs": "48", "mixed": "64",
       "new": "128", "dtype": "bfloat16"}
TINY = {"1b": "tiny", "7b": "tiny", "rows": "2", "length": "64", "steps": "1", "pairs": "8", "mixed": "4",
        "new": "4", "dtype": "float32"}


def parts(size: dict) -> list[tuple[str, int, list[str]]]:
    """(name, seconds it may take, command), the most telling first."""
    sft = ["bench/sft.py", "--dtype", size["dtype"], "--rows", size["rows"], "--length", size["length"], "--steps",
           size["steps"], "--rounds", "1"]
    generation = ["-m", "bench.generation", "--dtype", size["dtype"], "--mixed", size["mixed"],
                  "--new", size["new"], "--greedy", "--rows", "1", "8", "64"]
    return [
        ("tests", 120, ["-m", "pytest", "-q", "tests/test_cuda.py"]),
        ("sft-llama-1b", 90, [*sft, "--size", size["1b"], "--sides", "ours", "ours-masked", "transformers"]),
        ("sft-llama-7b-lora", 75, [*sft, "--size", size["7b"], "--lora", "--sides", "ours", "transformers"]),
        ("sft-llama-7b-nf4", 45, [*sft, "--size", size["7b"], "--lora", "--nf4", "--sides", "ours"]),
        ("switches-llama-1b", 75, ["-m", "bench.switches", "--size", size["1b"], "--dtype", size["dtype"],
                                   "--new", size["new"]]),
        ("generation-llama-7b", 90, [*generation, "--size", size["7b"]]),
        ("dpo-llama-1b", 90, ["bench/dpo.py", "--size", size["1b"], "--dtype", size["dtype"], "--pairs", size["pairs"],
                              "--rounds", "1", "--modes", "lora", "full cached"]),
        ("sft-bloom-1b", 60, [*sft, "--model", "bloom", "--size", size["1b"], "--sides", "ours", "transformers"]),
        ("sft-llama-1b-trl", 60, [*sft, "--size", size["1b"], "--sides", "trl"]),
        ("generation-bloom-1b", 60, [*generation, "--size", size["1b"], "--", "bloom"]),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in a minute")
    parser.add_argument("--seconds", type=float, default=540, help="no part begins, nor goes on, beyond this")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + args.seconds, []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    if machine.DEVICE == "cuda":
        environment |= {"MINIXLLM_TEST_CUDA": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name, limit, command in parts(TINY if args.tiny else BIG):
        start, said = time.monotonic(), args.output / f"{name}.txt"
        with open(said, "w", encoding="utf-8") as file:
            try:
                code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=file,
                                      stderr=subprocess.STDOUT, timeout=max(1, min(limit, end - start))).returncode
            except subprocess.TimeoutExpired:
                code = "cut off"
        lines = [line for line in said.read_text("utf-8", "replace").splitlines() if line.strip()]
        results.append({"part": name, "command": " ".join(["python", *command]), "exit": code,
                        "seconds": round(time.monotonic() - start, 1), "device": machine.description(),
                        "printed": lines[-25:]})
        (args.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (args.output / "results.md").write_text("\n\n".join(
            f"## {each['part']}: `{each['command']}`, exit {each['exit']} after {each['seconds']} s, {each['device']}\n\n"
            "```\n" + "\n".join(each["printed"]) + "\n```" for each in results) + "\n", encoding="utf-8")
        print(f"{name}: exit {code}, {results[-1]['seconds']} s", flush=True)
    sys.exit(any(each["exit"] for each in results))


if __name__ == "__main__":
    main()
