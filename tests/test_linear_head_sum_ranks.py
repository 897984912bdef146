"""The head whose gradients are computed in the forward over gloo ranks: with and without sequence parallel."""

import warnings

import pytest
import torch
import torch.distributed as dist
from accuracy import PLAIN, assert_as_accurate
from heads import Head, Result, eager, rounded
from test_linear_head_ranks import RANKED, cases

from megatron_ptrl import (
    linear_reward_shaped_cross_entropy_sum,
    linear_reward_shaped_cross_entropy_sum_with_stats,
    linear_reward_shaped_cross_entropy_with_stats,
)
from megatron_ptrl.errors import InputError

SCALE = -0.7


def run_cases(rank: int, world_size: int, every: list[Head], sequence_parallel: bool) -> list[tuple]:
    """Per case: sum, its gradients times `SCALE`, losses and statistics of the tokens, the gradient in `main_grad`."""
    group, results = dist.group.WORLD, []
    for head in every:
        hidden = head.hidden.chunk(world_size)[rank] if sequence_parallel else head.hidden
        hidden = hidden.clone().requires_grad_()
        weight = torch.nn.Parameter(head.weight.chunk(world_size)[rank].clone())
        common = {"tp_group": group, "sequence_parallel": sequence_parallel, "chunk_tokens": 5, **head.options}
        arguments = (hidden, weight, head.target, head.upstream, head.shaping)
        with warnings.catch_warnings(action="error"):
            total, losses, stats = linear_reward_shaped_cross_entropy_sum_with_stats(*arguments, **common)
            # 1 leaves the bits as they are, which are those of the function per token.
            same = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
            gradients = torch.autograd.grad(total, (hidden, weight), torch.tensor(SCALE))
            weight.main_grad = torch.zeros(weight.shape)
            bare = linear_reward_shaped_cross_entropy_sum(*arguments, **common, gradient_accumulation_fusion=True)
            bare.backward(torch.tensor(SCALE))
            with torch.no_grad():
                unrecorded = linear_reward_shaped_cross_entropy_sum(*arguments, **common)
        assert torch.equal(unrecorded, bare)
        torch.testing.assert_close(bare, total, rtol=1e-6, atol=2e-6)
        loss, expected = linear_reward_shaped_cross_entropy_with_stats(
            hidden, weight, head.target, head.shaping, **common
        )
        assert torch.equal(losses, loss) and all(map(torch.equal, stats, expected))
        assert all(map(torch.equal, same, torch.autograd.grad(loss, (hidden, weight), head.upstream)))
        results.append((total.detach(), *gradients, weight.main_grad))
    return results


@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True)])
def test_sharding_changes_nothing(ranks, tp, sequence_parallel):
    every = cases()
    results = ranks.run(tp, run_cases, every, sequence_parallel)
    for i, head in enumerate(every):
        mine = [result[i] for result in results]
        grad_hidden = torch.cat([m[1] for m in mine]) if sequence_parallel else mine[0][1]
        grad_weight, main_grad = (torch.cat([m[j] for m in mine]) for j in (2, 3))
        dtype, fp32, exact = head.hidden.dtype, eager(head, torch.float32), eager(head, torch.float64)
        assert_as_accurate(mine[0][0], *((head.upstream * loss).sum() for loss in (fp32.loss, exact.loss)))
        rival = rounded(Result(fp32.loss, SCALE * fp32.grad_hidden.to(dtype), SCALE * fp32.grad_weight), dtype)
        assert_as_accurate(grad_hidden, rival.grad_hidden, SCALE * exact.grad_hidden)
        assert_as_accurate(grad_weight, rival.grad_weight, SCALE * exact.grad_weight)
        assert_as_accurate(main_grad, SCALE * fp32.grad_weight, SCALE * exact.grad_weight)
        for other in mine[1:]:  # bit for bit, or the ranks of a replicated loss drift apart
            assert torch.equal(other[0], mine[0][0])
            assert sequence_parallel or torch.equal(other[1], mine[0][1])


def collectives(rank: int, world_size: int, sequence_parallel: bool) -> tuple[list[str], list[str]]:
    """Names of those in the forward and in the backward, of a call in four chunks."""
    from torch.profiler import ProfilerActivity, profile

    hidden, weight = torch.randn(8, 2, 16).requires_grad_(), torch.randn(40, 16).requires_grad_()
    local = hidden.chunk(world_size)[rank] if sequence_parallel else hidden
    target, token_weight, group = torch.zeros(8, 2, dtype=torch.int64), torch.ones(8, 2), dist.group.WORLD
    names = []
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        total = linear_reward_shaped_cross_entropy_sum(
            local, weight, target, token_weight, RANKED, group, sequence_parallel=sequence_parallel, chunk_tokens=4
        )
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        total.backward()
    for trace in (forward, backward):
        names.append([event.name for event in trace.events() if event.name.startswith("c10d::")])
    return names[0], names[1]


@pytest.mark.parametrize(
    "sequence_parallel, expected",
    [(False, ["allgather"] * 4 + ["allreduce"]), (True, ["allgather"] * 5 + ["reduce_scatter"])],
)
def test_one_collective_a_chunk_and_none_in_the_backward(ranks, sequence_parallel, expected):
    for forward, backward in ranks.run(2, collectives, sequence_parallel):
        assert len(forward) == len(expected) and not backward, (forward, backward)
        assert all(kind in name for name, kind in zip(forward, expected, strict=True)), forward


def refusals(rank: int, world_size: int) -> list[str]:
    hidden, target, group = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, dtype=torch.int64), dist.group.WORLD
    messages = []
    for weight, options in (
        (torch.zeros([32, 48][rank], 8), {}),
        (torch.zeros(32, 8), {"sequence_parallel": True}),
        (torch.zeros(32, 8), {"vocab_size": 65}),
    ):
        try:
            linear_reward_shaped_cross_entropy_sum(
                hidden, weight, target, torch.ones(4), PLAIN, group, chunk_tokens=3, **options
            )
        except InputError as error:
            messages.append(str(error))
    return messages


def test_every_rank_refuses(ranks):
    for unequal, split, padded in ranks.run(2, refusals):
        assert "the logits of weight have [32, 48] columns" in unequal
        assert "expected [8] for hidden [4, 8] on each of 2 sequence-parallel ranks" in split
        assert "vocab_size is 65; expected 1 to 64" in padded
