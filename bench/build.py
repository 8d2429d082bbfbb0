"""Requests a second and memory a record of the build of instructions, against a local endpoint that answers at once.

    python bench/build.py                      # 1,000, 10,000 and 100,000 records, one language, two requests a record

The whole path: reading, asking over HTTP, storing, filters, writing. The build has one core to itself, the endpoint the
other. Memory is the build's largest, beyond that of the smallest build, by records.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, records: int, url: str, languages: list[str], core: int) -> tuple[float, int, int]:
    """(seconds, requests, bytes of memory) of a build."""
    with open(folder / f"{records}.json", "w", encoding="utf-8") as file:  # an array, as Alpaca itself is
        for i in range(records):
            record = {
                "instruction": f"Describe the town of the {i}th traveller in one or two short sentences.",
                "input": "",
                "output": "It lies by the river and has many old houses, a mill and a market.",
            }
            file.write(("," if i else "[") + json.dumps(record) + "\n")
        file.write("]")
    command = [sys.executable, "-m", "minixllm.building", "instructions", "--data", str(folder / f"{records}.json"),
               "--output", str(folder / f"out-{records}"), "--languages", *languages, "--translator", f"google@{url}",
               "--generator", f"chat:instant@{url}", "--quality-sample", "20"]
    start = time.perf_counter()
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "GOOGLE_API_KEY": "no-secret", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: hasattr(os, "sched_setaffinity") and os.sched_setaffinity(0, {core}),
    )
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"the build failed: {printed}")
    requests = int(printed.split("asked in this run: ")[1].split()[0].replace(",", ""))
    return seconds, requests, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--languages", nargs="+", default=["mri"], help="as many builds of all records")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 0]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/fake_services.py"), str(port)],
        preexec_fn=lambda: hasattr(os, "sched_setaffinity") and os.sched_setaffinity(0, {cores[-1]}),
    )
    try:
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        print(f"{'records':>10}{'seconds':>10}{'requests/s':>12}{'MB':>8}{'bytes a record':>16}")
        first = None
        with tempfile.TemporaryDirectory() as folder:
            for records in args.records:
                seconds, requests, memory = build(
                    Path(folder), records, f"http://127.0.0.1:{port}/v1", args.languages, cores[0]
                )
                first = first or (records, memory)
                growth = f"{(memory - first[1]) / (records - first[0]):.0f}" if records > first[0] else ""
                print(
                    f"{records:>10,}{seconds:>10.1f}{requests / seconds:>12,.0f}{memory / 1e6:>8.0f}{growth:>16}",
                    flush=True,
                )
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
