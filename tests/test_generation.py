"""Generation and scoring: against transformers, against one prompt at a time, and on ranks that end at other times."""

import contextlib
import io
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from minixllm import distributed, generation
from minixllm import generate as command
from minixllm.data.prompts import alpaca
from minixllm.errors import UserError
from minixllm.generation import Sampling, choice_logps, generate, generate_text
from minixllm.models.bloom import Bloom, BloomConfig
from minixllm.models.llama import Llama, LlamaConfig
from minixllm.tokenizers.sentencepiece import train_sentencepiece
from minixllm.weights import adapters, hf_directory

from conftest import ROOT

V = 101


class Bytes:
    """A tokenizer of bytes: as awkward for streaming as they come."""

    eos_id = None

    def stream(self):
        import codecs
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        class Stream:
            push = staticmethod(lambda i: decoder.decode(bytes([i])))
            flush = staticmethod(lambda: decoder.decode(b"", True))
        return Stream()


class NoEos:
    eos_id = None


def pair(kind, **settings):
    """The same random model, ours and transformers'."""
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=V, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                                          num_attention_heads=6, num_key_value_heads=2, head_dim=8, pad_token_id=0,
                                          eos_token_id=None, **settings)
        theirs, ours = transformers.LlamaForCausalLM(config), Llama(LlamaConfig.from_dict(config.to_dict()))
    else:
        config = transformers.BloomConfig(vocab_size=V, hidden_size=48, n_layer=2, n_head=int(kind[6:]),
                                          pad_token_id=0, eos_token_id=None, **settings)
        theirs, ours = transformers.BloomForCausalLM(config), Bloom(BloomConfig.from_dict(config.to_dict()))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def random_prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, V, (n,), generator=generator).tolist() for n in lengths]


LENGTHS = (5, 1, 17, 9, 30, 2, 8)


@pytest.mark.parametrize("kind", ["llama", "bloom 4", "bloom 6"])
def test_greedy_equals_transformers_alone_and_refilled(kind):
    ours, theirs = pair(kind)
    prompts = random_prompts(*LENGTHS)
    expected = [theirs.generate(torch.tensor([p]), max_new_tokens=15, do_sample=False)[0, len(p):].tolist()
                for p in prompts]
    assert generate(ours, NoEos, prompts, 15, batch_tokens=3 * 45) == expected
    assert [generate(ours, NoEos, [p], 15, batch_tokens=1)[0] for p in prompts] == expected  # room for one at least


def test_eos_ends_rows_and_makes_room():
    """With frequent ends, rows are dropped and refilled all the time; no answer holds an EOS or goes past it."""
    ours, _ = pair("llama")
    prompts = random_prompts(*LENGTHS * 3)
    free = generate(ours, NoEos, prompts, 12)
    eos = free[0][3]

    class Eos:
        eos_id = eos
    expected = [answer[:answer.index(eos)] if eos in answer else answer for answer in free]
    assert any(len(answer) < 12 for answer in expected) and any(len(answer) == 12 for answer in expected)
    finished = {}
    assert generate(ours, Eos, prompts, 12, batch_tokens=4 * 42, finished=finished.__setitem__) == expected
    assert finished == dict(enumerate(expected))

    chat = LlamaConfig.from_dict(ours.config.to_dict() | {"eos_token_id": [V - 1, eos]})  # LLaMA 3 has several
    ours.config = chat
    assert [a[:a.index(V - 1)] if V - 1 in a else a for a in expected] == generate(ours, NoEos, prompts, 12)


def test_a_continuation_ends_where_its_reader_has_enough():
    """And the others go on, as they would have without."""
    ours, _ = pair("llama")
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    whole = generate(ours, NoEos, prompts, 8)
    seen = []
    cut = generate(ours, NoEos, prompts, 8, finished=lambda i, ids: seen.append((i, len(ids))),
                   until=lambda i, ids: i == 1 and len(ids) == 3)
    assert cut == [whole[0], whole[1][:3], whole[2]]
    assert seen[0] == (1, 3) and sorted(seen[1:]) == [(0, 8), (2, 8)]


def test_prompts_enter_by_budget(monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 20)
    ours, _ = pair("llama")
    widest = []
    forward = ours.forward
    ours.forward = lambda ids, *args, **kwargs: widest.append(len(ids)) or forward(ids, *args, **kwargs)
    prompts = random_prompts(*LENGTHS)
    answers = generate(ours, NoEos, prompts, 5)
    assert max(widest) == 30  # the one that is longer by itself
    assert sorted(widest)[-2] <= 20
    monkeypatch.undo()
    assert answers == generate(ours, NoEos, prompts, 5)


def test_sampling_does_not_depend_on_company():
    ours, _ = pair("bloom 6")
    prompts = random_prompts(*LENGTHS)
    how = dict(temperature=1.3, top_k=50, top_p=0.9)
    answers = generate(ours, NoEos, prompts, 12, batch_tokens=2 * 42, **how)
    assert answers == generate(ours, NoEos, prompts, 12, batch_tokens=7 * 42, **how)
    assert answers[:3] == generate(ours, NoEos, prompts[:3], 12, **how)
    assert [answer[:5] for answer in answers] == generate(ours, NoEos, prompts, 5, **how)
    assert answers != generate(ours, NoEos, prompts, 12, seed=1, **how)
    twins = generate(ours, NoEos, prompts[:1] * 2, 12, **how)
    assert twins[0] == answers[0] != twins[1]  # samples of one prompt differ


PROBS = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize("how, support", [
    (dict(), [0, 1, 2, 3, 4]),
    (dict(top_k=2), [1, 3]),
    (dict(top_k=9), [0, 1, 2, 3, 4]),
    (dict(top_p=0.84), [1, 3, 4]),        # 0.4 + 0.25 do not hold it, with 0.2 they do
    (dict(top_p=0.86), [1, 2, 3, 4]),
    (dict(top_p=0.01), [1]),              # the likeliest always stays
    (dict(top_k=3, top_p=0.7), [1, 3]),   # of the 0.85 that are left, 0.65 hold 0.76
    (dict(temperature=0.5), [0, 1, 2, 3, 4]),
])
@pytest.mark.parametrize("nucleus", [1024, 2])
def test_sampling_distribution(how, support, nucleus, monkeypatch):
    """Over evenly spread random numbers each token comes up as often as its probability says, and no other ever."""
    monkeypatch.setattr(generation, "NUCLEUS", nucleus)
    sampling = Sampling(**{"temperature": 1.0, **how})
    n = 10_000
    uniform = [i / n for i in range(n)]
    logits = torch.tensor(PROBS).log().float().expand(n, -1) + 3.0
    drawn = np.bincount(sampling.choose(logits, uniform), minlength=5) / n
    expected = np.where(np.isin(range(5), support), PROBS ** (1 / sampling.temperature), 0)
    assert set(np.flatnonzero(drawn)) == set(support)
    np.testing.assert_allclose(drawn, expected / expected.sum(), atol=2 / n)


def test_sampling_never_takes_the_impossible():
    """The greatest random number there is meets a vocabulary whose last tokens cannot come."""
    logits = torch.randn(300, 50)
    logits[:, 0] = -torch.inf
    logits[:, 40:] = -torch.inf
    for uniform in (0.0, 1 - 2**-24):
        for how in (dict(), dict(top_k=45), dict(top_p=1.0)):
            chosen = Sampling(temperature=1.0, **how).choose(logits, [uniform] * 300)
            assert 0 < min(chosen) and max(chosen) < 40
    for how in (dict(), dict(top_p=0.9), dict(top_k=2)):  # nor does a quotient beyond the type's range
        for temperature in (1e-39, 1e-300):
            assert Sampling(temperature, **how).choose(torch.tensor([[1.0, -2.0, 3.0, 0.0]]), [0.5]) == [2]
    draws = Sampling(seed=3).uniform(2, 100_000)
    assert 0 <= min(draws) and max(draws) < 1 and draws == Sampling(seed=3).uniform(2, 100_000)


@pytest.mark.parametrize("how", [{}, {"top_k": 2}, {"top_p": 1.0}], ids=str)
def test_bf16_logits_are_compared_in_fp32(how):
    n, apart = 10_000, 2 + 2**-7  # which bf16 would round to 2
    logits = torch.tensor([2, 2 - apart]).bfloat16().expand(n, -1)
    drawn = Sampling(temperature=1.0, **how).choose(logits, [i / n for i in range(n)])
    assert sum(drawn) / n == pytest.approx(1 / (1 + np.exp(apart)), abs=2 / n)


def test_streaming_holds_back_incomplete_characters():
    """Pieces of UTF-8. The model is one that continues the text byte by byte."""
    text = "né नमस्ते 🙂"
    data = text.encode()

    class Reciter(nn.Module):
        config = LlamaConfig(256, 8, 8, 1, 1, eos_token_id=None)

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, context, positions):
            place = context.position_ids[positions]
            return nn.functional.one_hot(torch.tensor([data[p] for p in place]), 256).float()

    pieces = list(generate_text(Reciter(), Bytes(), [0], len(data)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert pieces == list(text)
    assert "".join(generate_text(Reciter(), Bytes(), [0], len(data) - 1)).endswith(" \ufffd")  # cut inside a character


@pytest.mark.parametrize("kind", ["llama", "bloom 6"])
def test_scores_equal_transformers(kind):
    ours, theirs = pair(kind)
    contexts = random_prompts(5, 1, 17, 9)
    choices = [random_prompts(3, 6), random_prompts(1, 1, 1), random_prompts(2), random_prompts(4, 1)]
    items = list(zip(contexts, choices))
    with torch.no_grad():
        def alone(context, choice):
            logps = theirs(torch.tensor([context + choice])).logits[0].log_softmax(-1)
            return sum(logps[len(context) - 1 + i, token].item() for i, token in enumerate(choice))
        expected = [[alone(context, choice) for choice in choices] for context, choices in items]
    for batch_tokens in (4096, 25, 1):
        for got, wanted in zip(choice_logps(ours, items, batch_tokens), expected, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert [len(batch) for batch in generation._by_tokens(items, 33)] == [2, 2] and choice_logps(ours, []) == []


def test_score_refuses_what_has_no_likelihood():
    """A choice of no tokens would win every time."""
    ours, _ = pair("llama")
    with pytest.raises(ValueError, match="item 1: an empty choice"):
        choice_logps(ours, [([1], [[2]]), ([1], [[2], []])])
    with pytest.raises(ValueError, match="item 0: an empty context"):
        choice_logps(ours, [([], [[2]])])


@pytest.mark.parametrize("prompts, how, message", [
    ([[]], {}, "prompt 0: expected one or more token ids from 0 to 100, found none"),
    ([[1], [2, V]], {}, "prompt 1: .* found 2 to 101"),
    ([[-1]], {}, "found -1 to -1"),
    ([[1]], {"temperature": -1.0}, "temperature: found -1.0, expected a number of at least 0"),
    ([[1]], {"temperature": float("nan")}, "temperature: found nan"),
    ([[1]], {"temperature": float("inf")}, "temperature: found inf"),
    ([[1]], {"top_k": 0}, "top_k: found 0"),
    ([[1]], {"top_p": 0.0}, "top_p: found 0.0, expected a number above 0 and at most 1"),
    ([[1]], {"top_p": 1.1}, "top_p: found 1.1"),
    ([[1]], {"seed": -1}, "seed: found -1"),
    ([[1]], {"seed": [-1]}, "seed: found -1, expected a whole number of at least 0"),
    ([[1]], {"seed": [1, 2]}, "seed holds 2, expected one for each of 1 prompts"),
    ([[1]], {"batch_tokens": 0}, "^batch_tokens: found 0, expected"),
])
def test_bad_input(prompts, how, message):
    ours, _ = pair("llama")
    with pytest.raises(UserError, match=message):
        generate(ours, NoEos, prompts, 3, **how)


def test_prompts_may_have_seeds_of_their_own():
    """Each is then answered as if it were asked alone."""
    ours, _ = pair("llama")
    prompts, seeds = [[1, 2], [1, 2], [9], [1, 2]], [5, 6, 7, 5]
    found = generate(ours, NoEos, prompts, 9, temperature=1.0, seed=seeds)
    assert found == [generate(ours, NoEos, [prompt], 9, temperature=1.0, seed=seed)[0]
                     for prompt, seed in zip(prompts, seeds)]
    assert found[0] == found[3] != found[1]


def test_training_goes_on_as_before():
    """Sampling from a model in training leaves its mode, its layers and its gradients as they were."""
    ours, _ = pair("llama")
    ours.train()
    assert generate(ours, NoEos, [], 3) == []
    pieces = generation._tokens(ours, NoEos, [[1, 2], [3]], 4, 12, Sampling())
    next(pieces)  # in the midst of generating, too
    assert not ours.training
    with torch.enable_grad():
        ours(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[2, 3, 4]])).sum().backward()
    expected = ours.lm_head.weight.grad.clone()
    pieces.close()
    assert ours.training and not any("forward" in vars(module) for module in ours.modules())
    ours.zero_grad()
    ours(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[2, 3, 4]])).sum().backward()
    assert torch.equal(expected, ours.lm_head.weight.grad)


@pytest.mark.parametrize("gathered", [False, True])
def test_one_process_that_computes_in_bf16_generates_as_a_bf16_model(gathered):
    plain = pair("llama")[0].bfloat16()
    model = distributed.shard(pair("llama")[0], distributed.setup("cpu"), torch.bfloat16)
    prompts = random_prompts(6, 2, 8, 1, 5)
    with distributed.gathered(model) if gathered else contextlib.nullcontext():
        assert generate(model, NoEos, prompts, 9) == generate(plain, NoEos, prompts, 9)


SHARDED = textwrap.dedent("""
    import sys
    from datetime import timedelta
    import torch, torch.distributed as dist
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))  # a hang is an error
    from minixllm import distributed
    from minixllm.generation import choice_logps, generate
    from minixllm.settings import run
    from tests.test_generation import NoEos, pair, random_prompts

    world = distributed.setup("cpu")
    plain, _ = pair("llama")
    prompts = random_prompts(30, 2, 8, 1, 5)
    alone = generate(plain, NoEos, prompts, 12, batch_tokens=2 * 42, temperature=1.0)
    class Eos: eos_id = alone[0][2]  # rank 0's longest prompt ends early, others at other times
    alone = generate(plain, Eos, prompts, 12, batch_tokens=2 * 42, temperature=1.0)
    items = [([1, 2, 3], [[4], [5, 6]])] * 2
    scores = choice_logps(plain, items)
    sharded = distributed.shard(pair("llama")[0], world, torch.float32).train()
    before = generate(sharded, Eos, prompts, 12, batch_tokens=2 * 42, temperature=1.0)
    one = generate(sharded, Eos, prompts[:1], 12, temperature=1.0)  # the second rank has nothing to do
    ids = torch.tensor([[1, 2, 3, 4]])
    sharded(ids, labels=ids).sum().backward()  # weights gathered for generation serve training
    after = generate(sharded, Eos, prompts, 12, batch_tokens=2 * 42, temperature=1.0)
    assert alone == before == after and one == alone[:1], (alone, before, after, one)
    with distributed.gathered(sharded):  # each rank by itself
        assert alone == generate(sharded, Eos, prompts, 12, batch_tokens=2 * 42, temperature=1.0)
    assert len(set(map(len, alone))) > 1
    torch.testing.assert_close(choice_logps(sharded, items), scores, rtol=1e-5, atol=1e-5)
    assert sharded.training
    print("agreed", world.rank)
    dist.destroy_process_group()
    run(lambda argv: None)  # ends the process before gloo's threads can abort it
""")


def test_sharded_ranks_end_at_different_times(torchrun, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    assert torchrun(2, script).stdout.count("agreed") == 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = ["Below is an instruction that describes a task.", "né नमस्ते", "The capital of France is Paris"] * 9
    tokenizer = train_sentencepiece(words, folder / "trained" / "tokenizer.model", 330)
    torch.manual_seed(1)
    model = Llama(LlamaConfig(tokenizer.vocab_size, 16, 16, 1, 2, eos_token_id=tokenizer.eos_id))
    with torch.no_grad():
        model.lm_head.weight.normal_(std=3.0)
    hf_directory.save_model(model, folder / "saved", tokenizer)
    return folder / "saved"


def test_command_prints_as_it_goes(directory, capsys):
    command.main(["--model", str(directory), "--max-new-tokens", "9", "The capital", "né"])
    model, tokenizer = adapters.load(directory)
    prompts = [tokenizer.encode(alpaca(text), add_special_tokens=True) for text in ("The capital", "né")]
    answers = [tokenizer.decode(ids) for ids in generate(model, tokenizer, prompts, 9)]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)
    sampled = ["--temperature", "2", "--top-k", "300", "--top-p", "0.99", "--seed", "5", "--raw", "The capital"]
    command.main(["--model", str(directory), "--max-new-tokens", "9", *sampled])
    prompt = tokenizer.encode("The capital", add_special_tokens=True)
    [ids] = generate(model, tokenizer, [prompt], 9, temperature=2.0, top_k=300, top_p=0.99, seed=5)
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


@pytest.mark.parametrize("argv, message", [
    (["--model", "nowhere", "hello"], "nowhere"),
    (["--raw", "--input", "x", "--model", "DIR", "hello"], "--raw leaves out"),
    (["hello"], "--model is needed"),
    (["--model", "DIR", "--top-p", "2", "--temperature", "1", "hello"],
     "--top-p: found 2.0, expected a number above 0 and at most 1"),
    (["--model", "DIR", "--top-k", "5", "hello"], "expected a --temperature above 0"),
    (["--modle", "DIR", "hello"], "unknown flag --modle: did you mean --model"),
    (["--model", "DIR", "--max-new-tokens", "0", "hello"],
     "^--max-new-tokens: found 0, expected a whole number of at least 1"),
    (["--model", "DIR", "--device", "cuda", "hello"], "--device cuda: PyTorch finds no CUDA GPU"),
])
def test_command_names_mistakes(argv, message, directory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        command.main([str(directory) if word == "DIR" else word for word in argv])


def test_command_reads_lines_skips_blank_ones_and_warns_of_long_ones(directory, capsys, monkeypatch):
    lines = ["The capital", "", "   ", "né", "The capital " * 600, ""]
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    command.main(["--model", str(directory), "--max-new-tokens", "3", "--raw"])
    printed = capsys.readouterr()
    command.main(["--model", str(directory), "--max-new-tokens", "3", "--raw", "The capital", "né"])
    assert printed.out.startswith(capsys.readouterr().out) and printed.out.count("\n") == 3
    [warned] = printed.err.splitlines()
    assert re.fullmatch(r"the prompt has [\d,]+ tokens, but the model was trained on 2,048 positions: .*", warned)


@pytest.mark.parametrize("argv, status, said", [(["--help"], 0, "--max-new-tokens"), (["--top-k", "x"], 2, "top-k"),
                                                (["--model", "x", "--raw", "--input", "x"], 2, "--raw leaves out")])
def test_command_needs_no_torch_for_help_and_wrong_flags(argv, status, said):
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['generate', *{argv!r}]; " \
           "from minixllm.generate import main, run; run(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stderr


def test_command_needs_no_parts_of_torch_that_take_a_second_to_import(directory):
    code = "import sys; sys.modules |= dict.fromkeys(['sympy', 'torch._dynamo', 'torch.distributed.tensor']); " \
           f"from minixllm.generate import main; main(['--model', {str(directory)!r}, '--max-new-tokens', '3', 'né'])"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("how", [{"top_p": 0.9}, {"top_k": 20}, {"top_k": 20, "top_p": 0.8}], ids=str)
def test_a_draw_does_not_depend_on_the_other_rows(how):
    """Among equal logits, of which bf16 has many, too; and where a row's nucleus is wider than its neighbour's."""
    torch.manual_seed(0)
    peaked, flat = (torch.randn(2000) * 3).round(), torch.randn(2000) / 4
    rows = torch.stack([peaked, flat, peaked.flip(0), flat * 0]).bfloat16()
    sampling = Sampling(temperature=0.9, **how)
    for uniform in torch.rand(50, 4).tolist():
        assert sampling.choose(rows, uniform) == [sampling.choose(row[None], [u])[0] for row, u in zip(rows, uniform)]
