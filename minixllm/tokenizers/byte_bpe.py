r"""Byte-level BPE in pure Python: text -> pieces (a regular expression) -> bytes -> merges by rank -> ids.

Source: Sennrich et al. 2016 (merges by rank); Radford et al. 2019 (over bytes, each written as a printable character);
Hugging Face's tokenizer.json for the format. What costs time is merging a piece never seen; the rest are looked up.
"""

import codecs
import functools
import heapq
import itertools
import re
import sys
import unicodedata

from minixllm.errors import UserError, check_text
from minixllm.files import read_json
from minixllm.tokenizers.base import Tokenizer

# Pre-tokenisers. A key is what tokenizer.json asks for, step by step; the value gives the same pieces with Python's
# `re`, all text between two matches being a piece too. White space is spelt out: Python's \s also has \x1c-\x1f.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what "ByteLevel" does by itself
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # a class in a class: all but ( ) | white space and the punctuation
DIGITS = r"\p{N}"
PIECES = {
    (GPT2,): r"'(?:[stmd]|re|ve|ll)| ?[{L}]+| ?[{N}]+| ?[^ {S}{L}{N}]+|[ {S}]+(?![^ {S}])|[{S}]",
    (DIGITS, GPT2): r"[{N}]|'(?:[stmd]|re|ve|ll)| ?[{L}]+| ?[^ {S}{L}{N}]+|[ {S}]+(?![^ {S}{N}])|[ {S}]",
    (LLAMA3,): r"(?i:'(?:[stmd]|re|ve|ll))|[^\r\n{L}{N}]?[{L}]+|[{N}]{1,3}| ?[^ {S}{L}{N}]+[\r\n]*|[ {S}]*[\r\n]+"
               r"|[ {S}]+(?![^ {S}])|[ {S}]",
    (BLOOM,): r" ?[^ {S}()|.,!?…。，、।۔،]+|(?: (?![^ {S}()|.,!?…。，、।۔،])|[{S}()|.,!?…。，、।۔،])+",
}
WHITE_SPACE = r"\t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # less the space itself

NEVER = (1 << 30) - 1  # the rank of pairs that do not merge
LONG = 96              # bytes; longer pieces are merged through a heap, where a search of the list would be quadratic


def byte_alphabet() -> list[str]:
    """The printable character that stands for each of the 256 bytes in vocabularies (GPT-2's bytes_to_unicode)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@functools.cache
def _category(letter: str, last: int) -> str:
    r"""\p{letter} up to code point `last`, as the inside of a character class."""
    members = (cp for cp in range(last + 1) if unicodedata.category(chr(cp))[0] == letter)
    runs = []
    for cp in members:
        if runs and runs[-1][1] == cp - 1:
            runs[-1][1] = cp
        else:
            runs.append([cp, cp])
    return "".join(f"\\U{first:08x}-\\U{end:08x}" for first, end in runs)


@functools.cache
def _pattern(steps: tuple[str, ...], last: int) -> re.Pattern:
    pattern = PIECES[steps].replace("{S}", WHITE_SPACE)
    for letter in "LN":
        if f"{{{letter}}}" in pattern:
            pattern = pattern.replace(f"{{{letter}}}", _category(letter, last))
    return re.compile(pattern)


def split(steps: tuple[str, ...], text: str) -> list[str]:
    """The pieces of `text`, a key of PIECES saying which; joined they are `text` again."""
    # Classes that reach beyond the BMP make Python's `re` six times slower: only texts that go there pay.
    last = 0xFFFF if 2 * len(text) == len(text.encode("utf-16-le")) else sys.maxunicode
    return _pattern(steps, last).findall(text)


class Merger(dict):
    """piece -> tuple of ids; pieces not yet there are merged, and kept while there is room.

    bytes_to_ids: the id of each of the 256 bytes; None for one without a token, which is dropped, as the original does.
    merges: (left id << 32 | right id) -> rank; merged: the id each rank yields.
    whole: pieces that are one token whatever the merges say, by their bytes in latin-1 (LLaMA 3's ignore_merges).
    """

    def __init__(self, bytes_to_ids, merges: dict[int, int], merged: list[int], whole: dict[str, int], room=1 << 18):
        self.merges, self.merged, self.whole, self.room = merges, merged, whole, room
        self.bytes_to_ids = bytes_to_ids
        self.dropped = bytes(byte for byte, i in enumerate(bytes_to_ids) if i is None)

    def __missing__(self, piece: str) -> tuple[int, ...]:
        data = piece.encode()
        if self.whole and (i := self.whole.get(data.decode("latin-1"))) is not None:
            ids = (i,)
        else:
            symbols = [self.bytes_to_ids[byte] for byte in data.translate(None, self.dropped)]
            ids = tuple(self.merge(symbols) if len(symbols) < LONG else self.merge_long(symbols))
        if len(piece) < LONG:  # a long one will not come again
            if len(self) >= self.room:
                self.clear()
            self[piece] = ids
        return ids

    def merge(self, ids: list[int]) -> list[int]:
        """Merge the pair of lowest rank, the leftmost of equals, until none is left."""
        rank_of, merged = self.merges.get, self.merged
        ranks = [rank_of(left << 32 | right, NEVER) for left, right in itertools.pairwise(ids)]
        while ranks:
            rank = min(ranks)
            if rank == NEVER:
                break
            i = ranks.index(rank)
            ids[i] = merged[rank]
            del ids[i + 1], ranks[i]
            if i:
                ranks[i - 1] = rank_of(ids[i - 1] << 32 | ids[i], NEVER)
            if i < len(ranks):
                ranks[i] = rank_of(ids[i] << 32 | ids[i + 1], NEVER)
        return ids

    def merge_long(self, ids: list[int]) -> list[int]:
        """The same in O(n log n): a heap of (rank, position), and each symbol's neighbours."""
        rank_of, merged, n = self.merges.get, self.merged, len(ids)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        heap = [(rank, i) for i, pair in enumerate(itertools.pairwise(ids))
                if (rank := rank_of(pair[0] << 32 | pair[1])) is not None]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if ids[i] is None or j == n or rank_of(ids[i] << 32 | ids[j]) != rank:
                continue  # one of the two has since merged with another
            ids[i], ids[j], after[i] = merged[rank], None, after[j]
            if after[j] < n:
                before[after[j]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left >= 0 and right < n and (rank := rank_of(ids[left] << 32 | ids[right])) is not None:
                    heapq.heappush(heap, (rank, left))
        return [i for i in ids if i is not None]


class ByteLevelBPE(Tokenizer):
    """A byte-level BPE in Hugging Face's `tokenizer.json`: BLOOM's, GPT-2's, LLaMA 3's, SmolLM2's and their like.

    The ids are those of `tokenizers` with encode_special_tokens = True: special tokens typed in a text are text.
    A component, flag or pattern other than theirs is refused by name, never ignored.
    Raises UserError naming the file and the key.
    """

    def __init__(self, path):
        super().__init__(path)
        content = read_json(self.path)
        model = self.get(content, "model", dict, "model")
        if model.get("byte_fallback"):
            self.refuse("model.byte_fallback", model["byte_fallback"], "false: this was converted from SentencePiece; "
                        "put its tokenizer.model beside it, which is read instead")
        if self.get(content, "normalizer", dict, "normalizer", {}):
            self.refuse("normalizer", content["normalizer"].get("type"), "none")
        self.steps = self._pre_tokenizer(content)
        decoder = self.get(content, "decoder", dict, "decoder", {}).get("type")
        if decoder != "ByteLevel":
            self.refuse("decoder", decoder, "ByteLevel")
        vocab, added = self._vocabulary(content, model)
        special = {token["id"] for token in added if token.get("special")}
        self.vocab_size = max(vocab.values()) + 1
        self.names = {i: text for text, i in vocab.items()}
        self.pieces = self._byte_strings(vocab, added)
        self.choose_special(vocab, {})
        special |= {self.bos_id, self.eos_id, self.pad_id} - {None}  # whatever the file calls them
        self.merger = self._merger(model, vocab, special)
        self.control = special
        self.special_texts = {self.names[i] for i in special}
        self.prefix, self.suffix = self._post_processor(content, vocab)
        # Added tokens that are not special are found in text before anything else, the longest of those at one place;
        # first those that no normaliser would touch.
        self.added = {token["content"]: token["id"] for token in added}
        self.added_patterns = []
        for normalized in (False, True):
            texts = [token["content"] for token in added if token.get("normalized", False) == normalized]
            if {self.added[text] for text in texts} - special:
                self.added_patterns.append(re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))))
        self.sign(self.prefix, self.suffix, self.bos_id, self.eos_id, self.pad_id)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`; with add_special_tokens, between what the post-processor puts around one text (BOS).

        Raises UserError for text with lone surrogates, which no encoding can hold.
        """
        try:
            ids = self._encode(text)
        except UnicodeEncodeError:
            check_text(text)
            raise
        return self.prefix + ids + self.suffix if add_special_tokens else ids

    def _encode(self, text: str) -> list[int]:
        parts = [text]
        for pattern in self.added_patterns:
            parts = [cut for part in parts for cut in ([part] if isinstance(part, int) else self._cut(pattern, part))]
        return [i for part in parts for i in ([part] if isinstance(part, int) else self._encode_ordinary(part))]

    def _cut(self, pattern: re.Pattern, text: str) -> list:
        """The text in pieces, with the ids of the added tokens that are found between them."""
        parts, start = [], 0
        for match in pattern.finditer(text):
            token = self.added[match.group()]
            if token not in self.control:
                parts += [text[start:match.start()], token]
                start = match.end()
        return [*parts, text[start:]]

    def _encode_ordinary(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self.merger.__getitem__, split(self.steps, text))))

    def decode(self, ids) -> str:
        """The text of `ids`, bytes that are no UTF-8 as U+FFFD; control tokens and unknown ids give nothing."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def bytes_of(self, i: int) -> bytes:
        return b"" if i in self.control else self.pieces.get(int(i), "").encode("latin-1")

    def stream(self) -> "ByteStream":
        return ByteStream(self)

    def save(self, directory):
        """Write tokenizer.json and tokenizer_config.json, with which `transformers` opens the directory."""
        names = {f"{kind}_token": self.names[i] for kind, i in (
            ("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)) if i is not None}
        self.save_files(directory, "tokenizer.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False,
            **self.config})

    # ---- reading tokenizer.json ----

    def refuse(self, key: str, found, expected: str):
        raise UserError(f"{self.path}: {key} is {found!r}, expected {expected}")

    def get(self, section: dict, key: str, kind: type, name: str, default=None):
        """section[key], of the given type; null and absent give the default, or are refused where there is none."""
        value = section.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, kind):
            self.refuse(name, value, f"a JSON {'array' if kind is list else 'object'}")
        return value

    def _pre_tokenizer(self, content) -> tuple[str, ...]:
        """The splitting steps, a key of PIECES."""
        section = self.get(content, "pre_tokenizer", dict, "pre_tokenizer")
        parts = [section]
        if section.get("type") == "Sequence":
            parts = self.get(section, "pretokenizers", list, "pre_tokenizer.pretokenizers")
        steps = []
        for part in parts:
            match part:
                case {"type": "ByteLevel", "add_prefix_space": False}:
                    steps += [GPT2] if part.get("use_regex", True) else []
                case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                    steps.append(pattern)
                case {"type": "Digits", "individual_digits": True}:
                    steps.append(DIGITS)
                case _:
                    self.refuse("pre_tokenizer", part, "one of BLOOM's, GPT-2's, LLaMA 3's or SmolLM2's")
        if tuple(steps) not in PIECES or parts[-1]["type"] != "ByteLevel":
            self.refuse("pre_tokenizer", section, "one of BLOOM's, GPT-2's, LLaMA 3's or SmolLM2's")
        return tuple(steps)

    def _vocabulary(self, content, model) -> tuple[dict[str, int], list[dict]]:
        """All tokens by text, the added ones among them, and the list of added ones; ids are checked."""
        if model.get("type", "BPE") != "BPE":
            self.refuse("model.type", model["type"], "'BPE'")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                self.refuse(f"model.{key}", model[key], "none: byte-level BPE has no such thing")
        vocab = self.get(model, "vocab", dict, "model.vocab")
        added = self.get(content, "added_tokens", list, "added_tokens", [])
        for token in added:
            match token:
                case {"id": int(), "content": str(text)} if text:
                    pass
                case _:
                    self.refuse("added_tokens", token, "an id and a content")
            if not token.get("special") and any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
                self.refuse(f"added_tokens: {token['content']!r}", token, "no single_word, lstrip or rstrip")
        vocab = vocab | {token["content"]: token["id"] for token in added}
        if set(map(type, vocab.values())) - {int} or min(vocab.values(), default=-1) < 0:
            self.refuse("model.vocab", next((v for v in vocab.items() if type(v[1]) is not int or v[1] < 0), "empty"),
                        "tokens with their ids")
        if len(set(vocab.values())) < len(vocab):
            seen = {}
            for text, i in vocab.items():
                if i in seen:
                    raise UserError(f"{self.path}: model.vocab: id {i} is given twice, to {seen[i]!r} and {text!r}")
                seen[i] = text
        return vocab, added

    def _byte_strings(self, vocab, added) -> dict[int, str]:
        """id -> the token's bytes as a latin-1 string."""
        alphabet = byte_alphabet()
        separator = "\uffff"  # no byte stands for it: all tokens are translated in one go
        table = {ord(character): byte for byte, character in enumerate(alphabet)}
        strings = separator.join(vocab).translate(table).split(separator)
        pieces = dict(zip(vocab.values(), strings))
        pieces |= {token["id"]: token["content"].encode().decode("latin-1") for token in added}
        try:
            "".join(pieces.values()).encode("latin-1")
        except UnicodeEncodeError:
            token = next(text for text, i in vocab.items() if max(pieces[i], default="") > "\xff")
            self.refuse("model.vocab", token, "tokens in the byte alphabet of byte-level BPE")
        return pieces

    def _merger(self, model, vocab, special) -> Merger:
        """The merges as ranks of pairs of ids, in either format: "a b" or ["a", "b"]."""
        merges, merged = {}, []
        lines = self.get(model, "merges", list, "model.merges")
        try:
            for line in lines:
                left, right = line.split(" ") if isinstance(line, str) else line
                merges[vocab[left] << 32 | vocab[right]] = len(merged)
                merged.append(vocab[left + right])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            name = f"{error} is no token of model.vocab" if isinstance(error, KeyError) else "expected two tokens"
            raise UserError(f"{self.path}: model.merges[{len(merged)}] is {lines[len(merged)]!r}: {name}") from None
        if special.intersection(merged):  # ordinary text must not reach a control token
            merges = {pair: rank for pair, rank in merges.items() if merged[rank] not in special}
        alphabet = byte_alphabet()
        bytes_to_ids = [vocab.get(character) for character in alphabet]
        if None in bytes_to_ids and model.get("unk_token") is not None:
            self.refuse("model.unk_token", model["unk_token"], "none, as some bytes have no token")
        whole = {}
        if model.get("ignore_merges"):
            whole = {self.pieces[i]: i for i in vocab.values() if i not in special}
        return Merger(bytes_to_ids, merges, merged, whole)

    def _post_processor(self, content, vocab) -> tuple[list[int], list[int]]:
        """The ids that TemplateProcessing puts before and after a single text."""
        section = self.get(content, "post_processor", dict, "post_processor", {"type": "ByteLevel"})
        parts = [section]
        if section.get("type") == "Sequence":
            parts = self.get(section, "processors", list, "post_processor.processors")
        around = [], []
        for part in parts:
            match part:
                case {"type": "ByteLevel"}:  # offsets only
                    pass
                case {"type": "TemplateProcessing", "single": list(single)}:
                    side = 0
                    for item in single:
                        match item:
                            case {"SpecialToken": {"id": str(name)}} if name in vocab:
                                around[side].append(vocab[name])
                            case {"Sequence": {"id": "A"}} if side == 0:
                                side = 1
                            case _:
                                self.refuse("post_processor.single", item, "a known special token or sequence A")
                case _:
                    self.refuse("post_processor", part, "ByteLevel or TemplateProcessing")
        return around


class ByteStream:
    """Text as its ids arrive, for tokens that are bytes: an incomplete character waits for the rest of it."""

    def __init__(self, tokenizer: ByteLevelBPE):
        self.tokenizer, self.utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        return self.utf8.decode(self.tokenizer.bytes_of(i))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)
