"""Scores of texts against references: BLEU, chrF, ROUGE, exact match, accuracy, off-target rate. Pure functions.

All n-gram scores rest on one function, `matches`, which counts clipped n-gram matches for a whole corpus at once.
"""

import functools
import hashlib
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np

from minixllm.errors import UserError
from minixllm.evaluation.significance import Score, mean, signed

# ---- n-gram matches -------------------------------------------------------------------------------------------------

def matches(hypotheses, references, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n-grams of each hypothesis, of its reference, and in both (each as often as the rarer side has it).

    hypotheses, references: two lists of S sequences of symbols; a string is a sequence of characters.
    Returns three (S, order) integer arrays, column n-1 for n-grams.

    n-grams are numbered by pairs (number of the (n-1)-gram, next symbol), where the 0-gram is the item itself: equal
    numbers are equal n-grams of the same item. Only an n-gram that matched can grow into one that matches.
    """
    items = len(hypotheses)
    if items != len(references):
        raise ValueError(f"{items} hypotheses but {len(references)} references")
    sequences = [*hypotheses, *references]
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    symbols, vocabulary = _number(sequences)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(symbols))    # symbols from here to its sequence's end
    sequence = np.repeat(np.arange(2 * items), lengths)
    totals = np.maximum(lengths[:, None] - np.arange(order), 0)                # (2S, order)
    matched = np.zeros((items, order), dtype=np.int64)

    where = np.arange(len(symbols))                                            # where n-grams that may match start
    gram = sequence % max(items, 1)
    for n in range(order):
        fits = left[where] > n
        where, gram = where[fits], gram[fits]
        grams, gram = np.unique(gram * vocabulary + symbols[where + n], return_inverse=True)
        of_hypothesis = sequence[where] < items
        in_hypothesis = np.bincount(gram[of_hypothesis], minlength=len(grams))
        in_reference = np.bincount(gram[~of_hypothesis], minlength=len(grams))
        in_both = np.minimum(in_hypothesis, in_reference)
        item_of_gram = np.zeros(len(grams), dtype=np.int64)
        item_of_gram[gram] = sequence[where] % max(items, 1)
        matched[:, n] = np.bincount(item_of_gram, weights=in_both, minlength=items)[:items]
        alive = in_both[gram] > 0
        where, gram = where[alive], gram[alive]
    return totals[:items], totals[items:], matched


def _number(sequences) -> tuple[np.ndarray, int]:
    """The symbols of all sequences end to end, as numbers below the second value."""
    if all(isinstance(s, str) for s in sequences):
        codes = np.frombuffer("".join(sequences).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)
        return codes, sys.maxunicode + 1
    numbers = {}
    codes = np.array([numbers.setdefault(symbol, len(numbers)) for s in sequences for symbol in s], dtype=np.int64)
    return codes, max(len(numbers), 1)


# ---- BLEU -----------------------------------------------------------------------------------------------------------

def _punctuation_13a(text: str) -> list[str]:
    """The language-independent part of NIST's mteval-v13a: set punctuation apart, but not 1,000.5 nor co-operate."""
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", text)
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def tokenize_13a(text: str) -> list[str]:
    """sacreBLEU's default, WMT's mteval-v13a. It does not segment text written without spaces."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    return _punctuation_13a(f" {text} ")


# U+2001 to U+2A6D is no Chinese: sacreBLEU writes U+20000 to U+2A6D6 so, and scores are compared with its own.
_CHINESE = re.compile("([\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\u2001-\u2a6d\u2f81-\u2fa1"
                      "\uff00-\uffef\u2e80-\u2eff\u3000-\u303f\u31c0-\u31ef\u2f00-\u2fdf\u2ff0-\u2fff\u3100-\u312f"
                      "\u31a0-\u31bf\ufe10-\ufe1f\ufe30-\ufe4f\u2600-\u26ff\u2700-\u27bf\u3200-\u32ff\u3300-\u33ff])")


def tokenize_zh(text: str) -> list[str]:
    """sacreBLEU's `zh`: each Chinese character alone, the rest as 13a."""
    return _punctuation_13a(_CHINESE.sub(r" \1 ", text.strip()))


def tokenize_char(text: str) -> list[str]:
    """sacreBLEU's `char`: every character that is not white space."""
    return list("".join(text.split()))


@functools.cache
def _sentencepiece(path: Path):
    import sentencepiece
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: expected {', '.join(TOKENIZERS)} or a SentencePiece model to tokenise for BLEU: "
                        f"{error}") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return lambda text: " ".join(model.encode(text.rstrip(), out_type=str)).split(), f"{path.stem}[{digest}]"


TOKENIZERS = {"13a": tokenize_13a, "zh": tokenize_zh, "char": tokenize_char}


def bleu_tokenizer(name: str | Path):
    """(text -> tokens, its name) of "13a", "zh", "char", or the path of a SentencePiece model."""
    return (TOKENIZERS[name], name) if name in TOKENIZERS else _sentencepiece(Path(name))


def _bleu(sums: np.ndarray) -> np.ndarray:
    """sums (..., 10): lengths of hypotheses and references, n-grams matched and in all, n = 1 to 4 -> BLEU (...).

    Papineni et al. 2002, smoothed as in mteval-v13a (Chen and Cherry 2014, method 3): the k-th order without a match
    counts as 1 / 2^k matches. 0 without any match, or without a 4-gram in the hypotheses.
    """
    hypothesis, reference, matched, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    smoothed = np.where(matched > 0, matched, 0.5 ** np.cumsum(matched == 0, -1))
    precision = np.exp(np.mean(np.log(smoothed / np.maximum(total, 1)), -1))
    brevity = np.exp(np.minimum(1 - reference / np.maximum(hypothesis, 1), 0))
    return np.where((matched.sum(-1) > 0) & (total[..., 3] > 0), 100 * brevity * precision, 0.0)


def bleu(hypotheses: list[str], references: list[str], tokenizer: str | Path = "13a") -> Score:
    """Corpus BLEU, case-sensitive, as sacreBLEU gives it.

    tokenizer: as `bleu_tokenizer` takes it (the published flores101 or flores200 model, for one).
    """
    tokenize, name = bleu_tokenizer(tokenizer)
    hypothesis, reference, matched = matches([tokenize(h) for h in hypotheses], [tokenize(r) for r in references], 4)
    statistics = np.concatenate([hypothesis[:, :1], reference[:, :1], matched, hypothesis], 1)
    return Score(signed("BLEU", nrefs=1, case="mixed", eff="no", tok=name, smooth="exp"), statistics, _bleu)


# ---- chrF -----------------------------------------------------------------------------------------------------------

def _chrf_words(text: str) -> list[str]:
    """Words with one mark of punctuation split off, at the end if there is one, else at the start (Popović 2017)."""
    words = []
    for word in text.split():
        if len(word) > 1 and word[-1] in _ASCII_PUNCTUATION:
            words += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in _ASCII_PUNCTUATION:
            words += [word[0], word[1:]]
        else:
            words.append(word)
    return words


_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def _chrf(sums: np.ndarray) -> np.ndarray:
    """sums (..., 3 N): n-grams of hypotheses, of references, in both, for each of N orders -> chrF (...), beta = 2.

    Orders that either side lacks altogether do not count; precision and recall are averaged over the others.
    """
    hypothesis, reference, matched = np.split(sums, 3, axis=-1)
    counted = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(counted.sum(-1), 1)
    precision = (counted * matched / np.maximum(hypothesis, 1)).sum(-1) / orders
    recall = (counted * matched / np.maximum(reference, 1)).sum(-1) / orders
    return 100 * 5 * precision * recall / np.where(precision + recall > 0, 4 * precision + recall, 1)


def chrf(hypotheses: list[str], references: list[str], word_order: int = 0) -> Score:
    """Corpus chrF (Popović 2015) of characters 1 to 6 without white space; word_order 2 is chrF++ (Popović 2017)."""
    hypothesis, reference, matched = matches(["".join(h.split()) for h in hypotheses],
                                             ["".join(r.split()) for r in references], 6)
    if word_order:
        words = matches([_chrf_words(h) for h in hypotheses], [_chrf_words(r) for r in references], word_order)
        both = zip((hypothesis, reference, matched), words)
        hypothesis, reference, matched = (np.concatenate(pair, 1) for pair in both)
    # as sacreBLEU: an order that the reference lacks does not count against the hypothesis
    statistics = np.concatenate([hypothesis * (reference > 0), reference, matched], 1)
    name = "chrF2" + "+" * word_order
    return Score(signed(name, nrefs=1, case="mixed", eff="yes", nc=6, nw=word_order, space="no"), statistics, _chrf)


# ---- ROUGE ----------------------------------------------------------------------------------------------------------

# scripts written without spaces: kana; Thai and Lao; Myanmar; Khmer. (XL-Sum itself splits Chinese characters.)
_UNSPACED = re.compile("[\u3040-\u30ff\u31f0-\u31ff\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff]")
_IDEOGRAPH = re.compile("[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002ceaf\uf900-\ufaff"
                        "\U0002f800-\U0002fa1f]")


class _Kinds(dict):
    """Character -> its kind, one letter: Letter, Number, Mark, Symbol, Character that is a token, " " or Dropped."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        major = unicodedata.category(character)[0]
        if character in "\t\n\r" or major in "PZ" or character in _ASCII_PUNCTUATION:
            kind = " "
        elif major == "C" or character == "\ufffd":
            kind = "D"
        elif _UNSPACED.match(character) and major != "N" or _IDEOGRAPH.match(character):
            kind = "C"
        else:
            kind = major
        self[code] = kind
        return kind


_KINDS = _Kinds()
_TOKEN = re.compile(r"C|L[LM]*|N[NM]*|SM*|M+")


def tokenize_xlsum(text: str, segment=None) -> list[str]:
    """Tokens of the multilingual ROUGE of XL-Sum (Hasan et al. 2021), without stemming.

    Lower case; control and format characters are dropped, punctuation separates; words, numbers and symbols stand
    apart, and ideographs one by one. Scripts written without spaces are split into characters, or by
    segment(text) -> words where given (XL-Sum itself uses jieba, fugashi, pythainlp and rules for zh, ja, th and my).
    """
    text = text.lower()
    kinds = text.translate(_KINDS)
    if "D" in kinds:
        text = "".join(character for character, kind in zip(text, kinds) if kind != "D")
        kinds = kinds.replace("D", "")
    if segment:
        clean = " ".join("".join(" " if kind == " " else character for character, kind in zip(text, kinds)).split())
        if words := [word for word in segment(clean) if word]:
            return words
    return [text[m.start():m.end()] for m in _TOKEN.finditer(kinds)]


def lcs_length(first, second) -> int:
    """Length of the longest common subsequence, a row of the table at a time in one long integer (Hyyrö 2004)."""
    masks = {}
    for i, symbol in enumerate(first):
        masks[symbol] = masks.get(symbol, 0) | 1 << i
    full = row = (1 << len(first)) - 1                 # zeros mark where the length grows
    for symbol in second:
        matching = row & masks.get(symbol, 0)
        row = (row + matching | row - matching) & full
    return len(first) - row.bit_count()


def rouge(hypotheses: list[str], references: list[str], segment=None, segment_name: str = "") -> dict[str, Score]:
    """Multilingual ROUGE-1, -2 and -L (Lin 2004): {"rouge1": Score, ...}, the mean of the items' F1.

    segment: see `tokenize_xlsum`; segment_name goes into the signature.
    """
    hypotheses, references = ([tokenize_xlsum(text, segment) for text in texts] for texts in (hypotheses, references))
    tokens = f"xlsum-{(segment_name or 'words') if segment else 'char'}"
    hypothesis, reference, matched = matches(hypotheses, references, 2)
    longest = np.array([lcs_length(h, r) for h, r in zip(hypotheses, references)], dtype=np.int64)
    counts = {"rouge1": (hypothesis[:, 0], reference[:, 0], matched[:, 0]),
              "rouge2": (hypothesis[:, 1], reference[:, 1], matched[:, 1]),
              "rougeL": (hypothesis[:, 0], reference[:, 0], longest)}
    scores = {}
    for name, (in_hypothesis, in_reference, in_both) in counts.items():
        f1 = 2 * in_both / np.maximum(in_hypothesis + in_reference, 1)
        scores[name] = mean(f1, signed(name, measure="F1", tok=tokens, stem="no"))
    return scores


# ---- answers and languages ------------------------------------------------------------------------------------------

def accuracy(answers: list, labels: list) -> Score:
    """Share of answers equal to their labels; None, an answer that could not be read, is wrong."""
    return mean([answer is not None and answer == label for answer, label in zip(answers, labels, strict=True)],
                signed("accuracy", unparsed="wrong"), is_share=True)


def exact_match(hypotheses: list[str], references: list[str]) -> Score:
    """Share of hypotheses equal to their reference, white space at the ends aside."""
    return mean([h.strip() == r.strip() for h, r in zip(hypotheses, references, strict=True)],
                signed("exact_match", case="mixed", strip="ends"), is_share=True)


def off_target(outputs: list[str], language: str, is_in, identifier: str) -> Score:
    """Share of outputs that are not in the asked language (Zhang et al. 2020); an empty output is in none.

    is_in(text, language): what an identifier of languages says; identifier: its name, for the signature.
    """
    return mean([not (output.strip() and is_in(output, language)) for output in outputs],
                signed("off_target", lid=identifier), is_share=True)
