"""One record -> token ids and labels.

A document of L tokens is read as L - 1 inputs and the L - 1 tokens they predict: labels come already shifted, and -100
where nothing is to be learnt.
"""

import functools
from collections import Counter

import numpy as np

from minixllm.data import prompts
from minixllm.data.records import Instruction, Preference, read_instructions, read_preferences
from minixllm.data.token_cache import TokenCache, kept
from minixllm.errors import UserError
from minixllm.languages import find

IGNORE = -100      # the label of a token that nobody has to predict
UNKNOWN = "und"    # BCP-47's "undetermined": the language of records that name none


# Tokenising one record

def encode_instruction(record: Instruction, tokenizer, max_length: int, too_long: str):
    """-> (language, [prompt ids, answer ids with EOS] or None where left out, counts of this record).

    Prompt and answer are tokenised apart, so that no token spans their boundary; the prompt begins with BOS exactly
    when the model's own tokenizer adds one. A record of more than max_length tokens is left out ("drop"), or keeps its
    prompt and as much of its answer as fits, without EOS ("truncate").
    """
    language = _language(record.language)
    answer = tokenizer.encode(record.output) + [tokenizer.eos_id]
    if not record.output.strip() or len(answer) == 1:  # to the tokenizer, which may drop characters
        return language, None, Counter(records=1, empty=1)
    prompt = tokenizer.encode_prompt(prompts.alpaca(record.instruction, record.input))
    counts = Counter(records=1, tokens=len(answer) - 1, characters=len(record.output))
    if len(prompt) + len(answer) > max_length:
        if too_long == "drop" or len(prompt) >= max_length:
            return language, None, counts + Counter(too_long=1)
        counts["truncated"] = 1
        answer = answer[:max_length - len(prompt)]
    return language, [prompt, answer], counts


def encode_preference(record: Preference, tokenizer, max_length: int, too_long: str):
    """-> (languages, [prompt ids, chosen ids, rejected ids] or None where left out, counts), as encode_instruction.

    A pair is too long when its prompt and its longer answer have more than max_length tokens. "truncate" then keeps of
    the prompt, where that is over half of max_length, BOS and its end (where the request stands) to that half, and the
    beginnings of the answers; answers that no longer differ are left out as too long.
    """
    names = [_language(name) for name in (record.language, record.response_language) if name] or [UNKNOWN]
    language = ">".join(dict.fromkeys(names))
    text = prompts.preference(record)
    prompt = tokenizer.encode_prompt(text)
    answers = [tokenizer.encode(answer) + [tokenizer.eos_id] for answer in (record.chosen, record.rejected)]
    # in text, or to the tokenizer, which may drop characters or turn some into others
    if not all(map(str.strip, (text, record.chosen, record.rejected))) or not prompt or min(map(len, answers)) == 1:
        return language, None, Counter(records=1, empty=1)
    if record.chosen.strip() == record.rejected.strip() or answers[0] == answers[1]:
        return language, None, Counter(records=1, equal=1)
    counts = Counter(records=1, tokens=sum(map(len, answers)) - 2, characters=len(record.chosen) + len(record.rejected))
    if len(prompt) + max(map(len, answers)) > max_length:
        half = max(1, max_length // 2)
        if len(prompt) > half:
            bos = prompt[:1] if prompt[0] == tokenizer.bos_id else []
            prompt = bos + prompt[len(prompt) - half + len(bos):]
        answers = [answer[:max_length - len(prompt)] for answer in answers]
        if too_long == "drop" or answers[0] == answers[1]:
            return language, None, counts + Counter(too_long=1)
        counts["truncated"] = 1
    return language, [prompt, *answers], counts


@functools.cache
def _language(name: str | None) -> str:
    """One name for what "de", "German" and "deu" call: the FLORES-101 code where there is one."""
    try:
        return UNKNOWN if not name else find(name).code
    except UserError:
        return name


# Data sets

class SFTData(TokenCache):
    """Instructions with their answers, from Alpaca-format files (`records.read_instructions`).

    too_long: what happens to a record of more than max_length tokens, "drop" or "truncate" (see encode_instruction).
    train_on_prompt: the paper's way, in which every token but the first is learnt; otherwise answers and their EOS are.
    Raises UserError for files that cannot be read, and when no record is left.
    """

    def __init__(self, paths, tokenizer, max_length: int, cache_dir, too_long: str = "drop",
                 train_on_prompt: bool = False, workers: int | None = None):
        settings = {"max_length": max_length, "too_long": too_long}
        super().__init__(paths, tokenizer, cache_dir, read_instructions, encode_instruction, settings, workers)
        self.train_on_prompt = train_on_prompt
        self.lengths = self.segments.sum(1, dtype=np.int32) - 1
        self.supervised = self.lengths if train_on_prompt else self.segments[:, 1]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels), int64 of the record's length."""
        prompt, answer = self.read(index)
        ids = np.concatenate([prompt, answer])
        labels = ids[1:].copy()
        if not self.train_on_prompt:
            labels[:len(prompt) - 1] = IGNORE
        return ids[:-1], labels

    def document(self, index: int) -> int:
        return int(self.lengths[index])

    def count(self, records) -> int:
        """What the loss of these records is divided by: their supervised tokens."""
        return int(self.supervised[records].sum(dtype=np.int64))


class PreferenceData(TokenCache):
    """Pairs of answers, from files as `records.read_preferences` takes them.

    A pair is one document of two branches. Its trunk is the prompt but for the last token; the branches are that last
    token followed by the chosen answer, and by the rejected one. What is left out or cut: see encode_preference.
    """

    def __init__(self, paths, tokenizer, max_length: int, cache_dir, too_long: str = "drop",
                 workers: int | None = None):
        settings = {"max_length": max_length, "too_long": too_long}
        super().__init__(paths, tokenizer, cache_dir, read_preferences, encode_preference, settings, workers)
        self.lengths = self.segments.sum(1, dtype=np.int32) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels), int64 of the pair's length: trunk, chosen branch, rejected branch."""
        prompt, chosen, rejected = self.read(index)
        ids = np.concatenate([prompt, chosen[:-1], prompt[-1:], rejected[:-1]])
        return ids, np.concatenate([np.full(len(prompt) - 1, IGNORE), chosen, rejected])

    def total(self) -> str:
        """What was kept, left out and cut, over all languages."""
        counts = sum(self.report.values(), Counter())
        return (f"{kept(counts):,} pairs; left out {counts['too_long']:,} too long, {counts['empty']:,} empty, "
                f"{counts['equal']:,} equal; {counts['truncated']:,} truncated")

    def document(self, index: int) -> tuple[int, list[int]]:
        prompt, *answers = self.segments[index].tolist()
        return prompt - 1, answers

    def count(self, records) -> int:
        """What the loss of these records is divided by: the number of pairs."""
        return len(records)
