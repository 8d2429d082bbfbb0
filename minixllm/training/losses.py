"""The losses of both trainings, and the log-probabilities they are made of."""

import torch
import torch.nn.functional as F

from minixllm.models.attention import Packed, to_device


def label_logps(model, batch) -> torch.Tensor:
    """(N,) fp32: the log-probability of each label of a `stream.Batch`, 0 where a token has no label."""
    device = model.embedding.weight.device
    return model(to_device(batch.input_ids, device), Packed(batch.documents, device), to_device(batch.labels, device))


def answer_logps(model, batch) -> torch.Tensor:
    """(answers,) fp32: the summed log-probability of each answer with its EOS: one a record, or two a pair."""
    lengths = []
    for document in batch.documents:
        if isinstance(document, int):
            lengths.append(document)
        else:  # the trunk has no labels, so its zeros can be summed with the first branch
            trunk, (first, *others) = document
            lengths += [trunk + first, *others]
    # Summed by splitting and not by index: a GPU adds by index in no fixed order, and a resumed run would differ.
    sums = torch.stack([answer.sum() for answer in label_logps(model, batch).split(lengths)])
    return sums if batch.records else sums[:0]  # an empty batch has no answers


def sft_loss(model, batch):
    """The cross-entropy of a micro-batch's labels, summed: -sum log p(label). -> (loss, {}: nothing else to log)."""
    return -label_logps(model, batch).sum(), {}


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
