"""Losses as pure functions."""

import torch
import torch.nn.functional as F


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
