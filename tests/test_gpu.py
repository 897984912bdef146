"""What only a GPU can show. The other tests of the loss run on one too, where there is one: `make gpu`."""

import pytest
import torch

from megatron_ptrl import RewardShaping, ops, reward_shaped_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RANKED = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.05, top_k=100)


def logits_and_target(tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    z = torch.randn(tokens, vocab, device="cuda", dtype=torch.bfloat16) * 3
    return z, torch.randint(vocab, (tokens,), device="cuda")


def loss_and_gradient(z: torch.Tensor, target: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = z.detach().requires_grad_()
    loss = reward_shaped_cross_entropy(leaf, target, RANKED, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def test_the_kernels_are_there():
    assert ops.load_kernels() and ops._has_kernels("cuda")


def test_nothing_waits_for_the_device():
    z, target = logits_and_target(64, 5000)
    loss_and_gradient(z, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(z, target)
        loss_and_gradient(z.clone(), target, inplace_backward=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_run_gives_the_same_bits():
    z, target = logits_and_target(500, 50_000)
    z[::3] = z[::3].round()  # ties
    first = loss_and_gradient(z, target)
    for _ in range(5):
        again = loss_and_gradient(z, target)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_graph_replays_it_on_another_stream():
    z, target = logits_and_target(32, 3000)
    expected = loss_and_gradient(z, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_and_gradient(z, target)  # allocations
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(z, target)
    for value in captured:
        value.zero_()
    graph.replay()
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])


def test_more_logits_than_an_int_counts():
    vocab = 262_144
    rows = 2**31 // vocab + 3
    z, target = torch.zeros(rows, vocab, device="cuda", dtype=torch.bfloat16), torch.arange(rows, device="cuda")
    z[-2:] = logits_and_target(2, vocab)[0]
    last = z[-2:].clone()
    loss, gradient = loss_and_gradient(z, target, inplace_backward=True)
    expected = loss_and_gradient(last, target[-2:])
    assert torch.equal(loss[-2:], expected[0]) and torch.equal(gradient[-2:], expected[1])
