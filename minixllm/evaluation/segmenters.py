"""Words of languages written without spaces, as the multilingual ROUGE of XL-Sum (Hasan et al. 2021) splits them."""

import functools
import re

PACKAGES = {"zho_simpl": "jieba", "zho_trad": "jieba", "tha": "pythainlp", "jpn": "fugashi and a dictionary"}
ASAT, STACK = "\u103a", "\u1039"                       # the sign that ends a syllable; the one that stacks consonants
UNIT = re.compile("[^\\s][\u102b-\u1032\u1036-\u1038\u103b-\u103e\u103a]*")   # a character and its dependent signs


def burmese(text: str) -> list[str]:
    """Syllable-like units of Burmese by rules alone (Ding et al. 2019, "Towards Burmese (Myanmar) Morphological
    Analysis"): a character takes its dependent signs, a final consonant joins what it ends, stacked ones stay whole."""
    text = "".join(text.replace("\u200c", " ").replace("\u1037" + ASAT, ASAT + "\u1037").lower().split())
    units = UNIT.findall(text)
    for place in range(1, len(units)):                 # a consonant with asat ends the syllable before it
        if ASAT in units[place] and len(units[place]) < 4:
            units[place - 1:place + 1] = units[place - 1] + units[place], ""
    return " ".join(filter(None, units)).replace(f" {STACK} ", STACK).split()


@functools.cache
def word_segmenter(code: str) -> tuple:
    """(text -> words, name) for a language written without spaces, as XL-Sum splits it; () for any other, and
    where its package is not installed."""
    try:
        if code in ("zho_simpl", "zho_trad"):
            import jieba
            return lambda text: list(jieba.cut(text)), "jieba"
        if code == "tha":
            from pythainlp.tokenize import word_tokenize
            return lambda text: word_tokenize(text, engine="newmm"), "pythainlp"
        if code == "jpn":
            from fugashi import Tagger
            tagger = Tagger("-O wakati -b 50000")
            return lambda text: tagger.parse(text).split(), "fugashi"
    except (ImportError, RuntimeError):                # fugashi without a dictionary raises RuntimeError
        return ()
    return (burmese, "burmese") if code == "mya" else ()
