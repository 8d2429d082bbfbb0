"""Processes and FSDP2. Run by torchrun this file is the body of the test of two processes."""

import sys
import time

import pytest
import torch
from torch.distributed.tensor import DTensor

from minixllm import distributed
from minixllm.errors import UserError
from minixllm.models.attention import Packed
from minixllm.models.llama import LlamaConfig
from minixllm.settings import run
from minixllm.weights.hf_directory import build, initialise

CONFIG = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                     tie_word_embeddings=True)


def plain_model():
    model = build(CONFIG)
    initialise(model, seed=0)
    return model


def sharded_model(world, dtype=torch.float32):
    model = distributed.shard(build(CONFIG), world, dtype)
    initialise(model, seed=0)
    return model


def documents(rank):
    """Each process has its own."""
    return torch.arange(7)[None] + 10 * rank


def test_world_of_one():
    world = distributed.setup("cpu")
    assert (world.rank, world.size, world.first, world.device.type) == (0, 1, True, "cpu")
    assert world.gather("x") == ["x"] and world.sum(torch.ones(2)).tolist() == [1, 1]


def test_one_process_computes_in_bf16_over_fp32_weights():
    """As FSDP2 does it, without its copies: what a layer sees is cast, what is trained and its gradient are not."""
    model, plain = sharded_model(distributed.setup("cpu"), torch.bfloat16), plain_model().bfloat16()
    seen = []
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(
        (inputs[0].dtype, output.dtype)))
    labels = torch.arange(1, 8)[None]
    losses = [-each(documents(0), labels=labels).sum() for each in (model, plain)]
    assert seen == [(torch.bfloat16, torch.bfloat16)] and losses[0] == losses[1]
    losses[0].backward(), losses[1].backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert (p.grad - q.grad).abs().max() <= 0.02 * q.grad.abs().max(), name
    assert not any(name in vars(module) for module in model.modules() for name in ("weight", "bias"))


def test_an_error_in_the_middle_leaves_no_cast_weights():
    model = sharded_model(distributed.setup("cpu"), torch.bfloat16)
    linear = model.blocks[0].mlp.gate_proj
    with pytest.raises(RuntimeError):
        linear(torch.zeros(1, 3, dtype=torch.bfloat16))
    assert linear.weight.dtype == torch.float32


def test_gathered_weights_are_cast_once(monkeypatch):
    model = sharded_model(distributed.setup("cpu"), torch.bfloat16)
    with torch.no_grad():
        expected = model(documents(0))
        with distributed.gathered(model):
            assert model.lm_head.weight.dtype == model.blocks[0].mlp.up_proj.weight.dtype == torch.bfloat16
            monkeypatch.setattr(distributed, "_show_weights", None)  # would fail if called
            assert torch.equal(model(documents(0)), expected)
    assert all(p.dtype == torch.float32 for p in (*model.parameters(), model.lm_head.weight))


def test_positions_stay_fp32_under_bf16():
    """Rotary angles reach the blocks uncast: in bf16, positions above 256 would fall together."""
    ids = torch.arange(600)[None] % CONFIG.vocab_size
    with torch.no_grad():
        assert torch.equal(sharded_model(distributed.setup("cpu"), torch.bfloat16)(ids), plain_model().bfloat16()(ids))


def test_compute_dtype():
    assert distributed.compute_dtype("bfloat16", "cpu") == torch.bfloat16
    assert distributed.compute_dtype("float32", "cpu") == torch.float32
    expected = torch.bfloat16 if distributed.native_bf16("cpu") else torch.float32
    assert distributed.compute_dtype("auto", torch.device("cpu")) == expected
    assert distributed.compute_dtype("auto", "cpu", 256) == expected
    assert distributed.compute_dtype("auto", "cpu", 255) == torch.float32  # too narrow to gain from bf16


def test_only_lost_peers_are_explained(monkeypatch):
    distributed.setup("cpu")
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="step 3: another process died or hangs.*Connection closed by peer"):
        with distributed.explain_lost_peers("step 3"):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3511")
    nccl = ("NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with "
            "NCCL_DEBUG=INFO for details), NCCL version 2.29.3\nncclSystemError: System call (e.g. socket, malloc) or "
            "external library call failed or device error. \nLast error:\n")
    with pytest.raises(UserError, match="Last error: Error while creating shared memory segment /dev/shm"):
        with distributed.explain_lost_peers("step 1"):
            raise torch.distributed.DistBackendError(
                f"{nccl}Error while creating shared memory segment /dev/shm/nccl-K9Qq8F (size 9637888)")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        with distributed.explain_lost_peers("step 3"):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_two_processes(torchrun):
    said = torchrun(2, __file__).stdout
    assert said.count("all is well") == 2


def test_threads_of_gloo_do_not_abort_a_process_that_ends(torchrun):
    said = torchrun(2, __file__, "end", check=False).stderr
    assert "terminate called" not in said and "exitcode" not in said


def end(world):
    """The last thing a process does is a collective, whose thread waits for the interpreter to free its tensor."""
    sys.setswitchinterval(1000)
    time.sleep(0.5 * world.rank)
    torch.distributed.all_reduce(torch.zeros(1), async_op=True)
    began = time.time()
    while time.time() - began < 1:
        pass


def two_processes(world):
    assert world.gather(world.rank * 2) == [0, 2]
    assert world.sum(torch.tensor([1.0, world.rank])).tolist() == [2, 1]
    plain, model = plain_model(), sharded_model(world)

    # gradients are summed over processes, not averaged
    model(documents(world.rank)).square().sum().backward()
    sum(plain(documents(rank)).square().sum() for rank in range(2)).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5 * q.grad.abs().max().item()), name

    # a forward without a backward puts the sharded weights back: a save would otherwise see the computing copy
    with torch.no_grad():
        model(documents(world.rank))
    assert all(isinstance(p, DTensor) for p in model.parameters())

    # held whole, each process may run as many forwards as it likes; then they train on
    with torch.no_grad(), distributed.gathered(model):
        for length in range(1, 4 if world.first else 2):
            ids = torch.arange(length)
            assert torch.allclose(model(ids, Packed([length])), plain(ids, Packed([length])), atol=1e-5)
        assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    world.gather(None)
    model(documents(world.rank)).sum().backward()

    # the sums of an embedding's gradient do not stagnate in bf16
    model, whole = sharded_model(world, torch.bfloat16), plain_model()
    ids, labels = torch.full((1, 4000), 3), torch.full((1, 4000), 7)
    for each in (model, whole):
        (-each(ids, labels=labels).sum() / 4000).backward()
    expected = 2 * whole.model.embed_tokens.weight.grad[3]  # both processes have the same document
    found = model.model.embed_tokens.weight.grad.full_tensor()[3]
    assert (found - expected).norm() < 0.05 * expected.norm()

    # nobody has what all gather before the last has come
    began = time.time()
    time.sleep(0.5 * world.rank)
    world.gather(None)
    assert time.time() - began > 0.4
    print("all is well")


if __name__ == "__main__":
    run(lambda argv: (end if argv else two_processes)(distributed.setup("cpu")))
