"""Words of scripts without spaces, against the tokenizers of XL-Sum's own ROUGE."""

import random
import sys

import pytest

from minixllm.evaluation import segmenters


def test_burmese_units_are_those_of_xlsum(data):
    tokenizers = pytest.importorskip("multilingual_rouge.tokenizers")
    oracle = tokenizers.BurmeseTokenizer()
    texts = [line for name in ("ntrex/mya.txt", "udhr/mya.tsv") if (data / name).exists()
             for line in (data / name).read_text(encoding="utf-8").splitlines()]
    assert len(texts) >= 500
    rng = random.Random(0)
    signs = "ကခဂမရသအ\u102b\u102f\u1036\u1037\u1038\u1039\u1039\u103a\u103a\u103a\u103b\u103d a၁\u200c"
    texts += ["".join(rng.choices(signs, k=rng.randint(0, 12))) for _ in range(3000)]
    for text in texts:
        assert segmenters.burmese(text) == oracle(text), text


def test_burmese_is_segmented_without_a_package():
    assert segmenters.word_segmenter("mya") == (segmenters.burmese, "burmese")
    assert segmenters.burmese("မြန်မာစာ") == ["မြန်", "မာ", "စာ"]
    assert segmenters.word_segmenter("fra") == ()


def test_without_its_package_a_language_is_scored_over_characters(monkeypatch):
    monkeypatch.setitem(sys.modules, "pythainlp.tokenize", None)
    segmenters.word_segmenter.cache_clear()
    assert segmenters.word_segmenter("tha") == () and "tha" in segmenters.PACKAGES
    segmenters.word_segmenter.cache_clear()
