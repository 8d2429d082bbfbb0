"""How fast records become batches, and how much memory that takes: python bench/data_speed.py [--records 300000]

Writes synthetic records in many languages' scripts, builds the token cache with one worker and with all cores, then
opens it afresh and draws batches. Memory is the peak of each stage's own process. Packing is also timed on the lengths
of five million records. Nothing here is compared with a peer.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not bench/, where a file hides the library `tokenizers`

from minixllm.data.datasets import Instructions
from minixllm.data.stream import Stream, pack
from minixllm.data.token_cache import TokenCache
from minixllm.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

ALPHABETS = ["abcdefghijklmnopqrstuvwxyz", "абвгдежзиклмнопрстуфхцчшыюя", "αβγδεζηθικλμνξοπρστυφχψω",
             "ابتثجحخدذرزسشصضطظعغفقكلمنهوي", "अआइईउएकखगघचछजझटठडढणतथदधनपफबभम"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rng = np.random.default_rng(0)
        words = [["".join(rng.choice(list(alphabet), rng.integers(2, 9))) for _ in range(2000)]
                 for alphabet in ALPHABETS]
        train_sentencepiece((" ".join(rng.choice(each, 500)) for each in words * 4), folder / "tokenizer.model", 8000)
        with open(folder / "records.jsonl", "w", encoding="utf-8") as file:
            for number in range(args.records):
                each = words[number % len(words)]
                ask, answer = (" ".join(each[k] for k in rng.integers(0, 2000, int(min(size, 100)))) for size in (
                    rng.integers(3, 12), rng.lognormal(3, 0.8)))
                file.write(json.dumps({"instruction": ask, "output": answer, "language": f"x{number % 100}"},
                                      ensure_ascii=False) + "\n")
        megabytes = (folder / "records.jsonl").stat().st_size / 1e6
        print(f"{args.records:,} records, {megabytes:.0f} MB, {args.cores} cores")
        for workers in dict.fromkeys([1, args.cores]):
            report(f"build, {workers} worker(s)", build, folder, workers)
        report("open and draw", draw, folder)
    report("pack 5 million", pack_millions)


def report(name, stage, *args):
    """Run a stage in a process of its own and print what it says, its time and its peak memory."""
    receive, send = multiprocessing.get_context("spawn").Pipe(False)
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(send, stage, *args))
    process.start()
    said, seconds, before, peak = receive.recv()
    process.join()
    print(f"{name:<22}{seconds:7.1f} s, {said}; memory {before:,} -> {peak:,} MB",
          flush=True)


def _run(send, stage, *args):
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    before, start = peak(), time.perf_counter()
    said = stage(*args)
    send.send((said, time.perf_counter() - start, before, peak()))


def build(folder, workers):
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    start = time.perf_counter()
    data = TokenCache([folder / "records.jsonl"], tokenizer, folder / f"cache{workers}", Instructions(512), workers)
    seconds = time.perf_counter() - start
    return f"{len(data) / seconds:,.0f} records/s, {len(data.tokens) / seconds:,.0f} tokens/s"


def draw(folder):
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    start = time.perf_counter()
    data = TokenCache([folder / "records.jsonl"], tokenizer, folder / "cache1", Instructions(512))
    opened = time.perf_counter()
    stream = Stream(data, 0, 32, 8, 512)
    planned = time.perf_counter()
    tokens = sum(len(batch.input_ids) for step in range(200) for batch in stream.batch(step).micro_batches)
    seconds = time.perf_counter() - planned
    fill = data.lengths.sum() / (512 * (len(pack(data.lengths, 512)[1]) - 1))
    return (f"opened in {opened - start:.2f} s, epoch planned in {planned - opened:.2f} s, {tokens / seconds:,.0f} "
            f"tokens/s drawn, rows {fill:.1%} full at mean length {data.lengths.mean():.0f}")


def pack_millions():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(120) - 0.32, 0.8, 5_000_000), 8, 512).astype(np.int32)
    start = time.perf_counter()
    _, bounds = pack(lengths, 512)
    return (f"packed in {time.perf_counter() - start:.1f} s, rows {lengths.sum() / (512 * (len(bounds) - 1)):.1%} full "
            f"at mean length {lengths.mean():.0f}")


if __name__ == "__main__":
    main()
