"""One record -> token ids and labels.

A document of L tokens is read as L - 1 inputs and the L - 1 tokens they predict. Labels come already shifted: the label
of an input is the token after it, or IGNORE where nothing is to be learnt.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minixllm import languages
from minixllm.data import prompts
from minixllm.data.records import Instruction, Preference, read_instructions, read_preferences

IGNORE = -100      # the label of a token that nobody has to predict
UNKNOWN = "und"    # BCP-47's "undetermined": the language of records that name none
# What a chat template leaves in a text, or Alpaca's own; the tokenizer's special tokens come on top.
MARKUP = (r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>"
          r"|### (?:Instruction|Response):")


class Encoded(NamedTuple):
    """What becomes of one record.

    segments: the ids of its prompt and of each answer, or None where the record is left out. counts: see
    `token_cache.TokenCache.report`. remarks: (what is odd about it, for example this), to be said once a file.
    """

    language: str
    segments: list[list[int]] | None
    counts: Counter
    remarks: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Instructions:
    """Instruction tuning: records are Alpaca's, and the answer with its EOS is learnt.

    max_length: tokens of the longest record. too_long: whether a longer one is left out ("drop"), or keeps its prompt
    and as much of its answer as fits, without EOS ("truncate"). train_on_prompt: learn every token but the first, as
    the paper did.
    """

    max_length: int
    too_long: str = "drop"
    train_on_prompt: bool = False

    unit = "records"
    read = staticmethod(read_instructions)

    def encode(self, record: Instruction, tokenizer) -> Encoded:
        """Prompt and answer are tokenised apart, so that no token spans their boundary. The prompt begins with BOS
        exactly when the model's own tokenizer adds one.
        """
        language, remarks = _languages(record.language)
        remarks += _markup(tokenizer, record.instruction, record.input, record.output)
        answer = tokenizer.encode(record.output) + [tokenizer.eos_id]
        if not record.output.strip() or len(answer) == 1:  # a tokenizer may drop characters
            return Encoded(language, None, Counter(records=1, empty=1), remarks)
        prompt = tokenizer.encode_prompt(prompts.alpaca(record.instruction, record.input))
        counts = Counter(records=1, tokens=len(answer) - 1, characters=len(record.output))
        if len(prompt) + len(answer) > self.max_length:
            if self.too_long == "drop" or len(prompt) >= self.max_length:
                return Encoded(language, None, counts + Counter(too_long=1), remarks)
            counts["truncated"] = 1
            answer = answer[:self.max_length - len(prompt)]
        return Encoded(language, [prompt, answer], counts, remarks)

    def example(self, segments: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels), int64 of the record's length."""
        ids = np.concatenate(segments)
        labels = ids[1:].copy()
        if not self.train_on_prompt:
            labels[:len(segments[0]) - 1] = IGNORE
        return ids[:-1], labels

    def document(self, segments: list[int]) -> int:
        """The record as `attention.Packed` takes it, from the lengths of its segments: its length."""
        return sum(segments) - 1

    def counted(self, segments: np.ndarray) -> np.ndarray:
        """What each record adds to the count that a loss is divided by, (n,) from (n, 2): its supervised tokens."""
        return segments.sum(1, dtype=np.int32) - 1 if self.train_on_prompt else segments[:, 1]


@dataclass(frozen=True)
class Preferences:
    """Preference optimisation: a pair is one document of two branches, so that its prompt is computed once.

    Its trunk is the prompt but for the last token; the branches are that last token followed by the chosen answer, and
    by the rejected one. A pair is too long when its prompt and its longer answer have more than max_length tokens.
    "truncate" then cuts a prompt of over half of max_length to that half: BOS, and its end, where the request stands.
    The answers keep their beginnings; a pair whose answers no longer differ is left out as too long.
    """

    max_length: int
    too_long: str = "drop"

    unit = "pairs"

    @staticmethod
    def read(path, progress, leave_out):
        return read_preferences(path, progress)

    def encode(self, record: Preference, tokenizer) -> Encoded:
        language, remarks = _languages(record.language, record.response_language)
        text, chosen, rejected = prompts.preference(record), record.chosen, record.rejected
        own_text = (record.instruction, record.input) if record.prompt is None else (record.prompt,)
        remarks += _markup(tokenizer, *own_text, chosen, rejected)
        prompt = tokenizer.encode_prompt(text)
        answers = [tokenizer.encode(answer) + [tokenizer.eos_id] for answer in (chosen, rejected)]
        # empty or equal as text, or to the tokenizer, which may drop characters or turn some into others
        if not all(map(str.strip, (text, chosen, rejected))) or not prompt or min(map(len, answers)) == 1:
            return Encoded(language, None, Counter(records=1, empty=1), remarks)
        if chosen.strip() == rejected.strip() or answers[0] == answers[1]:
            return Encoded(language, None, Counter(records=1, equal=1), remarks)
        counts = Counter(records=1, tokens=sum(map(len, answers)) - 2, characters=len(chosen) + len(rejected))
        if len(prompt) + max(map(len, answers)) > self.max_length:
            half = max(1, self.max_length // 2)
            if len(prompt) > half:
                bos = prompt[:1] if prompt[0] == tokenizer.bos_id else []
                prompt = bos + prompt[len(prompt) - half + len(bos):]
            answers = [answer[:self.max_length - len(prompt)] for answer in answers]
            if self.too_long == "drop" or answers[0] == answers[1]:
                return Encoded(language, None, counts + Counter(too_long=1), remarks)
            counts["truncated"] = 1
        return Encoded(language, [prompt, *answers], counts, remarks)

    def example(self, segments: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels), int64 of the pair's length: trunk, chosen branch, rejected branch."""
        prompt, chosen, rejected = segments
        ids = np.concatenate([prompt, chosen[:-1], prompt[-1:], rejected[:-1]])
        return ids, np.concatenate([np.full(len(prompt) - 1, IGNORE), chosen, rejected])

    def document(self, segments: list[int]) -> tuple[int, list[int]]:
        """(length of the trunk, [of each branch])."""
        return segments[0] - 1, segments[1:]

    def counted(self, segments: np.ndarray) -> np.ndarray:
        """A loss is divided by the number of pairs."""
        return np.ones(len(segments), np.int32)


@functools.cache
def _languages(*names: str | None) -> tuple[str, tuple]:
    """(one name for what "de", "German" and "deu" call, "eng>deu" for a pair of two languages; remarks)."""
    codes, remarks = [], []
    for name in names:
        if name and name.lower() != UNKNOWN:
            known = languages.lookup(name)
            codes.append(known[0].code if known else name)
            if not known:
                remarks.append((f"name the language {name[:40]!r}, which is not known: no request can be made for it",
                                ""))
    return ">".join(dict.fromkeys(codes or [UNKNOWN])), tuple(remarks)


def _markup(tokenizer, *texts: str) -> tuple:
    """The remark about special tokens and templates in a text: they are tokenised as the text that they are here."""
    starts, search = _pattern(tokenizer)
    text = "\0".join(texts)
    match = search(text) if any(map(text.__contains__, starts)) else None  # most texts have none of these characters
    return (("hold a chat template or special tokens, which are read as mere text", match.group()),) if match else ()


@functools.lru_cache(maxsize=1)
def _pattern(tokenizer):
    """(the characters that markup begins with, the search for it)."""
    special = sorted(text for text in tokenizer.special_texts if len(text) > 2 and not text.isalnum())
    return {*"<[#", *(text[0] for text in special)}, re.compile("|".join([MARKUP, *map(re.escape, special)])).search
