"""Losses as pure functions."""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 2**26  # fp32 logits held at once


def token_logps(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the labels: hidden (N, d), weight (V, d), labels (N,) -> (N,) fp32, 0 where a label is -100.

    labels[i] is the token that hidden[i] predicts. The logits (N, V) are never held whole: they are made a chunk of
    tokens at a time, only for tokens that have a label, and made again in the backward.
    """
    return _TokenLogps.apply(hidden, weight, labels)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):
        supervised = (labels != -100).nonzero().squeeze(1)  # (M,)
        logps = torch.zeros(len(labels), dtype=torch.float32, device=hidden.device)
        log_normalisers = torch.empty(len(supervised), dtype=torch.float32, device=hidden.device)
        for rows, chunk in _chunks(supervised, weight):
            logits = F.linear(hidden[rows], weight).float()  # (chunk, V)
            log_normalisers[chunk] = logits.logsumexp(-1)
            logps[rows] = logits.gather(1, labels[rows, None]).squeeze(1) - log_normalisers[chunk]
        ctx.save_for_backward(hidden, weight, labels, supervised, log_normalisers)
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, labels, supervised, log_normalisers = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows, chunk in _chunks(supervised, weight):
            logits = F.linear(hidden[rows], weight).float()
            # d logp / d logits = onehot(label) - softmax(logits)
            grad_logits = logits.sub_(log_normalisers[chunk, None]).exp_().mul_(-grad_logps[rows, None])
            grad_logits.scatter_add_(1, labels[rows, None], grad_logps[rows, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _chunks(supervised, weight):
    """Yields (row numbers of a chunk of supervised tokens, their slice among the supervised)."""
    size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for start in range(0, len(supervised), size):
        yield supervised[start:start + size], slice(start, start + size)
