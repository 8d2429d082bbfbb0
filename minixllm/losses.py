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


def dpo_loss(policy_logps, reference_logps, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): one loss a pair, (P,).

    policy_logps, reference_logps (P, 2): log-probabilities of the chosen and the rejected response, summed over their
    tokens. With D = (log pi_c - log ref_c) - (log pi_r - log ref_r),

        loss = -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)

    where e = `label_smoothing` is the chance that a pair is labelled the wrong way round: above 0 this is conservative
    DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """
    margins = beta * _advantage(policy_logps, reference_logps)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def ipo_loss(policy_logps, reference_logps, lengths, beta: float) -> torch.Tensor:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17): one loss a pair, (P,).

    As `dpo_loss`, but the log-probabilities are averaged over each response's tokens, `lengths` (P, 2), which the
    authors confirmed is how the paper's results were made:  loss = (D - 1 / (2 beta))^2
    """
    return (_advantage(policy_logps / lengths, reference_logps / lengths) - 1 / (2 * beta)) ** 2


def _advantage(policy_logps, reference_logps):
    chosen, rejected = (policy_logps - reference_logps).unbind(1)
    return chosen - rejected
