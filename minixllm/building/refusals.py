"""Whether a chat model refuses to answer: by its wordings in English and in the 30 feedback languages, refusals.toml."""

import functools
import re
import tomllib
import unicodedata
from pathlib import Path

SENTENCE = re.compile(r"[^.!?。।።؟։]+")
# Apostrophes, the Turkish i, and letters that Arabic and Persian keyboards have apart.
ONE_FORM = str.maketrans("’‘ʼıيىك", "'''iییک")


def refuses(text: str, code: str) -> bool:
    """Whether an answer in the language `code` refuses, in that language or in English, by how it begins.

    A refusal speaks as a language model, or apologises and says "I cannot", or says "I cannot" and what in one sentence.
    """
    start = plain(text[:160])
    for each in {"eng", code} & _wordings().keys():
        sorry, cannot, help, alone = _wordings()[each]
        if alone.search(start, 0, 90):
            return True
        if cannot.search(start) and (sorry.search(start, 0, 60) or any(
                cannot.search(sentence) and help.search(sentence) for sentence in SENTENCE.findall(start))):
            return True
    return False


@functools.cache
def _wordings() -> dict[str, list[re.Pattern]]:
    """{code: its patterns of an apology, of "I cannot", of what, and of what refuses without any of these}."""
    def any_of(wordings: str) -> re.Pattern:
        parts = (map(re.escape, map(plain, wording.split("…"))) for wording in wordings.split("|"))
        return re.compile("|".join(map(".{1,40}?".join, parts)))

    table = tomllib.loads(Path(__file__).with_name("refusals.toml").read_text(encoding="utf-8"))
    return {code: [any_of(row[name]) for name in ("sorry", "cannot", "help", "alone")] for code, row in table.items()}


def plain(text: str) -> str:
    """The text in small letters, without accents, vowel points and tones, which many write and many leave out."""
    text = unicodedata.normalize("NFKD", text.casefold()).translate(ONE_FORM)
    if text.isascii():
        return " ".join(text.split())
    return " ".join("".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf")).split())
