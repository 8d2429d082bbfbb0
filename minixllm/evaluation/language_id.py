"""In which language a text is written, for the off-target rate (Zhang et al. 2020): by py3langid, with pycld2 beside it.

py3langid tells 88 of the 100 languages apart. pycld2 (Google's Compact Language Detector 2) adds five that py3langid
does not know. ckb and nso get the label of a close relative: an answer in that relative passes, too, as it does for
each set of RELATIVES. `python -m bench.language_id` measures all this and writes the table behind `notes`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from minixllm import languages

MEASURED = Path(__file__).with_name("language_id.tsv")   # by bench/language_id.py
RELATIVES = ({"bos", "hrv", "srp"}, {"ind", "msa"}, {"xho", "zul"}, {"zho_simpl", "zho_trad"})
PYCLD2 = "ceb mri nya snd wol".split()                   # those that py3langid does not know
# Where py3langid's labels are not our tags: Nynorsk passes for Bokmål, Southern Kurdish for Central Kurdish, Southern
# for Northern Sotho, Wu and Cantonese for Chinese, Egyptian for standard Arabic, Biblical for modern Hebrew.
LABELS = {"no": "nob", "nn": "nob", "tl": "tgl", "fuv": "ful", "ku": "", "sdh": "ckb", "st": "nso", "zh": "zho_simpl",
          "wuu": "zho_simpl", "yue": "zho_simpl", "arz": "ara", "hbo": "heb"}


@dataclass(frozen=True)
class Identifier:
    """Tells languages apart. `name` goes into signatures, `known` are the FLORES-101 codes that it can tell."""

    name: str
    known: frozenset[str]
    classify: Callable[[str], str | None]                # text -> code; None for a language that is not ours

    def is_in(self, text: str, code: str) -> bool:
        """Whether the text is in this language or in one that passes for it."""
        found = self.classify(text)
        return found == code or any({found, code} <= relatives for relatives in RELATIVES)

    def notes(self, codes) -> list[str]:
        """What a reader of off-target rates in these languages must know: who is not told, and who is told badly."""
        said, codes = [], set(codes)
        if unknown := sorted(codes - self.known):
            said.append(f"{self.name} cannot tell {', '.join(unknown)}: no off-target rates there")
        rows = [line.split("\t") for line in MEASURED.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
        rows = [(code, right, said_of) for code, right, _, said_of in rows if code in codes & self.known]
        if figures := [f"{code} {right}" for code, right, _ in rows if right and float(right) < 99]:
            said.append(f"language identified in fewer than 99 % of NTREX's sentences: {', '.join(figures)}")
        if pairs := [f"{code}: {said_of}" for code, _, said_of in rows if said_of]:
            said.append(f"languages that the identifier does not part: {'. '.join(pairs)}")
        return said


@functools.cache
def identifier() -> Identifier | None:
    """The identifier of what is installed: py3langid with pycld2, or alone; None without py3langid."""
    try:
        import py3langid
    except ImportError:
        return None
    labels = [label for label, _ in py3langid.rank("")]
    codes = {label: found[0].code for label in labels if (found := languages.lookup(LABELS.get(label, label)))}
    known, name = {*codes.values(), "zho_trad"}, f"py3langid-{version('py3langid')}"
    try:
        import pycld2
    except ImportError:
        return Identifier(name, frozenset(known), lambda text: codes.get(py3langid.classify(text)[0]))
    more = {languages.find(code).tag: code for code in PYCLD2}

    def classify(text: str) -> str | None:
        try:                                             # pycld2 takes no control characters
            plain = text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
            sure, _, found = pycld2.detect(plain)
        except (pycld2.error, UnicodeEncodeError):
            sure = False
        tag = found[0][1] if sure else None
        return more[tag] if tag in more else codes.get(py3langid.classify(text)[0])

    return Identifier(f"{name}+pycld2-{version('pycld2')}", frozenset({*known, *PYCLD2}), classify)
