"""A genuine pretrained checkpoint through the whole code: loader, tokenizer, packed attention, generation."""

import math

import pytest
import torch
import transformers

from minixllm.models.attention import Packed
from minixllm.weights.adapters import load

from real_models import smollm2

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def pair():
    """(our model, our tokenizer, transformers' model, transformers' tokenizer) of the same directory, in fp32."""
    directory = smollm2()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return *load(directory), theirs, transformers.AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def test_logits_equal_transformers(pair):
    ours, tokenizer, theirs, _ = pair
    assert ours.lm_head.weight is ours.embedding.weight
    ids = torch.tensor([tokenizer.encode(PROMPT + " Paris. Its 2,161,000 inhabitants have many names for it.")])
    logits = theirs(ids).logits
    assert (ours(ids) - logits).abs().max() <= 1e-4 * logits.abs().max()


def test_greedy_continuation(pair):
    from minixllm.generation import generate

    ours, tokenizer, theirs, _ = pair
    ids = tokenizer.encode(PROMPT)
    [new] = generate(ours, tokenizer, [ids], max_new_tokens=12)
    assert tokenizer.decode(new).startswith(" Paris.")
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids):].tolist()
    assert new == expected


@torch.no_grad()
def test_perplexity_of_english_udhr(pair, data):
    ours, tokenizer, theirs, their_tokenizer = pair
    lines = (data / "udhr" / "eng.tsv").read_text(encoding="utf-8").splitlines()
    paragraphs = [line.split("\t")[1] for line in lines]
    documents = [tokenizer.encode(text) for text in paragraphs]
    assert documents == [their_tokenizer(text).input_ids for text in paragraphs]
    documents = [ids for ids in documents if len(ids) > 1]

    expected = sum(theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
                   for ids in documents)
    packed = Packed([len(ids) for ids in documents])  # all of them at once, each blind to the others
    ids = torch.tensor([token for document in documents for token in document])
    labels = torch.tensor([token for document in documents for token in (*document[1:], -100)])
    found = -ours(ids, packed, labels).sum().item()
    count = (labels != -100).sum().item()
    assert math.exp(found / count) == pytest.approx(math.exp(expected / count), rel=1e-3)
    assert 5 < math.exp(found / count) < 40  # and a model that has read English
