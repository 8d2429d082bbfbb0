"""The preference losses against TRL's trainer and against the formulas in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from minixllm.training.losses import dpo_loss, ipo_loss

BETA = 0.1


def random_logps(seed, pairs=9, lengths=None):
    """Sequence log-probabilities (pairs, 2) of policy and reference, apart by tens of nats as in real runs."""
    generator = torch.Generator().manual_seed(seed)
    policy = -torch.rand(pairs, 2, generator=generator, dtype=torch.float64) * 200
    return policy, policy + torch.randn(pairs, 2, generator=generator, dtype=torch.float64) * 20


def trl_loss(kind, policy, reference, lengths, label_smoothing=0.0):
    """TRL's `_compute_loss` with a model that answers exactly these log-probabilities, all of them on one token."""
    from trl import DPOTrainer

    width = int(lengths.max())
    mask = (torch.arange(width + 1) < (lengths.T.reshape(-1, 1) + 1)).long()  # rows: all chosen, then all rejected
    mask[:, 0] = 0  # one prompt token

    class Model(torch.nn.Module):
        def forward(self, input_ids, labels, **_):
            log_probs = torch.zeros(len(input_ids), width, dtype=policy.dtype)
            return SimpleNamespace(log_probs=torch.cat([policy.T.reshape(-1, 1), log_probs[:, 1:]], dim=1))

    trainer = object.__new__(DPOTrainer)
    done = {}
    trainer.__dict__ |= dict(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=BETA,
        label_smoothing=label_smoothing, use_weighting=False,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: (_ for _ in ()).throw(StopIteration)))

    # `_compute_loss` goes on to log metrics; the loss stands before that, in its frame, when the logging stops it.
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    try:
        trainer._compute_loss(Model(), inputs, return_outputs=False)
    except (StopIteration, RuntimeError, AttributeError) as stop:
        frame = stop.__traceback__
        while frame:
            if frame.tb_frame.f_code.co_name == "_compute_loss":
                done = dict(frame.tb_frame.f_locals)
            frame = frame.tb_next
    return done["loss"]


def with_gradient(loss, logps):
    logps = logps.detach().clone().requires_grad_()
    value = loss(logps).mean()
    return value, torch.autograd.grad(value, logps)[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind, label_smoothing", [("sigmoid", 0.0), ("ipo", 0.0), ("sigmoid", 0.2)])
def test_losses_equal_trl_and_the_formula(seed, kind, label_smoothing):
    policy, reference = random_logps(seed)
    lengths = torch.randint(1, 40, (len(policy), 2), generator=torch.Generator().manual_seed(seed))

    def ours(logps, dtype):
        logps, ref = logps.to(dtype), reference.to(dtype)
        return (ipo_loss(logps, ref, lengths, BETA) if kind == "ipo" else dpo_loss(logps, ref, BETA, label_smoothing))

    def formula(logps):
        if kind == "ipo":
            ratio = (logps - reference) / lengths
            return (ratio[:, 0] - ratio[:, 1] - 1 / (2 * BETA)) ** 2
        ratio = logps - reference
        p = 1 / (1 + torch.exp(-BETA * (ratio[:, 0] - ratio[:, 1])))
        return -(1 - label_smoothing) * p.log() - label_smoothing * (1 - p).log()

    for loss in [formula, *([lambda x: trl_loss(kind, x, reference, lengths)] if label_smoothing == 0 else [])]:
        expected, expected_gradient = with_gradient(loss, policy)
        for dtype in (torch.float64, torch.float32):
            value, gradient = with_gradient(lambda x: ours(x, dtype), policy)
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_conservative_dpo_equals_trl(seed):
    """TRL smooths labels in its "aot" loss, which sorts the batch first: on one pair that is conservative DPO."""
    policy, reference = random_logps(seed, pairs=1)
    lengths = torch.tensor([[3, 5]])
    expected = with_gradient(lambda x: trl_loss("aot", x, reference, lengths, label_smoothing=0.2), policy)
    for found, theirs in zip(with_gradient(lambda x: dpo_loss(x, reference, BETA, 0.2), policy), expected):
        torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6)
    assert expected[1].any()


def test_a_policy_equal_to_its_reference_loses_ln_2():
    policy, _ = random_logps(0)
    assert torch.equal(dpo_loss(policy, policy, BETA), torch.full((len(policy),), math.log(2), dtype=torch.float64))


def test_dpo_sums_and_ipo_averages_over_tokens():
    """Twice the response at the same log-probability a token: DPO's margin doubles, IPO's stays."""
    policy, reference = torch.tensor([[-4.0, -8.0]]), torch.tensor([[-5.0, -6.0]])
    lengths = torch.tensor([[4, 8]])
    assert dpo_loss(2 * policy, 2 * reference, BETA) != dpo_loss(policy, reference, BETA)
    twice = ipo_loss(2 * policy, 2 * reference, 2 * lengths, BETA)
    assert torch.equal(twice, ipo_loss(policy, reference, lengths, BETA))
