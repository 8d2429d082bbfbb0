"""One record -> token ids and labels.

A document of L tokens is read as L - 1 inputs and the L - 1 tokens they predict. Labels come already shifted: the label
of an input is the token after it, or IGNORE where nothing is to be learnt.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from minixllm import languages
from minixllm.data import prompts
from minixllm.data.records import Instruction, Preference, read_instructions, read_preferences

IGNORE = -100      # the label of a token that nobody has to predict
UNKNOWN = "und"    # BCP-47's "undetermined": the language of records that name none
# What a chat template leaves in a text, or Alpaca's own; the tokenizer's special tokens come on top.
MARKUP = (r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>"
          r"|### (?:Instruction|Response):")


@dataclass(frozen=True)
class Encoder:
    """What both kinds share: a record is a prompt with one answer or two, its segments.

    A kind has `read` (the records of a file), `encode` (the ids of one record's segments) and `counted`.
    max_length: tokens of the longest record, which is its prompt and its longer answer. too_long: whether a longer one
    is left out ("drop"), or keeps as much of its answers as fits, without EOS ("truncate").
    """

    max_length: int
    too_long: str = "drop"

    train_on_prompt = False

    def _encode(self, tokenizer, spoken, prompt: str, own_texts, answers):
        """Prompt and answers are tokenised apart, so that no token spans their boundary. The prompt begins with BOS
        exactly when the model's own tokenizer adds one, and EOS ends each answer.

        spoken: the languages that the record names; prompt: what the model is shown; own_texts: what of it is the
        record's. Returns (its language; its segments, or None where it is left out; counts as in
        `token_cache.TokenCache.report`; remarks on what is odd about it, each with an example, to be said once a file).
        """
        language, remarks = _languages(*spoken)
        remarks += _markup(tokenizer, *own_texts, *answers)
        prompt_ids = tokenizer.encode_prompt(prompt)
        ids = [tokenizer.encode(answer) + [tokenizer.eos_id] for answer in answers]
        counts, segments = Counter(records=1), None
        # empty or equal as text, or to the tokenizer, which may drop characters or turn some into others
        if not all(map(str.strip, (prompt, *answers))) or not prompt_ids or min(map(len, ids)) == 1:
            counts["empty"] = 1
        elif answers[0].strip() in map(str.strip, answers[1:]) or ids[0] in ids[1:]:
            counts["equal"] = 1
        else:
            counts.update(tokens=sum(map(len, ids)) - len(ids), characters=sum(map(len, answers)))
            segments = [prompt_ids, *ids]
            if len(prompt_ids) + max(map(len, ids)) > self.max_length:
                segments = self._cut(prompt_ids, ids, tokenizer.bos_id) if self.too_long == "truncate" else None
                counts["truncated" if segments else "too_long"] = 1
        return language, segments, counts, remarks

    def _cut(self, prompt: list[int], answers: list[list[int]], bos_id) -> list[list[int]] | None:
        """The segments, cut to max_length; None where they teach nothing."""
        answers = [answer[:max(0, self.max_length - len(prompt))] for answer in answers]
        return [prompt, *answers] if answers[0] and answers[0] not in answers[1:] else None

    def example(self, segments: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of a record, int64.

        The prompt but for its last token comes once, then that token and all but the last of each answer.
        """
        prompt, *answers = segments
        inputs = [part for answer in answers for part in (prompt[-1:], answer[:-1])]
        learnt = prompt[1:] if self.train_on_prompt else np.full(len(prompt) - 1, IGNORE)
        return np.concatenate([prompt[:-1], *inputs]), np.concatenate([learnt, *answers])

    def document(self, lengths: list[int]):
        """The record as `attention.Packed` takes it, from the lengths of its segments: its length with one answer, and
        with two (length of the trunk, [of each branch]), so that their prompt is computed once."""
        prompt, *answers = lengths
        return sum(lengths) - 1 if len(answers) == 1 else (prompt - 1, answers)


@dataclass(frozen=True)
class Instructions(Encoder):
    """Instruction tuning: records are Alpaca's, and the answer with its EOS is learnt.

    train_on_prompt: learn every token but the first, as the paper did.
    """

    train_on_prompt: bool = False

    unit = "records"
    read = staticmethod(read_instructions)

    def encode(self, record: Instruction, tokenizer):
        own_texts = record.instruction, record.input
        return self._encode(tokenizer, [record.language], prompts.alpaca(*own_texts), own_texts, [record.output])

    def counted(self, segments: np.ndarray) -> np.ndarray:
        """What each record adds to the count that a loss is divided by, (n,) from (n, 2): its supervised tokens."""
        return segments.sum(1, dtype=np.int32) - 1 if self.train_on_prompt else segments[:, 1]


@dataclass(frozen=True)
class Preferences(Encoder):
    """Preference optimisation: the answers of a pair are the two branches of one document.

    A prompt of over half of max_length is first cut to that half. Pairs whose cut answers are equal are left out.
    """

    unit = "pairs"

    @staticmethod
    def read(path, progress, leave_out):
        return read_preferences(path, progress)

    def encode(self, record: Preference, tokenizer):
        own_texts = (record.instruction, record.input) if record.prompt is None else [record.prompt]
        return self._encode(tokenizer, (record.language, record.response_language), prompts.preference(record),
                            own_texts, (record.chosen, record.rejected))

    def _cut(self, prompt, answers, bos_id):
        half = max(1, self.max_length // 2)
        if len(prompt) > half:  # BOS stays, and the end of the prompt, where the request stands
            bos = prompt[:1] if prompt[0] == bos_id else []
            prompt = bos + prompt[len(prompt) - half + len(bos):]
        return super()._cut(prompt, answers, bos_id)

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
                remarks.append((f"name the language {name[:40]!r}, which is not known, so that no request can be made "
                                "for it", ""))
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
