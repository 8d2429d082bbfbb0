"""Tokenised once, packed, dealt out: every record of a global batch exactly once, whatever the split."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import time
import unicodedata
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from byte_tokenizer import Bytes, Fatal, Slow
from hypothesis import given, settings
from hypothesis import strategies as st

from minixllm.data import prompts, stream, token_cache
from minixllm.data.datasets import IGNORE, Instructions, Preferences
from minixllm.data.stream import Stream, collate, hold_out, in_order, pack
from minixllm.data.token_cache import TokenCache, kept
from minixllm.errors import UserError
from minixllm.models.attention import Packed
from minixllm.models.llama import Llama, LlamaConfig
from minixllm.tokenizers import load_tokenizer
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.training.losses import answer_logps, label_logps


ARRAYS = ("tokens", "segments", "offsets", "languages", "lines", "files")


def SFTData(paths, tokenizer, max_length, cache, workers=None, **options):
    paths = paths if isinstance(paths, list) else [paths]
    return TokenCache(paths, tokenizer, cache, Instructions(max_length, **options), workers)


def PreferenceData(path, tokenizer, max_length, cache, **options):
    return TokenCache([path], tokenizer, cache, Preferences(max_length, **options))


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def some_records(n, seed=0):
    rng = random.Random(seed)
    return [{"instruction": f"Say {k}" + "?" * rng.randint(0, 60), "output": "yes " * rng.randint(1, 40),
             "language": rng.choice(["deu", "deu", "deu", "deu", "amh", "kam"])} for k in range(n)]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return SFTData(write(folder / "a.jsonl", some_records(300)), Bytes(), 512, folder / "cache")


# One record

def one(tmp_path, tokenizer=None, max_length=512, kind=SFTData, entry=None, **options):
    entry = entry or {"instruction": "Say ü", "input": "x", "output": "üü"}
    return kind(write(tmp_path / "one.jsonl", [entry]), tokenizer or Bytes(), max_length, tmp_path / "cache", **options)


def test_labels_are_the_answer_and_its_end(tmp_path):
    """The end of the answer is learnt although the padding token is the same."""
    prompt = Bytes().encode(prompts.alpaca("Say ü", "x"), add_special_tokens=True)
    answer = Bytes().encode("üü") + [2]
    inputs, labels = one(tmp_path)[0]
    assert inputs.tolist() == (prompt + answer)[:-1]
    assert labels.tolist() == [IGNORE] * (len(prompt) - 1) + answer
    data = one(tmp_path, train_on_prompt=True)
    inputs, labels = data[0]
    assert inputs.tolist() == (prompt + answer)[:-1] and labels.tolist() == (prompt + answer)[1:]
    assert data.counted[0] == data.lengths[0] == len(labels)


@pytest.mark.parametrize("prefix, suffix", [((1,), ()), ((), ()), ((1,), (2,))])
def test_bos_exactly_when_the_tokenizer_adds_it(tmp_path, prefix, suffix):
    """And an EOS that a tokenizer puts after every text does not part prompt and answer."""
    inputs, labels = one(tmp_path, Bytes(prefix, suffix, f"{prefix}{suffix}"))[0]
    assert (inputs == 1).sum() == len(prefix) and list(inputs[:len(prefix)]) == list(prefix)
    assert (inputs == 2).sum() == 0 and (labels == 2).sum() == 1


def test_prompt_and_answer_are_tokenised_apart(tmp_path):
    """With a real tokenizer whose merges would cross the boundary."""
    train_sentencepiece([f"Response:yes {k}" for k in range(300)], tmp_path / "tokenizer.model", 400)
    tokenizer = load_tokenizer(tmp_path)
    data = one(tmp_path, tokenizer, entry={"instruction": "a", "output": "yes 12"})
    prompt, answer = data.read(0)
    assert prompt.tolist() == tokenizer.encode(prompts.alpaca("a"), add_special_tokens=True)
    assert answer.tolist() == tokenizer.encode("yes 12") + [tokenizer.eos_id]
    together = tokenizer.encode(prompts.alpaca("a") + "yes 12", add_special_tokens=True)
    assert together != [*prompt, *answer[:-1]]      # or the test would show nothing


def test_too_long_is_dropped_or_cut_and_counted(tmp_path):
    room = len(Bytes().encode(prompts.alpaca("a"), True))
    path = write(tmp_path / "a.jsonl", [
        {"instruction": "a", "output": "x" * 9, "language": "deu"},        # fits exactly, with EOS
        {"instruction": "a", "output": "é" * 5, "language": "deu"},        # one byte too long
        {"instruction": "a" * 11, "output": "x", "language": "deu"},       # its prompt alone leaves no room
        {"instruction": "a", "output": " ", "language": "fra"}])
    data = SFTData(path, Bytes(), room + 10, tmp_path, too_long="drop")
    assert len(data) == 1 and data.read(0)[1].tolist() == [123] * 9 + [2]
    assert data.report["deu"] == Counter(records=3, too_long=2, tokens=20, characters=15)
    assert data.report["fra"] == Counter(records=1, empty=1) and kept(data.report["fra"]) == 0
    data = SFTData(path, Bytes(), room + 10, tmp_path, too_long="truncate")
    assert len(data) == 2 and data.read(1)[1].tolist() == Bytes().encode("é" * 5)      # whole prompt, no EOS
    assert data.report["deu"] == Counter(records=3, too_long=1, truncated=1, tokens=20, characters=15)
    assert kept(data.report["deu"]) == 2
    assert [data.where(k) for k in range(2)] == [f"{path}, line 1", f"{path}, line 2"]
    assert [line.split() for line in data.summary().splitlines()] == [
        ["language", "kept", "too", "long", "empty", "truncated", "tokens/character"],     # no pairs, so none equal
        ["deu", "2", "1", "0", "1", "1.333"], ["fra", "0", "0", "1", "0", "0.000"]]


def test_nothing_left_is_an_error_and_leaves_nothing(tmp_path):
    """There is no data set in which every token is masked."""
    for entry in ({"instruction": "a", "output": ""}, {"instruction": "a" * 600, "output": "b"}):
        with pytest.raises(UserError, match="one.jsonl: nothing left to learn from: (records|pairs): 0 kept; left out"):
            one(tmp_path, entry=entry)
    with pytest.raises(UserError, match="one.jsonl, line 1: no field 'output'"):
        one(tmp_path, entry={"instruction": "a"})
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())
    no_eos = Bytes()
    no_eos.eos_id = None
    with pytest.raises(UserError, match="no end-of-sequence"):
        one(tmp_path, no_eos)


# The cache

def test_rebuilt_exactly_when_its_inputs_change(tmp_path, monkeypatch):
    built = []
    build = token_cache._write
    monkeypatch.setattr(token_cache, "_write", lambda *args: (built.append(1), build(*args)))

    def builds(**changes):
        before = len(built)
        one(tmp_path, **changes)
        return len(built) - before

    assert builds() == 1 and builds() == 0
    assert builds(train_on_prompt=True) == 0                      # only read otherwise
    os.utime(tmp_path / "one.jsonl", (0, 0))
    assert builds() == 0                                          # same bytes
    assert builds(max_length=511) == 1
    assert builds(too_long="truncate") == 1
    assert builds(tokenizer=Bytes(fingerprint="other")) == 1
    assert builds(entry={"instruction": "Say ö", "input": "x", "output": "üü"}) == 1
    assert builds() == 0                                          # the first is still there
    pair = {"instruction": "a", "output": "b", "chosen": "b", "rejected": "c"}
    assert builds(entry=pair) == 1 and builds(entry=pair, kind=PreferenceData) == 1
    monkeypatch.setattr(prompts, "REQUESTS", tmp_path / "one.jsonl")
    assert builds(entry=pair) == 1


def test_the_key_names_what_decides_the_ids(tmp_path):
    """Whoever changes the ids or files that the same inputs give raises FORMAT, so that no old cache is read: then
    write the new digest here, too."""
    sft = write(tmp_path / "sft.jsonl", [
        {"instruction": "Sag ü", "input": "x", "output": "üü", "language": "de"}, {"instruction": "a", "output": " "},
        {"instruction": "Long", "output": "x" * 400, "language": "Klingon"}])
    pairs = write(tmp_path / "pairs.jsonl", [
        {"instruction": "Nenne", "chosen": "oui", "rejected": "yes!", "language": "deu", "response_language": "fr"},
        {"prompt": "p" * 500, "chosen": "a", "rejected": "b"}, {"instruction": "a", "chosen": "b", "rejected": "b"}])
    hashed = hashlib.sha256()
    for data in (SFTData(sft, Bytes(), 500, tmp_path, too_long="truncate"), SFTData(sft, Bytes(), 500, tmp_path),
                 PreferenceData(pairs, Bytes(), 400, tmp_path, too_long="truncate")):
        for name in ARRAYS:
            hashed.update(getattr(data, name).astype(np.int64).tobytes())
        hashed.update(json.dumps([data.language_names, sorted(map(list, data.report.items()), key=str)],
                                 sort_keys=True).encode())
    assert (token_cache.FORMAT, hashed.hexdigest()[:16]) == (4, "2edf14500ad360e5")


def test_what_is_odd_is_said_once_a_file_with_a_count(tmp_path, monkeypatch):
    """Tags of no known language, and texts that hold a chat template or the tokenizer's special tokens."""
    monkeypatch.setattr(token_cache, "CHUNK", 2)
    plain, klingon = {"instruction": "a", "output": "b", "language": "pt-BR"}, {"instruction": "a", "output": "b"}
    texts = ["<|im_start|>user", "[INST] a [/INST]", "</s>", "<start_of_turn>x", "### Instruction:", "if a < b | c > d"]
    named = klingon | {"language": "Klingon"}
    first = write(tmp_path / "a.jsonl", [plain, named, plain, named,
                                         *({"instruction": text, "output": "b"} for text in texts)])
    second = write(tmp_path / "b.jsonl", [{"messages": []}, plain, {"instruction": "a", "output": "x</s>"}])
    for workers in (1, 2):
        data = SFTData([first, second], Bytes(), 400, tmp_path / f"cache{workers}", workers)
        markup = "records that hold a chat template or special tokens, which are read as mere text"
        assert sorted(data.remarks) == [
            f"{first}: {markup}: 5, the first in line 5: '<|im_start|>'",
            f"{first}: records that name the language 'Klingon', which is not known, so that no request can be made "
            "for it: 2, the first in line 2",
            f"{second}: records that are chats of more or less than one exchange, which are left out: 1, the first in "
            "line 1",
            f"{second}: {markup}: 1, the first in line 3: '</s>'"]
        assert data.summary().endswith("\n".join(data.remarks)) and len(data) == 12
        assert sorted(data.report) == ["Klingon", "por", "und"]
    pair = {"instruction": "Say", "chosen": "a", "rejected": "b", "language": "en"}
    tags = ("tl", "fil", "tlh", "tlh", "en")
    path = write(tmp_path / "pairs.jsonl", [pair | {"response_language": tag} for tag in tags]
                 + [{"prompt": "<|begin|>Hello<|end|>", "chosen": "there<|end|>", "rejected": "no<|end|>"}])
    data = PreferenceData(path, Bytes(), 400, tmp_path / "cache")
    assert data.language_names == ["eng>tgl", "eng>tlh", "eng", "und"]
    assert [remark.split(": ", 1)[1] for remark in data.remarks] == [
        "records that name the language 'tlh', which is not known, so that no request can be made for it: 2, the first "
        "in line 3", f"{markup}: 1, the first in line 6: '<|begin|>'"]
    asked = prompts.alpaca("Say Please return the results in Tagalog.")
    assert data.read(0)[0].tolist() == Bytes().encode_prompt(asked)
    assert data.read(2)[0].tolist() == Bytes().encode_prompt(prompts.alpaca("Say"))
    many = write(tmp_path / "many.jsonl", [klingon | {"language": f"xx{k}"} for k in range(50)])
    assert len(SFTData(many, Bytes(), 400, tmp_path / "cache").remarks) == 21


def test_several_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 7)
    paths = [write(tmp_path / "a.jsonl", some_records(40)), write(tmp_path / "b.jsonl", some_records(30, seed=1))]
    alone = SFTData(paths, Bytes(), 400, tmp_path / "alone", workers=1)
    pooled = SFTData(paths, Bytes(), 400, tmp_path / "pooled", workers=2)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(alone, name), getattr(pooled, name))
    assert alone.report == pooled.report and alone.language_names == pooled.language_names
    assert pooled.where(45) == f"{paths[1]}, line 6" and not any(c["too_long"] for c in pooled.report.values())


def _open_in_child(path, cache, log):
    build = token_cache._write

    def counted(*args):
        with open(log, "a") as file:
            file.write("built\n")
        build(*args)

    token_cache._write = counted
    assert len(SFTData(path, Slow(), 400, cache)) == 10


def test_of_many_processes_one_builds(tmp_path):
    path = write(tmp_path / "a.jsonl", some_records(10))
    fork = multiprocessing.get_context("fork")
    args = (path, tmp_path / "cache", tmp_path / "log")
    children = [fork.Process(target=_open_in_child, args=args) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_builder_that_was_killed_leaves_no_cache(tmp_path):
    path = write(tmp_path / "a.jsonl", some_records(200))
    child = multiprocessing.get_context("fork").Process(target=SFTData, args=(path, Slow(), 400, tmp_path / "cache"))
    child.start()
    while not list(tmp_path.glob("cache/.*.partial/tokens.bin")):
        time.sleep(0.01)
    child.kill()
    child.join(60)
    assert len(SFTData(path, Bytes(), 400, tmp_path / "cache")) == 200
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == ["", ".lock"]


def test_a_disk_without_locks_is_refused(tmp_path, monkeypatch, capsys):
    """Two processes would build one cache there, as on some network file systems. It is said once."""
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="cache cannot be written: No locks available; --cache names another directory"):
        one(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_a_built_cache_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    data = one(tmp_path)
    monkeypatch.setattr(token_cache, "locked", None)
    assert len(one(tmp_path)) == len(data)


@pytest.mark.parametrize("name", ["tokens.bin", "records.npy", "meta.json"])
def test_a_file_that_a_power_cut_left_empty_is_damage(tmp_path, name):
    data = one(tmp_path)
    (tmp_path / "cache" / data.key / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{data.key}: a damaged token cache .*remove it"):
        one(tmp_path)


def test_a_killed_worker_is_told(tmp_path):
    with pytest.raises(UserError, match="a process that tokenised was killed, perhaps for lack of memory"):
        SFTData(write(tmp_path / "a.jsonl", some_records(20)), Fatal(), 400, tmp_path / "cache", workers=2)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    path = write(tmp_path / "a.jsonl", some_records(3000))
    context = multiprocessing.get_context("fork")
    child = context.Process(target=SFTData, args=(path, Slow(), 400, tmp_path / "cache"), kwargs={"workers": 2})
    child.start()
    while len(workers := children_of(child.pid)) < 2:
        time.sleep(0.05)
    child.kill()
    child.join(60)
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            return
        time.sleep(0.05)
    raise AssertionError(f"{workers} still run")


def children_of(pid: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_damage_and_a_full_disk_are_named(tmp_path, monkeypatch):
    data = one(tmp_path)
    with open(tmp_path / "cache" / data.key / "tokens.bin", "ab") as file:
        file.truncate(20)
    with pytest.raises(UserError, match=f"{data.key}: a damaged token cache .*remove it"):
        one(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        one(tmp_path, max_length=300)
    assert not list((tmp_path / "cache").glob(".*.partial"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the token cache cannot be written: Not a directory"):
        SFTData(tmp_path / "one.jsonl", Bytes(), 512, tmp_path / "file" / "cache")


def test_ids_beyond_16_bits(tmp_path):
    class Large(Bytes):
        vocab_size, eos_id = 250_880, 250_000

    assert one(tmp_path, Large())[0][1][-1] == 250_000


# Batches

@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=80), st.integers(1, 6), st.integers(1, 50))
def test_packing_keeps_every_document_and_the_capacity(lengths, open_rows, window):
    lengths = np.array(lengths, int)
    with mock.patch.multiple(stream, OPEN_ROWS=open_rows, WINDOW=window):
        order, bounds = pack(lengths, 30)
    assert sorted(order) == list(range(len(lengths))) and bounds[0] == 0 and bounds[-1] == len(lengths)
    rows = [lengths[order[a:b]].sum() for a, b in zip(bounds, bounds[1:])]
    assert all(0 < row <= 30 for row in rows)


def test_packing_fills_rows():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(120) - 0.32, 0.8, 40_000), 8, 512).astype(int)
    order, bounds = pack(lengths, 512)
    assert lengths.sum() / (512 * (len(bounds) - 1)) > 0.97


def all_ranks(data, step, world, micro_batch_size=2, **options):
    options = {"seed": 3, "batch_size": 8, "max_length": 512} | options
    return [Stream(data, micro_batch_size=micro_batch_size, rank=rank, world=world, **options).batch(step)
            for rank in range(world)]


def test_every_split_covers_the_same_global_batch_once(sft):
    """The count is the global batch's, whatever the number of ranks and micro-batches."""
    for step in (0, 5, 1000):
        reference = None
        for world, micro_batch_size in [(1, 8), (1, 3), (2, 2), (4, 1), (3, 4)]:
            shares = all_ranks(sft, step, world, micro_batch_size)
            batches = [batch for share in shares for batch in share.micro_batches]
            assert len({len(share.micro_batches) for share in shares}) == 1      # or a collective would hang
            records = sorted(record for batch in batches for record in batch.records)
            count = sum((batch.labels != IGNORE).sum().item() for batch in batches)
            assert {share.count for share in shares} == {count}
            reference = reference or (records, count)
            assert (records, count) == reference


def test_an_epoch_is_every_record_once_in_steps_of_even_size(sft):
    for max_length in (512, None):
        stream = Stream(sft, 0, 8, 8, max_length)
        for epoch in (0, 1):
            steps = [stream.batch(epoch * stream.steps_per_epoch + k) for k in range(stream.steps_per_epoch)]
            records = [record for step in steps for batch in step.micro_batches for record in batch.records]
            assert sorted(records) == list(range(len(sft)))
        if max_length is None:
            sizes = [len(step.micro_batches[0].records) for step in steps]
            assert stream.steps_per_epoch == 38 and set(sizes) == {7, 8}


def test_order_is_a_function_of_seed_and_step_alone(sft):
    def order(seed, step):
        return [batch.records for batch in Stream(sft, seed, 8, 2, 512).batch(step).micro_batches]

    stream = Stream(sft, 3, 8, 2, 512)
    for step in (40, 2, 3, 41, 0):      # back and forth over epochs
        assert [batch.records for batch in stream.batch(step).micro_batches] == order(3, step)
    assert order(3, 0) != order(4, 0) and order(3, 0) != order(3, stream.steps_per_epoch)


def test_batches_are_documents_end_to_end(sft):
    for share in all_ranks(sft, 1, 2):
        for batch in share.micro_batches:
            assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
            assert sum(batch.documents) == len(batch.input_ids) == len(batch.labels) <= 2 * 512
            start = 0
            for record, length in zip(batch.records, batch.documents, strict=True):
                inputs, labels = sft[record]
                np.testing.assert_array_equal(batch.input_ids[start:start + length], inputs)
                np.testing.assert_array_equal(batch.labels[start:start + length], labels)
                start += length


def test_a_rank_with_nothing_left_takes_its_turn(sft):
    shares = all_ranks(sft, 0, 3, batch_size=1, max_length=None)
    assert [len(share.micro_batches) for share in shares] == [1, 1, 1]
    empty = shares[2].micro_batches[0]
    assert empty.records == [] and empty.documents == [1] and empty.labels.tolist() == [IGNORE]
    assert shares[2].count == shares[0].count > 0


def test_rows_too_short_for_a_record_are_refused(sft):
    with pytest.raises(UserError, match="rows of 100 tokens cannot hold the longest record, of"):
        Stream(sft, 0, 8, 2, 100)
    assert Stream(sft, 0, 8, 2, int(sft.lengths.max())).batch(0).count


def test_absurd_numbers_are_refused(sft):
    for wrong in ({"batch_size": 0}, {"micro_batch_size": -1}, {"temperature": 0.0}):
        key, = wrong
        with pytest.raises(UserError, match=f"{key}: found .*, expected a .*number (above 0|of at least 1)"):
            Stream(**{"data": sft, "seed": 0, "batch_size": 8, "micro_batch_size": 2} | wrong)


def test_temperature_evens_languages_out(sft):
    n = {language: (sft.languages == k).sum() for k, language in enumerate(sft.language_names)}
    for temperature in (1.0, 2.0, 1e9):
        stream = Stream(sft, 0, 8, 8, 512, temperature=temperature)
        drawn = Counter(record for k in range(stream.steps_per_epoch) for batch in stream.batch(k).micro_batches
                        for record in batch.records)
        assert drawn.total() == len(sft)
        weights = {language: size ** (1 / temperature) for language, size in n.items()}
        for k, language in enumerate(sft.language_names):
            times = [drawn[record] for record in np.flatnonzero(sft.languages == k)]
            assert abs(sum(times) - len(sft) * weights[language] / sum(weights.values())) <= 1
            assert max(times) - min(times) <= 1
    most = np.flatnonzero(sft.languages == sft.language_names.index("deu"))  # others of these in every epoch
    assert len(np.intersect1d(most, np.concatenate([stream._plan(epoch)[0] for epoch in range(9)]))) > 0.95 * len(most)


def test_held_out_records_are_never_trained_on(sft):
    train, held = hold_out(sft, per_language=5)
    assert sorted([*train, *held]) == list(range(len(sft)))
    sizes = np.bincount(sft.languages)
    assert np.bincount(sft.languages[held]).tolist() == [min(5, size // 10) for size in sizes]
    stream = Stream(sft, 0, 8, 8, 512, records=train)
    seen = {r for k in range(stream.steps_per_epoch) for b in stream.batch(k).micro_batches for r in b.records}
    assert seen == set(train.tolist())
    for world in (1, 2, 3):
        shares = [list(in_order(sft, held, 600, rank, world)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(r for share in shares for b in share for r in b.records) == held.tolist()
        assert all(len(b.input_ids) <= 600 for share in shares for b in share)
    assert list(in_order(sft, held[:0], 600)) == [] and len(list(in_order(sft, held, 10**12))) == 1


def test_few_records_of_each_language_are_held_out_from_all():
    class Few:
        languages = np.repeat(np.arange(30), 5)
        language_names = list(map(str, range(30)))

        def __len__(self):
            return len(self.languages)

    train, held = hold_out(Few(), per_language=20)
    assert len(held) == 15 and sorted([*train, *held]) == list(range(150))
    assert not np.array_equal(hold_out(Few(), 20, seed=1)[1], held)
    most = max(np.bincount(hold_out(Few(), 20, seed)[1] // 5).max() for seed in range(5))
    assert most > 1 == max(np.bincount(hold_out(Few(), 1, seed)[1] // 5).max() for seed in range(5))
    assert not len(hold_out(Few(), 0)[1])


def test_many_languages_are_held_out_from_in_one_pass():
    class Lookups(np.ndarray):
        count = 0

        def __getitem__(self, index):
            Lookups.count += 1
            return super().__getitem__(index)

    class Many:
        languages = np.tile(np.arange(50), 20).view(Lookups)
        language_names = list(map(str, range(50)))

        def __len__(self):
            return len(self.languages)

    _, held = hold_out(Many(), per_language=2)
    assert np.bincount(held % 50).tolist() == [2] * 50 and Lookups.count < 10


# What a model makes of them

@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = dict(model_type="llama", vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    model = Llama(LlamaConfig.from_dict(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_no_step_of_a_later_epoch_is_empty(sft):
    """Packing may need fewer rows than in the first epoch: then a row is cut, and every record still comes once."""
    rows = [len(Stream(sft, seed, 1, 1, 512)._plan(epoch)[1]) - 1 for seed in range(6) for epoch in range(3)]
    assert any(rows[i] > min(rows[i:i + 3]) or len(set(rows[i:i + 3])) > 1 for i in range(0, 18, 3))
    for seed in range(6):
        stream = Stream(sft, seed, 1, 1, 512)
        for epoch in range(3):
            steps = [stream.batch(epoch * stream.steps_per_epoch + step) for step in range(stream.steps_per_epoch)]
            assert all(step.count for step in steps)
            records = [record for step in steps for batch in step.micro_batches for record in batch.records]
            assert sorted(records) == list(range(len(sft)))


def test_any_temperature_draws(sft):
    for temperature in (0.001, 1000.0):
        assert len(Stream(sft, 0, 8, 8, temperature=temperature)._plan(0)[0]) == len(sft)


@torch.no_grad()
def test_a_packed_document_does_not_touch_its_neighbours(sft, model):
    """Another first document leaves the logits of all others bit-equal."""
    batch = Stream(sft, 0, 8, 8, 512).batch(0).micro_batches[0]
    first = batch.documents[0]
    assert len(batch.documents) > 2
    logits = model(batch.input_ids, Packed(batch.documents))
    batch.input_ids[:first] = torch.randint(3, 259, (first,))
    perturbed = model(batch.input_ids, Packed(batch.documents))
    assert not torch.equal(logits[:first], perturbed[:first]) and torch.equal(logits[first:], perturbed[first:])


@torch.no_grad()
def test_an_answer_is_the_sum_of_its_labels(sft, model):
    batch = Stream(sft, 0, 8, 8, 512).batch(0).micro_batches[0]
    expected = [part.sum() for part in label_logps(model, batch).split(batch.documents)]
    torch.testing.assert_close(answer_logps(model, batch), torch.stack(expected))
    assert answer_logps(model, collate(sft, [])).shape == (0,)


@torch.no_grad()
def test_a_pair_scores_as_its_two_sequences_do(tmp_path, model):
    entries = [PAIR, PAIR | {"chosen": "non, merci", "rejected": "?"}]
    data = PreferenceData(write(tmp_path / "a.jsonl", entries), Bytes(), 400, tmp_path / "cache")
    batch = collate(data, [1, 0])
    sums = answer_logps(model, batch)
    for k, record in enumerate([1, 0]):
        prompt, *answers = map(torch.from_numpy, data.read(record))
        for side, answer in enumerate(answers):
            whole = torch.cat([prompt, answer])
            expected = model(whole[None, :-1])[0].log_softmax(-1)[len(prompt) - 1:].gather(1, answer[:, None]).sum()
            torch.testing.assert_close(sums[2 * k + side], expected, rtol=1e-5, atol=1e-5)


# Preferences

def test_a_pairs_prompt_and_answers_are_tokenised_apart(tmp_path):
    train_sentencepiece([f"Response:yes {k}" for k in range(300)], tmp_path / "tokenizer.model", 400)
    tokenizer = load_tokenizer(tmp_path)
    entry = {"instruction": "a", "chosen": "yes 12", "rejected": "yes 13"}
    prompt, *answers = one(tmp_path, tokenizer, kind=PreferenceData, entry=entry).read(0)
    assert prompt.tolist() == tokenizer.encode(prompts.alpaca("a"), add_special_tokens=True)
    for answer, text in zip(answers, ("yes 12", "yes 13"), strict=True):
        assert answer.tolist() == tokenizer.encode(text) + [tokenizer.eos_id]
        together = tokenizer.encode(prompts.alpaca("a") + text, add_special_tokens=True)
        assert together != [*prompt, *answer[:-1]]


def test_a_prompt_of_which_the_tokenizer_leaves_nothing(tmp_path):
    class Dropping(Bytes):
        def encode(self, text, add_special_tokens=False):
            return super().encode(text.replace("\u200b", ""), add_special_tokens)

    path = write(tmp_path / "a.jsonl", [{"prompt": "\u200b", "chosen": "a", "rejected": "b"},
                                        {"prompt": "x", "chosen": "a", "rejected": "b"}])
    data = PreferenceData(path, Dropping(prefix=()), 400, tmp_path / "cache")
    assert len(data) == 1 and sum(data.report.values(), Counter())["empty"] == 1


def test_answers_are_compared_as_the_tokenizer_sees_them(tmp_path):
    class Folding(Bytes):
        def encode(self, text, add_special_tokens=False):
            return super().encode(unicodedata.normalize("NFKC", text).replace("\u200b", ""), add_special_tokens)

    entries = [{"instruction": "a", "chosen": c, "rejected": r, "output": c}
               for c, r in (("ﬁ", "fi"), ("b", "\u200b"), ("b", "c"), ("\u200b", "c"))]
    path = write(tmp_path / "a.jsonl", entries)
    data = PreferenceData(path, Folding(), 400, tmp_path / "cache")
    report = data.report["und"]
    assert (len(data), report["equal"], report["empty"]) == (1, 1, 2)
    assert data.total() == "pairs: 1 kept; left out 0 too long, 2 empty, 1 equal; 0 truncated"
    sft = SFTData(path, Folding(), 400, tmp_path / "cache")
    assert (len(sft), sft.report["und"]["empty"]) == (3, 1)


def test_one_language_under_any_of_its_names(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "language": name}
                                        for name in ("deu", "de", "German", "zh", "Klingon", None, "")])
    data = SFTData(path, Bytes(), 900, tmp_path)
    assert [data.language_names[k] for k in data.languages] == ["deu"] * 3 + ["zho_simpl", "Klingon", "und", "und"]


PAIR = {"instruction": "Say", "chosen": "oui", "rejected": "yes!", "language": "eng", "response_language": "fra"}


def test_a_pair_is_one_document_of_two_branches(tmp_path):
    data = one(tmp_path, kind=PreferenceData, entry=PAIR)
    text = prompts.alpaca("Say Please return the results in French.")
    prompt, chosen, rejected = Bytes().encode(text, True), Bytes().encode("oui") + [2], Bytes().encode("yes!") + [2]
    batch = collate(data, [0, 0])
    trunk = len(prompt) - 1
    assert batch.documents == [(trunk, [4, 5])] * 2 and data.lengths[0] == trunk + 9
    inputs, labels = batch.input_ids[:trunk + 9].tolist(), batch.labels[:trunk + 9].tolist()
    assert inputs == prompt + chosen[:-1] + prompt[-1:] + rejected[:-1]
    assert labels == [IGNORE] * trunk + chosen + rejected
    assert data.language_names == ["eng>fra"]
    assert one(tmp_path, kind=PreferenceData, entry=PAIR | {"response_language": "en"}).language_names == ["eng"]
    assert Stream(data, 0, 4, 2).batch(0).count == 1
    empty = collate(data, [])
    assert empty.documents == [1] and empty.labels.tolist() == [IGNORE]


def test_pairs_without_a_difference_are_left_out_and_counted(tmp_path):
    room = len(Bytes().encode(prompts.alpaca("a"), True))
    entries = [{"instruction": "a", "chosen": c, "rejected": r} for c, r in
               [("b", "c"), ("b", "b "), ("", "c"), ("b", " "), ("x" * 200 + "1", "x" * 200 + "2"),
                ("1" + "x" * 200, "2" + "x" * 200)]]
    entries.append({"prompt": " ", "chosen": "b", "rejected": "c"})
    path = write(tmp_path / "a.jsonl", entries)
    data = PreferenceData(path, Bytes(), room + 30, tmp_path / "cache")
    report = data.report["und"]
    assert len(data) == kept(report) == 1
    assert [report[name] for name in ("records", "equal", "empty", "too_long", "truncated")] == [7, 1, 3, 2, 0]
    data = PreferenceData(path, Bytes(), room + 30, tmp_path / "cache", too_long="truncate")
    report = data.report["und"]
    assert len(data) == kept(report) == 2
    assert [report[name] for name in ("records", "equal", "empty", "too_long", "truncated")] == [7, 1, 3, 1, 1]
    prompt, chosen, rejected = data.read(1)
    half = (room + 30) // 2
    whole = Bytes().encode(prompts.alpaca("a"), True)
    assert prompt.tolist() == [1] + whole[-(half - 1):] and len(prompt) == half      # BOS and the end, to half
    assert len(prompt) + len(chosen) == len(prompt) + len(rejected) <= room + 30 and chosen[0] != rejected[0]


def test_how_much_of_a_long_pair_is_kept(tmp_path):
    """All of one that just fits; of another the whole prompt if half the room holds it, and no BOS that was not there.
    """
    tokenizer = Bytes(prefix=(), fingerprint="without BOS")
    prompt, x, n = tokenizer.encode(prompts.alpaca("a")), ord("x") + 3, len(prompts.alpaca("a"))

    def read(length, max_length):
        entry = {"instruction": "a", "chosen": "x" * length, "rejected": "?"}
        data = one(tmp_path, tokenizer, max_length, PreferenceData, entry, too_long="truncate")
        counts = Counter(records=1, tokens=length + 1, characters=length + 1, truncated=int(n + length >= max_length))
        assert data.report["und"] == counts
        return [part.tolist() for part in data.read(0)[:2]]

    assert read(9, n + 10) == [prompt, [x] * 9 + [2]]
    half = (n + 9) // 2
    assert read(9, n + 9) == [prompt[-half:], [x] * 9 + [2]]
    assert read(3 * n, 2 * n + 20) == [prompt, [x] * (n + 20)]
    with pytest.raises(UserError, match="nothing left to learn from: (records|pairs): 0 kept; left out"):
        read(9, 1)


def test_a_request_nobody_wrote_names_the_line(tmp_path):
    with pytest.raises(UserError, match="one.jsonl, line 1: no German request names Wolof"):
        one(tmp_path, kind=PreferenceData, entry=PAIR | {"language": "deu", "response_language": "wol"})


def test_pairs_are_dealt_once_over_any_split(tmp_path):
    entries = [{"instruction": f"Say {k}", "chosen": "a" * (k % 7 + 1), "rejected": "b" * (k % 5 + 1)}
               for k in range(30)]
    data = PreferenceData(write(tmp_path / "a.jsonl", entries), Bytes(), 400, tmp_path / "cache")
    shares = {world: all_ranks(data, 2, world, max_length=None) for world in (1, 2, 4)}
    records = {world: sorted(r for share in each for b in share.micro_batches for r in b.records)
               for world, each in shares.items()}
    assert records[1] == records[2] == records[4] and len(records[1]) == shares[1][0].count == shares[4][3].count == 7
