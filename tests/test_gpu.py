"""What only a GPU can show. The other tests of the loss run on one too, where there is one: `make gpu`."""

import pytest
import torch
from accuracy import assert_as_accurate, eager_and_exact

from megatron_ptrl import RewardShaping, ops, reference, remit_weights, reward_shaped_cross_entropy

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


def remit_tokens(b: int, s: int, offset: int = 0) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, mask and document ids, `offset` tokens beyond where an allocation starts."""
    torch.manual_seed(0)
    logprob = -torch.rand(b * s + offset, device="cuda") * 8
    reference_logprob = logprob + torch.randn_like(logprob) * 0.3
    mask = torch.rand_like(logprob) > 0.2
    ids = torch.arange(len(mask), device="cuda") // 300 % 7 * 2**40
    return tuple(x[offset:].view(b, s) for x in (logprob, reference_logprob, mask, ids))


@pytest.mark.parametrize("b, s, offset", [(1, 1, 0), (4, 8192, 0), (3, 5001, 1), (2, 131_072, 0)])
@pytest.mark.parametrize("by_document", [False, True])
def test_remit_weights_against_fp64_and_the_cpu(b, s, offset, by_document):
    logprob, reference_logprob, mask, ids = remit_tokens(b, s, offset)
    ids = ids if by_document else None
    weights = remit_weights(logprob, reference_logprob, mask, document_ids=ids)
    exact = reference.remit_weights(logprob.double(), reference_logprob.double(), mask, 0.2, ids)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=0)
    on_cpu = [None if x is None else x.cpu() for x in (logprob, reference_logprob, mask, ids)]
    expected = remit_weights(*on_cpu[:3], document_ids=on_cpu[3])
    torch.testing.assert_close(weights.cpu(), expected, rtol=2e-7, atol=0)
    for _ in range(3):
        assert torch.equal(remit_weights(logprob, reference_logprob, mask, document_ids=ids), weights)


def test_remit_weights_of_what_is_not_finite_or_out_of_range_are_nan():
    logprob, reference_logprob, mask, _ = remit_tokens(4, 5000)
    mask[1, 77] = mask[3, 5] = True
    expected = remit_weights(logprob, reference_logprob, mask)
    reference_logprob[1, 77] = -torch.inf
    weights = remit_weights(logprob, reference_logprob, mask)
    assert weights[1][mask[1]].isnan().all() and torch.equal(weights[[0, 2, 3]], expected[[0, 2, 3]])
    segment = torch.arange(4, device="cuda")[:, None].repeat(1, 5000)
    segment[3, 5] = 2**40
    sums = ops.remit_gap_sums(logprob, reference_logprob, mask, segment, 4)
    weights = ops.remit_weights(logprob, reference_logprob, mask, segment, sums, 0.2)
    assert weights[3].isnan().sum() == 1 and weights[3, 5].isnan()


def test_remit_weights_wait_for_nothing_and_replay_in_a_graph():
    logprob, reference_logprob, mask, ids = remit_tokens(3, 3000)
    expected = remit_weights(logprob, reference_logprob, mask, document_ids=ids)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        remit_weights(logprob, reference_logprob, mask, document_ids=ids)  # allocations
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        remit_weights(logprob, reference_logprob, mask, document_ids=ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = remit_weights(logprob, reference_logprob, mask, document_ids=ids)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_the_operators_of_remit_name_what_is_wrong():
    x = torch.zeros(2, 3, device="cuda")
    keep, library = x == 0, torch.ops.megatron_ptrl
    with pytest.raises(RuntimeError, match=r"keep has shape \[3, 2\], expected"):
        library.remit_gap_sums(x, x, keep.t().contiguous(), None, 2)
    with pytest.raises(RuntimeError, match="keep is on another device, expected CUDA device 0"):
        library.remit_gap_sums(x, x, keep.cpu(), None, 2)
    with pytest.raises(RuntimeError, match="segments are 1, expected one for each of 2 rows"):
        library.remit_gap_sums(x, x, keep, None, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab, ranked", [(8, 8), (5000, 4990), (50_257, 50_257), (262_144, 262_000)])
@pytest.mark.parametrize("top_k", [0, 1, 8, 100, 1024, 1025])
def test_one_pass_and_two_agree(vocab, ranked, top_k, dtype):
    """Clusters of 1 to 8 blocks, rows that start anywhere, and a top_k for which the operator takes two passes."""
    z, target = logits_and_target(40, vocab)
    z, target, upstream = z.to(dtype), target % ranked, torch.rand(40, device="cuda") - 0.3
    z[::3], target[7] = z[::3].round(), -100
    constants = (-0.25, 0.1, -0.05, -100)
    numbers, keys = ops.reward_shaped_ce_stats(z, target, 0, ranked, top_k, True, -100)
    loss, coefficients, stats = ops.reward_shaped_ce_combine(numbers[None], keys[None], target, *constants)
    gradient = ops.reward_shaped_ce_grad(z, target, upstream, coefficients, 0, ranked)
    operator = torch.ops.megatron_ptrl.reward_shaped_ce_one_pass_
    found = []
    for _ in range(3):
        over = z.clone()
        found.append((*operator(over, target, upstream, ranked, top_k, True, *constants), over))
    assert all(torch.equal(*pair) for again in found[1:] for pair in zip(again, found[0], strict=True))
    torch.testing.assert_close(found[0][0], loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], stats, rtol=1e-6, atol=1e-6)
    rtol = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    torch.testing.assert_close(found[0][2], gradient, rtol=rtol, atol=6e-8)
    if 0 < top_k <= ranked:
        kept = target >= 0
        shaping = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.05, top_k=top_k)
        eager, exact = eager_and_exact(z[kept], target[kept], upstream[kept], shaping, ranked)
        assert_as_accurate(found[0][0][kept], eager[0], exact[0])
        assert_as_accurate(found[0][2][kept], eager[1], exact[1])


def test_one_pass_replays_in_a_graph():
    z, target = logits_and_target(32, 128_256)
    upstream, over = torch.rand(32, device="cuda"), z.clone()
    arguments = (over, target, upstream, 128_256, 100, True, -0.25, 0.1, -0.05, None)
    expected = (*torch.ops.megatron_ptrl.reward_shaped_ce_one_pass_(*arguments), over.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.megatron_ptrl.reward_shaped_ce_one_pass_(*arguments)
    over.copy_(z)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip((*captured, over), expected, strict=True))


@pytest.mark.parametrize("one_pass", [False, True])
def test_many_rows_with_more_logits_than_an_int_counts(one_pass):
    rows, vocab = 16_400, 131_072
    z, target = torch.zeros(rows, vocab, device="cuda", dtype=torch.bfloat16), torch.arange(rows, device="cuda")
    z[-2:] = logits_and_target(2, vocab)[0]
    found, constants = [], (-0.25, 0.1, -0.05, None)
    for part, ids in ((z[-2:].clone(), target[-2:]), (z, target)):
        upstream = torch.ones(len(ids), device="cuda")
        if one_pass:
            operator = torch.ops.megatron_ptrl.reward_shaped_ce_one_pass_
            loss, _ = operator(part, ids, upstream, vocab, 100, False, *constants)
        else:
            numbers, keys = ops.reward_shaped_ce_stats(part, ids, 0, vocab, 100, False, None)
            loss, coefficients, _ = ops.reward_shaped_ce_combine(numbers[None], keys[None], ids, *constants)
            ops.reward_shaped_ce_grad_(part, ids, upstream, coefficients, 0, vocab)
        found.append((loss[-2:], part[-2:]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
