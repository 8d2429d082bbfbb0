r"""Byte-level BPE in pure Python: text -> pieces (a regular expression) -> bytes -> merges by rank -> ids.

Source: Sennrich et al. 2016 (merges by rank); Radford et al. 2019 (over bytes, each written as a printable character);
Hugging Face's tokenizer.json for the format. What costs time is merging a piece never seen; the rest are looked up.
"""

import functools
import heapq
import itertools
import re
import sys
import unicodedata

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

    bytes_to_ids: the id of each of the 256 bytes; None for a byte without a token, which is dropped, as the original does.
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
