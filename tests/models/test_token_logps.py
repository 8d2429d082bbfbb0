"""Token log-probabilities in chunks, held to a log-softmax over whole logits."""

import pytest
import torch

from minixllm.models import token_logps as token_logps_module
from minixllm.models.token_logps import token_logps


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(token_logps_module.CHUNK_BYTES, "cpu", 0)
    monkeypatch.setattr(token_logps_module, "CHUNK_TOKENS", 3)
    monkeypatch.setattr(token_logps_module, "BLOCK_BYTES", 100)  # of 31 logits: a row at a time


def inputs(N=20, d=8, V=31, dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, d, dtype=dtype).requires_grad_(), torch.randn(V, d, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (N,))
    labels[::3] = -100
    return hidden, weight, labels


def whole(hidden, weight, labels):
    logps = (hidden @ weight.T).float().log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return logps * (labels != -100)


UPSTREAM = {"sum": torch.tensor(-0.25), "mean of means": torch.tensor([1.0] * 9 + [0.1] * 11),
            "each its own": torch.arange(20.0).cos(), "zero": torch.tensor(0.0)}


def check_gradients(found, expected, scale, wanted):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad((found * scale).sum(), wanted),
                    torch.autograd.grad((expected * scale).sum(), wanted)):
        assert (a - b).abs().max() <= 1e-6 * max(b.abs().max(), 1)


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("frozen", ["nothing", "hidden", "weight"])
def test_values_and_gradients(upstream, frozen):
    hidden, weight, labels = inputs()
    wanted = [x for x, name in ((hidden, "hidden"), (weight, "weight")) if name != frozen]
    if frozen != "nothing":
        {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    check_gradients(token_logps(hidden, weight, labels), whole(hidden, weight, labels), UPSTREAM[upstream], wanted)


def test_no_label_at_all_gives_zeros_and_no_nan():
    hidden, weight, labels = inputs()
    logps = token_logps(hidden, weight, labels.fill_(-100))
    assert logps.eq(0).all()
    logps.sum().backward()
    assert hidden.grad.eq(0).all() and weight.grad.eq(0).all()


def test_large_logits_do_not_overflow():
    hidden, weight, labels = inputs()
    logps = token_logps(hidden * 1e4, weight, labels)
    assert logps.isfinite().all()
    torch.testing.assert_close(logps, whole(hidden * 1e4, weight, labels), rtol=1e-5, atol=1e-2)


def test_bf16_gradients_gather_in_fp32():
    hidden, weight, labels = inputs(N=3000, V=5, dtype=torch.bfloat16)
    token_logps(hidden, weight, labels).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    whole_logps = (exact[0] @ exact[1].T).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    (whole_logps * (labels != -100)).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    # 667 chunks added up in bf16 would lose some tenths of the sum
    assert (weight.grad - exact[1].grad).abs().max() <= 0.02 * exact[1].grad.abs().max()


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
def test_what_is_computed_in_bf16_is_normalised_in_fp32(held, upstream):
    """Of whole numbers, whose products bf16 holds: the log-probabilities are those of fp32, whatever holds the weight.
    """
    labels = inputs()[2]
    exact = [torch.randint(-2, 3, shape).float().requires_grad_() for shape in ((20, 8), (31, 8))]
    rounded = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(exact, (torch.bfloat16, held))]
    found, expected = token_logps(*rounded, labels), whole(*exact, labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad((found * UPSTREAM[upstream]).sum(), rounded),
                    torch.autograd.grad((expected * UPSTREAM[upstream]).sum(), exact)):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


def test_nothing_is_kept_without_gradients(monkeypatch):
    monkeypatch.setattr(token_logps_module, "_add_product", None)  # would fail if called
    hidden, weight, labels = inputs()
    with torch.no_grad():
        token_logps(hidden, weight, labels)


@pytest.mark.parametrize("supervised", [True, False])
def test_a_frozen_head_costs_no_gradient_of_its_size(supervised, monkeypatch):
    """Nor does the host wait to see whether the same arrives for every token."""
    hidden, weight, labels = inputs()
    weight.requires_grad_(False)
    loss = token_logps(hidden, weight, labels if supervised else labels.fill_(-100)).sum()
    monkeypatch.setattr(torch, "zeros_like", None)
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    loss.backward()
    monkeypatch.undo()
    assert bool(hidden.grad.any()) == supervised


def test_logits_are_never_held_whole(monkeypatch):
    sizes = []
    empty = torch.empty

    def recording(*shape, **options):
        sizes.append(shape)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", recording)
    hidden, weight, labels = inputs()
    token_logps(hidden, weight, labels).sum().backward()
    assert (3, 31) in sizes and all(shape[0] <= 3 for shape in sizes if shape[-1] == 31)


def test_a_second_backward_is_an_error():
    """The weight's gradient is scaled in place: twice would be wrong."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    loss = token_logps(hidden, weight, torch.arange(6)).sum() * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
