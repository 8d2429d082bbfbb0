"""Byte-level BPE: text -> pieces (a regular expression) -> bytes -> merges by rank -> ids.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". A byte is a printable character.
"""

import functools
import itertools
import re
import sys
import unicodedata

from minixllm.tokenizers.bpe import JsonBPE

# Pre-tokenisers. A key holds the patterns of tokenizer.json, step by step. Its value finds the same pieces with
# Python's `re`, the text between two matches included. White space is spelt out: Python's \s also has \x1c-\x1f.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what "ByteLevel" does by itself
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # a class in a class: all but ( ) | white space and the punctuation
DIGITS = r"\p{N}"
QWEN2 = LLAMA3.replace("{1,3}", "")
PIECES = {
    (GPT2,): r"'(?:[stmd]|re|ve|ll)| ?[{L}]+| ?[{N}]+| ?[^ {S}{L}{N}]+|[ {S}]+(?![^ {S}])|[{S}]",
    (DIGITS, GPT2): r"[{N}]|'(?:[stmd]|re|ve|ll)| ?[{L}]+| ?[^ {S}{L}{N}]+|[ {S}]+(?![^ {S}{N}])|[ {S}]",
    (LLAMA3,): r"(?i:'(?:[stmd]|re|ve|ll))|[^\r\n{L}{N}]?[{L}]+|[{N}]{1,3}| ?[^ {S}{L}{N}]+[\r\n]*|[ {S}]*[\r\n]+"
               r"|[ {S}]+(?![^ {S}])|[ {S}]",
    (QWEN2,): r"(?i:'(?:[stmd]|re|ve|ll))|[^\r\n{L}{N}]?[{L}]+|[{N}]| ?[^ {S}{L}{N}]+[\r\n]*|[ {S}]*[\r\n]+"
              r"|[ {S}]+(?![^ {S}])|[ {S}]",
    (BLOOM,): r" ?[^ {S}()|.,!?…。，、।۔،]+|(?: (?![^ {S}()|.,!?…。，、।۔،])|[{S}()|.,!?…。，、।۔،])+",
}
WHITE_SPACE = r"\t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # all but the space itself


def byte_alphabet() -> list[str]:
    """The printable character that stands for each of the 256 bytes in vocabularies (GPT-2's bytes_to_unicode)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@functools.cache
def _category(letter: str, last: int) -> str:
    r"""\p{letter} up to code point `last`, as the inside of a character class."""
    letters = "".join(unicodedata.category(chr(code))[0] for code in range(last + 1))
    return "".join(f"\\U{run.start():08x}-\\U{run.end() - 1:08x}" for run in re.finditer(f"{letter}+", letters))


@functools.cache
def _pattern(steps: tuple[str, ...], last: int) -> re.Pattern:
    """The expression of PIECES, its classes written out up to code point `last`."""
    pattern = PIECES[steps].replace("{S}", WHITE_SPACE)
    for letter in "LN":
        if f"{{{letter}}}" in pattern:
            pattern = pattern.replace(f"{{{letter}}}", _category(letter, last))
    return re.compile(pattern)


class ByteLevelBPE(JsonBPE):
    """A byte-level BPE: BLOOM's, GPT-2's, LLaMA 3's, SmolLM2's, Qwen2's and their like."""

    def read_steps(self, content):
        normalizer = content.get("normalizer") or {"type": None}
        if normalizer not in ({"type": "NFC"}, {"type": None}):
            self.refuse("normalizer", normalizer, "none or NFC")
        self.normal_form = normalizer["type"]
        decoder = self.get(content, "decoder", dict, default={}).get("type")
        if decoder != "ByteLevel":
            self.refuse("decoder", decoder, "ByteLevel")
        steps, parts = [], self.parts(content, "pre_tokenizer", "pretokenizers")
        known = "one of BLOOM's, GPT-2's, LLaMA 3's, SmolLM2's or Qwen2's"
        for part in parts:
            match part:
                case {"type": "ByteLevel", "add_prefix_space": False}:
                    steps += [GPT2] if part.get("use_regex", True) else []
                case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
                    steps.append(pattern)
                case {"type": "Digits", "individual_digits": True}:
                    steps.append(DIGITS)
                case _:
                    self.refuse("pre_tokenizer", part, known)
        self.steps = tuple(steps)
        if self.steps not in PIECES or parts[-1]["type"] != "ByteLevel":
            self.refuse("pre_tokenizer", content.get("pre_tokenizer"), known)

    def read_pieces(self, model, vocab):
        table = {ord(character): byte for byte, character in enumerate(byte_alphabet())}
        separator = "\uffff"  # not in the alphabet, so that all tokens can be translated in one go
        strings = separator.join(vocab).translate(table).split(separator)
        try:
            pieces = {i: string.encode("latin-1") for i, string in zip(vocab.values(), strings)}
        except UnicodeEncodeError:
            token = next(text for text, string in zip(vocab, strings) if max(string, default="") > "\xff")
            self.refuse("model.vocab", token, "tokens in the byte alphabet of byte-level BPE")
        self.byte_ids = [vocab.get(character) for character in byte_alphabet()]
        if None in self.byte_ids and model.get("unk_token") is not None:
            self.refuse("model.unk_token", model["unk_token"], "none, as some bytes have no token")
        # A byte without a token is dropped, as `tokenizers` drops it.
        self.dropped = bytes(byte for byte, i in enumerate(self.byte_ids) if i is None)
        return pieces

    def symbols(self, piece):
        return [self.byte_ids[byte] for byte in piece.encode().translate(None, self.dropped)]

    def normalize(self, text):
        return unicodedata.normalize("NFC", text) if self.normal_form else text

    def split(self, text):
        # Classes that reach beyond U+FFFF make Python's `re` six times slower. Only texts that go there use them.
        last = 0xFFFF if 2 * len(text) == len(text.encode("utf-16-le")) else sys.maxunicode
        return _pattern(self.steps, last).findall(text)  # joined, they are `text` again
