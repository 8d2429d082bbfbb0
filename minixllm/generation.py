"""Generation with a KV cache, any number of prompts at a time, and the log-probabilities of given continuations.

Nothing is padded. `generate` runs as many prompts at once as its cache has room for, the longest first. When one ends,
the next takes its place ("continuous batching", Yu et al. 2022, Orca): its tokens join the forward in which the others
take one step. A prompt's answer does not depend on the prompts beside it: its random numbers are drawn from the seed
and its place in the list, or from a seed of its own.

A model in training is first gathered, whole on every process (`distributed.gathered`). A process then generates without
the others, and `generate` deals the prompts over them.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from minixllm.distributed import gathered, is_sharded
from minixllm.errors import UserError, expect
from minixllm.models.attention import Packed
from minixllm.models.fused_cpu import fused
from minixllm.models.kv_cache import KVCache

BATCH_TOKENS = 32768   # of the cache: 16 GB for a model of 7B in bf16 on a GPU, 1 GB for one of 60 M on a CPU
PREFILL_TOKENS = 4096  # new prompts join a forward until it has this many tokens, which bounds its memory
SMALLEST = 1e-30       # a lower temperature takes the likeliest token: fp32 cannot divide by such numbers
NUCLEUS = 128          # top_p first looks at so many of the likeliest tokens: sorting them all takes as long as a step


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 takes the likeliest. top_k, and then top_p, narrow the choice.

    top_k: only the k likeliest tokens. top_p: only the fewest likeliest that together hold this share of the
    probability (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1).
    seed: one for all prompts, which then differ by their places in the list, or a list of one for each.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | list[int] = 0

    def __post_init__(self):
        expect(self.temperature, float, "temperature", least=0)
        if self.top_k is not None:
            expect(self.top_k, int, "top_k", least=1)
        if self.top_p is not None:
            expect(self.top_p, float, "top_p", above=0, most=1)
        for seed in self.seed if isinstance(self.seed, list) else [self.seed]:
            expect(seed, int, "seed", least=0)

    def uniform(self, prompt: int, tokens: int) -> list[float]:
        """The random numbers, in [0, 1), that choose the tokens of one prompt."""
        seed = self.seed[prompt] if isinstance(self.seed, list) else [self.seed, prompt]
        return np.random.default_rng(seed).random(tokens, dtype=np.float32).tolist()

    def choose(self, logits: torch.Tensor, uniform: list[float]) -> list[int]:
        """logits (rows, V) and a random number for each row -> a token for each row; no row depends on another."""
        if self.temperature < SMALLEST:
            # by numpy on a CPU, where torch's argmax takes over ten times as long
            return logits.float().numpy(force=True).argmax(-1).tolist() if logits.is_cpu else logits.argmax(-1).tolist()
        uniform = torch.tensor(uniform, device=logits.device)
        if self.top_k is None and self.top_p is None:
            return _draw(self._scaled(logits, logits.amax(-1, keepdim=True)).softmax(-1), uniform).tolist()
        top, tokens = logits.topk(min(self.top_k or NUCLEUS, logits.shape[-1]))  # the likeliest first
        best = top[:, :1]
        total = self._scaled(top if self.top_k else logits, best).logsumexp(-1, keepdim=True)
        probs = (self._scaled(top, best) - total).exp()
        chosen = self._draw_among(tokens, probs, uniform)
        if self.top_k is None and (wider := probs.sum(-1) < self.top_p).any():  # rows whose nucleus is wider than that
            logits, best, total = logits[wider], best[wider], total[wider]
            # by numpy on a CPU, in a third of the time
            tokens = (torch.from_numpy((-logits.float()).numpy().argsort(-1)) if logits.is_cpu
                      else logits.argsort(-1, descending=True))
            probs = (self._scaled(logits.gather(1, tokens), best) - total).exp()
            chosen[wider] = self._draw_among(tokens, probs, uniform[wider])
        return chosen.tolist()

    def _scaled(self, logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """(logits - the likeliest token's) / temperature, in fp32: at most 0, so that no exponential overflows."""
        return (logits.float() - best.float()) / self.temperature

    def _draw_among(self, tokens: torch.Tensor, probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """One of each row's tokens (rows, k), the likeliest first; with top_p one of the nucleus."""
        if self.top_p is not None:
            before = probs.cumsum(-1) - probs
            probs = probs.masked_fill(before >= self.top_p, 0)
        return tokens.gather(1, _draw(probs, uniform)[:, None]).squeeze(1)


def _draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Where the running sum of each row's probabilities (rows, V) first exceeds `uniform` times the whole sum."""
    cumulated = probs.cumsum(-1)
    # uniform is below 1, so that the product is below the whole sum: no token of probability 0 is ever drawn.
    target = uniform[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).squeeze(1)


def generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, batch_tokens: int = BATCH_TOKENS,
             finished=None, until=None, **sampling) -> list[list[int]]:
    """Continues each prompt, token ids to token ids, up to the EOS (left out) or `max_new_tokens`.

    batch_tokens: the KV cache's size. Each prompt takes the room of the longest prompt and answer; one runs at least.
    finished: called as finished(number of the prompt, its continuation) when one ends. until: called in the same way
    after each token; where it is true, the continuation ends there. sampling: the fields of `Sampling`; greedy without.
    A model serves one call at a time, because a call sets its mode and its forwards. With a model sharded by FSDP2 this
    is a collective: every rank passes the same prompts and gets all the continuations, but calls `finished` only for
    its own share. With a plain model each process generates for itself.
    Raises UserError for an empty prompt, a token beyond the vocabulary, or a setting out of range.
    """
    answers = {}
    ended = until and (lambda i: until(i, answers[i]))
    for i, token in _tokens(model, tokenizer, prompts, max_new_tokens, batch_tokens, Sampling(**sampling), ended):
        answer = answers.setdefault(i, [])
        if token is not None:
            answer.append(token)
        elif finished:
            finished(i, answer)
    if _ranks(model) > 1:
        shares = [None] * _ranks(model)
        dist.all_gather_object(shares, answers)
        answers = {i: answer for share in shares for i, answer in share.items()}
    return [answers.get(i, []) for i in range(len(prompts))]


def answer(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, world) -> list[str]:
    """The likeliest continuations as text, with a progress bar. A collective where `generate` is one."""
    with tqdm(total=len(prompts[world.rank::world.size]), unit="answer", disable=not world.first,
              dynamic_ncols=True) as bar:
        return [tokenizer.decode(ids) for ids in generate(model, tokenizer, prompts, max_new_tokens,
                                                          finished=lambda *_: bar.update())]


def generate_text(model, tokenizer, prompt: list[int], max_new_tokens: int, **sampling):
    """Yields the text of `generate`'s answer to one prompt while it is made, in pieces of whole characters."""
    text = tokenizer.stream()
    for _, token in _tokens(model, tokenizer, [prompt], max_new_tokens, BATCH_TOKENS, Sampling(**sampling)):
        if piece := text.flush() if token is None else text.push(token):
            yield piece


@torch.no_grad()
def choice_logps(model, items, batch_tokens: int = 2048) -> list[list[float]]:
    """Log-probabilities of choices: items of (context ids, [choice ids, ...]) -> for each item, one number per choice.

    A context is computed once for all its choices. batch_tokens: the most tokens in one forward, of several items.
    Raises ValueError for an empty choice, whose probability would be 1 and beat every other, and for an empty context:
    the first token must be predicted from something, such as a BOS. With a sharded model this is a collective.
    """
    for number, (context, choices) in enumerate(items):
        if not context or not all(choices):
            raise ValueError(f"item {number}: an empty {'choice' if context else 'context'} cannot be scored")
    device = next(model.parameters()).device
    choices_logps = []
    with _inference(model):
        for batch in _by_tokens(items, batch_tokens):
            documents, input_ids, labels = [], [], []
            for context, choices in batch:
                *trunk, last = context
                documents.append((len(trunk), [len(choice) for choice in choices]))
                input_ids += trunk
                labels += [-100] * len(trunk)
                for choice in choices:  # a branch: the context's last token, and the choice without its last
                    input_ids += [last, *choice[:-1]]
                    labels += choice
            logps = model(torch.tensor(input_ids, device=device), Packed(documents, device),
                          labels=torch.tensor(labels, device=device))
            branches = iter(logps.split([n for trunk, branches in documents for n in (trunk, *branches)]))
            for _, choices in batch:
                next(branches)  # the trunk's zeros
                choices_logps.append([next(branches).sum().item() for _ in choices])
    return choices_logps


def _by_tokens(items, batch_tokens: int):
    """Runs of items of at most `batch_tokens` tokens, or of one item that has more."""
    batch, tokens = [], 0
    for context, choices in items:
        size = len(context) + sum(map(len, choices))
        if batch and tokens + size > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append((context, choices))
        tokens += size
    if batch:
        yield batch


@dataclass
class _Row:
    """A running prompt: its number, the tokens that the model has not seen yet, random numbers for those to come."""

    prompt: int
    unseen: list[int]
    uniform: list[float]  # the last one is next


@torch.no_grad()  # inference_mode would leave FSDP2 with gathered weights that training cannot use
def _tokens(model, tokenizer, prompts, max_new_tokens: int, batch_tokens: int, sampling: Sampling, ended=None):
    """Yields (number of a prompt, next token of its continuation), then (number, None) when it has ended.

    Under FSDP2 only for this rank's share of the prompts. ended(number of a prompt): whether it ends with that token.
    """
    for number, prompt in enumerate(prompts):
        if not prompt or not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise UserError(f"prompt {number}: expected one or more token ids from 0 to {model.config.vocab_size - 1}, "
                            f"found {f'{min(prompt)} to {max(prompt)}' if prompt else 'none'}")
    expect(max_new_tokens, int, "max_new_tokens", least=1)
    expect(batch_tokens, int, "batch_tokens", least=1)
    if isinstance(sampling.seed, list) and len(sampling.seed) != len(prompts):
        raise UserError(f"seed holds {len(sampling.seed)}, expected one for each of {len(prompts)} prompts")
    stop = _stop_ids(model, tokenizer)
    device = next(model.parameters()).device
    ranks = _ranks(model)
    share = range(dist.get_rank() if ranks > 1 else 0, len(prompts), ranks)
    waiting = sorted(share, key=lambda i: len(prompts[i]))  # the longest is last, and is taken first
    capacity = max((len(prompts[i]) for i in waiting), default=0) + max_new_tokens
    cache = KVCache(min(max(1, batch_tokens // capacity), len(waiting)), capacity)
    rows = []
    with _inference(model):
        while rows or waiting:
            tokens = len(rows)
            while waiting and len(rows) < cache.rows and (
                    tokens == 0 or tokens + len(prompts[waiting[-1]]) <= PREFILL_TOKENS):
                i = waiting.pop()
                rows.append(_Row(i, prompts[i], sampling.uniform(i, max_new_tokens)[::-1]))
                tokens += len(prompts[i])
            context = cache.extend([len(row.unseen) for row in rows], device)
            input_ids = torch.tensor([token for row in rows for token in row.unseen], device=device)
            logits = model(input_ids, context, positions=context.last)  # (rows, V)
            chosen = sampling.choose(logits, [row.uniform.pop() for row in rows])
            for row, token in zip(rows, chosen):
                row.unseen = [token]
                if token not in stop:
                    yield row.prompt, token
                if token in stop or not row.uniform or ended and ended(row.prompt):
                    row.unseen = []
                    yield row.prompt, None
            alive = [r for r, row in enumerate(rows) if row.unseen]
            if len(alive) < len(rows):
                rows = [rows[r] for r in cache.keep(alive)]


def _stop_ids(model, tokenizer) -> set[int]:
    """What ends a continuation: the tokenizer's EOS, and those of the model's config (chat models have several)."""
    eos = model.config.eos_token_id
    return {tokenizer.eos_id, *(eos if isinstance(eos, list) else [eos])} - {None}


def _ranks(model) -> int:
    """How many processes share this model."""
    return dist.get_world_size() if is_sharded(model) else 1


@contextlib.contextmanager
def _inference(model):
    """Evaluation mode, whole weights and, on a CPU, fused forwards."""
    training = model.training
    model.eval()
    try:
        with gathered(model), fused(model):
            yield
    finally:
        model.train(training)
