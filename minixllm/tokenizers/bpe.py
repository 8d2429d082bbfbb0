"""Byte pair encoding in pure Python, and what is common to all of its `tokenizer.json` files.

Source: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909 (merges by rank); Hugging Face's tokenizer.json for the
format. What costs time is merging a piece that was never seen; the others are looked up.
"""

import heapq
import itertools
import re

from minixllm.errors import UserError, expect, found
from minixllm.files import read_json
from minixllm.tokenizers.base import Tokenizer

NEVER = (1 << 30) - 1  # the rank of pairs that do not merge
LONG = 96              # symbols; longer pieces are merged through a heap, where searching the list would be quadratic


class Merger(dict):
    """piece -> tuple of ids. A piece that is not yet there is merged, and kept while there is room.

    symbols: a function from a piece to the ids of its bytes or characters.
    merges: (left id << 32 | right id) -> rank; merged: the id each rank yields.
    whole: pieces, in bytes, that are one token whatever the merges say (LLaMA 3's ignore_merges).
    """

    ROOM = 1 << 18

    def __init__(self, symbols, merges: dict[int, int], merged: list[int], whole: dict[bytes, int]):
        self.symbols, self.merges, self.merged, self.whole = symbols, merges, merged, whole

    def __missing__(self, piece: str) -> tuple[int, ...]:
        if self.whole and (i := self.whole.get(piece.encode())) is not None:
            ids = (i,)
        else:
            symbols = self.symbols(piece)
            ids = tuple(self.merge(symbols) if len(symbols) < LONG else self.merge_long(symbols))
        if len(piece) < LONG:  # a long one will not come again
            if len(self) >= self.ROOM:
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


class JsonBPE(Tokenizer):
    """A BPE in Hugging Face's `tokenizer.json`. The ids are those of `tokenizers` with encode_special_tokens = True.

    A component, flag or pattern that is not built here is refused by name and never ignored. A kind has these methods:
    read_steps(content): check and keep the normaliser, the pre-tokeniser and the decoder.
    read_pieces(model, vocab): the bytes of every id; it also prepares `symbols`.
    normalize(text), then split(text): the pieces of a text, which are merged each by itself.
    symbols(piece): the ids of a piece's smallest parts, from which merging starts.
    Raises UserError naming the file and the key.
    """

    FILE, CLASS, adds_space = "tokenizer.json", "PreTrainedTokenizerFast", False

    def __init__(self, path):
        super().__init__(path)
        content = read_json(self.path)
        model = self.get(content, "model", dict)
        vocab, added = self._vocabulary(content, model)
        self.vocab_size = max(vocab.values()) + 1
        self.choose_special(vocab, {})
        self.special = {token["id"] for token in added if token.get("special")}
        self.special |= {self.bos_id, self.eos_id, self.pad_id} - {None}  # even if the file does not call them special
        self.special_texts = {token["content"] for token in added if token["id"] in self.special}
        self.special_texts |= {*self.names.values()} - {None}
        self.read_steps(content)
        texts = {token["content"]: token["id"] for token in added}
        self.pieces = self.read_pieces(model, {text: i for text, i in vocab.items() if text not in texts})
        self.pieces |= {i: text.encode() for text, i in texts.items()}
        for i in self.special:
            self.pieces.pop(i, None)
        self.merger = self._merger(model, vocab)
        self.prefix, self.suffix = self._post_processor(content, vocab)
        # Added tokens that are not special are found in a text before anything else, the longest of those at one
        # place: first those that a normaliser does not touch, then, in the normalised text, the others.
        self.added, self.patterns = texts, []
        for normalized in (False, True):
            some = [token["content"] for token in added if token.get("normalized", False) == normalized]
            pattern = "|".join(map(re.escape, sorted(some, key=len, reverse=True)))
            is_needed = any(texts[text] not in self.special for text in some)
            self.patterns.append(re.compile(pattern) if is_needed else None)
        self.set_fingerprint()

    def encode_text(self, text):
        raw, normalized = self.patterns
        return self._encode_around(raw, text, lambda part: self._encode_around(
            normalized, self.normalize(part), self._merge))

    def _encode_around(self, pattern, text: str, encode) -> list[int]:
        """The ids of the added tokens that `pattern` finds in the text, and encode(part) of what stands around them."""
        if not pattern:
            return encode(text)
        ids, start = [], 0
        for match in pattern.finditer(text):
            token = self.added[match.group()]
            if token not in self.special:  # a special token that is typed is text
                ids += [*encode(text[start:match.start()]), token]
                start = match.end()
        return ids + encode(text[start:])

    def _merge(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self.merger.__getitem__, self.split(text))))

    # ---- reading tokenizer.json ----

    def refuse(self, key: str, value, expected: str):
        raise UserError(f"{self.path}: {key}: found {found(value)}, expected {expected}")

    def get(self, section: dict, key: str, kind: type, name: str | None = None, default=None):
        """section[key], of the given type; null and absent give the default, or are refused where there is none."""
        value = section.get(key)
        return default if value is None and default is not None else expect(value, kind, f"{self.path}: {name or key}")

    def parts(self, content: dict, key: str, inner: str) -> list[dict]:
        """The components of a section, in the order in which they are applied; a sequence is taken apart."""
        section = self.get(content, key, dict, default={})
        parts = self.get(section, inner, list, f"{key}.{inner}") if section.get("type") == "Sequence" else [section]
        return [expect(part, dict, f"{self.path}: {key}") for part in parts if part]

    def _vocabulary(self, content, model) -> tuple[dict[str, int], list[dict]]:
        """All tokens by text, the added ones among them, and the list of added ones; ids are checked."""
        if model.get("type", "BPE") != "BPE":
            self.refuse("model.type", model["type"], "'BPE'")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                self.refuse(f"model.{key}", model[key], "none: this BPE has no such thing")
        vocab = self.get(model, "vocab", dict, "model.vocab")
        added = self.get(content, "added_tokens", list, default=[])
        for token in added:
            match token:
                case {"id": int(i), "content": str(text)} if text and vocab.get(text, i) == i and i is not True:
                    pass
                case {"content": str(text)} if text in vocab:
                    self.refuse(f"added_tokens: {text!r}", token.get("id"), f"{vocab[text]}, its id in model.vocab")
                case _:
                    self.refuse("added_tokens", token, "an id and a content")
            if not token.get("special") and any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
                self.refuse(f"added_tokens: {token['content']!r}", token, "no single_word, lstrip or rstrip")
        vocab = vocab | {token["content"]: token["id"] for token in added}
        ids = vocab.values()
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= 2**31:
            bad = (item for item in vocab.items() if type(item[1]) is not int or not 0 <= item[1] < 2**31)
            self.refuse("model.vocab", next(bad, "empty"), "tokens with their ids")
        if len(set(ids)) < len(vocab):
            last = {i: text for text, i in vocab.items()}
            text, i = next(item for item in vocab.items() if last[item[1]] != item[0])
            raise UserError(f"{self.path}: model.vocab: id {i} is given twice, to {text!r} and {last[i]!r}")
        return vocab, added

    def _merger(self, model, vocab) -> Merger:
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
            raise UserError(f"{self.path}: model.merges[{len(merged)}]: found {found(lines[len(merged)])}: "
                            f"{name}") from None
        if self.special.intersection(merged):  # ordinary text must not reach a control token
            merges = {pair: rank for pair, rank in merges.items() if merged[rank] not in self.special}
        whole = {data: i for i, data in self.pieces.items()} if model.get("ignore_merges") else {}
        return Merger(self.symbols, merges, merged, whole)

    def _post_processor(self, content, vocab) -> tuple[list[int], list[int]]:
        """The ids that TemplateProcessing puts before and after a single text."""
        around = [], []
        for part in self.parts(content, "post_processor", "processors"):
            match part:
                case {"type": "ByteLevel"}:  # it only sets offsets
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
