"""The 100 languages of the instruction data, the 30 of the feedback data, and those that only a benchmark has.

languages.tsv holds the table and says where each of its columns comes from. Every part of the project finds languages
by `find`, so that one language has one code whatever a file calls it.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from minixllm.errors import UserError, found

TABLE = Path(__file__).with_name("languages.tsv")


@dataclass(frozen=True)
class Language:
    code: str  # FLORES-101
    tag: str  # BCP-47
    name: str  # in English
    own_name: str
    script: str  # ISO 15924
    tier: str  # "high", "mid" or "low"
    google: str  # Google Cloud Translation's code, or nothing where it lacks the language
    nllb: str  # NLLB's code


def _read_table() -> tuple[dict, dict, dict]:
    """(the 100 by code, those that only a benchmark has by code, all by every spelling of code, tag and name)."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    hundred, benchmark_only, known = {}, {}, {}
    for *columns, where, others in (line.split("\t") for line in lines[1:]):
        language = Language(*columns)
        (hundred if where == "100" else benchmark_only)[language.code] = language
        for spelling in (*columns[:4], *others.split(", ")):
            known.setdefault("_".join(_words(spelling)), language)
    return hundred, benchmark_only, known


def _words(text: str) -> list[str]:
    """The parts of a tag or name: zh-Hant-TW, zh_Hant_TW and "Chinese (Traditional)" are cut alike."""
    return [word for word in re.split(r"[-_()\s]+", text.lower()) if word]


LANGUAGES, BENCHMARK_ONLY, _KNOWN = _read_table()
del _KNOWN[""]
# What may follow a language: a script (as a code, or as file names write it) and a region.
SCRIPTS = {*(language.script.lower() for language in _KNOWN.values()), "hang", "hani", "mong"}
SCRIPT_NAMES = {"simplified": "hans", "traditional": "hant", "cyrillic": "cyrl", "latin": "latn"}
REGION = re.compile("[a-z]{2}|[0-9]{3}")  # ISO 3166 and UN M.49
TRADITIONAL = {"hant", "tw", "hk", "mo"}  # Chinese is written in traditional characters there
OWN = {"zho_simpl": {"cn"}, "zho_trad": {"tw"}, "kor": {"hang"}}  # these say no more than the language by itself does
# CLDR replaces these codes by a language and a region or script.
REGIONAL = {"prs": "fa-AF", "drw": "fa-AF", "tnf": "fa-AF", "swc": "sw-CD", "cnr": "sr-ME", "sh": "sr-Latn",
            "hbs": "sr-Latn"}

# The paper does not name its 30. Ours: every language of the 100 that PAWS-X, XCOPA or Self-Instruct* scores (21), so
# that each benchmark can show what feedback changes, and nine more that bring in further scripts and families.
FEEDBACK_LANGUAGES = (
    "deu spa fra jpn kor zho_simpl "  # PAWS-X
    "est ind ita swh tam tha tur vie "  # XCOPA
    "ara ces hin hye kir yor mon "  # Self-Instruct*
    "rus por ben urd fas ell pol fin amh"
).split()


def lookup(text: str) -> tuple[Language, tuple[str, ...]] | None:
    """The language that a code, tag, name or word of a file name means, and the script and region that it adds.

    "pt-BR" -> (Portuguese, ("br",)); "serbian_latin" -> (Serbian, ("latn",)); "serbian_cyrillic" -> (Serbian, ()), for
    that is its script in the table; None for what names no language. Known are all spellings in languages.tsv, in any
    case. Chinese is two languages here, told apart by script or region.
    """
    words = _words(text)
    if words and words[0] in REGIONAL:
        words = _words(REGIONAL[words[0]]) + words[1:]
    for size in range(len(words), 0, -1):  # the longest name first: "Haitian Creole" before "Haitian"
        if language := _KNOWN.get("_".join(words[:size])):
            rest = tuple(SCRIPT_NAMES.get(word, word) for word in words[size:])
            if not all(word in SCRIPTS or REGION.fullmatch(word) for word in rest):
                return None
            if language.code == "zho_simpl" and TRADITIONAL & set(rest) and "hans" not in rest:
                language = BENCHMARK_ONLY["zho_trad"]
            own = {language.script.lower(), *OWN.get(language.code, ())}
            return language, tuple(word for word in rest if word not in own)
    return None


def find(text: str) -> Language:
    """The language that `lookup` finds. Raises UserError with the nearest spellings where there is none."""
    if known := lookup(text):
        return known[0]
    near = difflib.get_close_matches(text.lower(), _KNOWN, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if "," in text and all(lookup(part) for part in text.split(",")):
        hint = "; several are parted by spaces, not commas"
    raise UserError(f"unknown language {found(text)}: expected a FLORES-101 code, a BCP-47 tag or a name{hint}")
