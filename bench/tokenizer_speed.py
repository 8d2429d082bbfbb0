"""Tokenizer speed: byte-level BPE here against Hugging Face `tokenizers`, one text at a time, on one core.

    python bench/tokenizer_speed.py DATA_FOLDER

Trains a vocabulary of each shape on DATA_FOLDER/ntrex and DATA_FOLDER/tatoeba, warms both sides on the odd UDHR
paragraphs and times the even ones, the two sides in turn, three times with fresh caches; prints the range,
and load times.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not bench/, where this file hides the library's name

import tokenizers
from tests.tokenizer_samples import train

from minixllm.tokenizers.byte_bpe import ByteLevelBPE

VOCABULARIES = {"bloom": 250_880, "gpt2": 50_257, "llama3": 128_000, "smollm2": 49_152}


def timed(action):
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


def main(folder: Path):
    texts = [line.split("\t")[-1] for kind in ("ntrex", "tatoeba") for file in sorted((folder / kind).iterdir())
             for line in file.read_text("utf-8").split("\n")]
    odd, even = [], []
    for file in sorted((folder / "udhr").glob("*.tsv")):
        for number, line in enumerate(file.read_text("utf-8").split("\n"), start=1):
            (odd if number % 2 else even).append(line.split("\t", 1)[-1])
    size = sum(len(text.encode()) for text in even) / 1e6
    print(f"UDHR, even paragraphs: {size:.2f} MB; MB/s, lowest to highest of 3")
    for shape, vocab_size in VOCABULARIES.items():
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "tokenizer.json"
            train(shape, texts, path, vocab_size)
            speeds, loads = {"minixllm": [], "tokenizers": []}, {"minixllm": [], "tokenizers": []}
            for _ in range(3):
                for side, load in (("minixllm", lambda: ByteLevelBPE(path)),
                                   ("tokenizers", lambda: tokenizers.Tokenizer.from_file(str(path)))):
                    tokenizer, seconds = timed(load)
                    loads[side].append(seconds)
                    for text in odd:
                        tokenizer.encode(text)
                    speeds[side].append(size / timed(lambda: [tokenizer.encode(text) for text in even])[1])
        for side in speeds:
            print(f"{shape:8} {side:10}  {min(speeds[side]):5.2f} to {max(speeds[side]):5.2f} MB/s   "
                  f"load {min(loads[side]):.2f} to {max(loads[side]):.2f} s", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
