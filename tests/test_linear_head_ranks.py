"""The head without its logits over gloo ranks: tensor parallel, with and without sequence parallel."""

import warnings

import pytest
import torch
import torch.distributed as dist
from accuracy import PLAIN, assert_as_accurate
from heads import Head, Result, eager, make_head, rounded

from megatron_ptrl import (
    RewardShaping,
    linear_reward_shaped_cross_entropy,
    linear_reward_shaped_cross_entropy_with_stats,
    reward_shaped_cross_entropy_with_stats,
)
from megatron_ptrl.errors import InputError

RANKED = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.05, top_k=50)


def cases() -> list[Head]:
    """For four ranks at most: 8 rows of tokens and 400 columns."""
    torch.manual_seed(0)
    made = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made.append(make_head(dtype, (8, 3), 400, RANKED))
        made.append(make_head(dtype, (8,), 400, RewardShaping(beta=0.5)))
        # The last of four ranks has 15 real columns, fewer than top_k.
        made.append(make_head(dtype, (8, 2), 400, RANKED, vocab_size=315, ignore_index=-100))
    return made


def run_cases(rank: int, world_size: int, every: list[Head], sequence_parallel: bool) -> list[tuple]:
    """Per case: loss, gradients, the statistics and the sharded logits' own, and the gradient in `main_grad`."""
    group, results = dist.group.WORLD, []
    for head in every:
        hidden = head.hidden.chunk(world_size)[rank] if sequence_parallel else head.hidden
        hidden = hidden.clone().requires_grad_()
        weight = torch.nn.Parameter(head.weight.chunk(world_size)[rank].clone())
        common = (head.target, head.shaping, group)
        with warnings.catch_warnings(action="error"):
            loss, stats = linear_reward_shaped_cross_entropy_with_stats(
                hidden, weight, *common, sequence_parallel=sequence_parallel, chunk_tokens=5, **head.options
            )
            gradients = torch.autograd.grad(loss, (hidden, weight), head.upstream)
            weight.main_grad = torch.zeros(weight.shape)
            bare = linear_reward_shaped_cross_entropy(
                hidden,
                weight,
                *common,
                sequence_parallel=sequence_parallel,
                chunk_tokens=1000,
                gradient_accumulation_fusion=True,
                **head.options,
            )
            bare.backward(head.upstream)
        torch.testing.assert_close(bare, loss, rtol=1e-6, atol=2e-6)
        logits = head.hidden @ weight.detach().t()
        expected = reward_shaped_cross_entropy_with_stats(logits, *common, **head.options)[1]
        results.append((loss.detach(), *gradients, list(stats), list(expected), weight.main_grad))
    return results


@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_sharding_changes_nothing(ranks, tp, sequence_parallel):
    every = cases()
    results = ranks.run(tp, run_cases, every, sequence_parallel)
    for i, head in enumerate(every):
        mine = [result[i] for result in results]
        grad_hidden = torch.cat([m[1] for m in mine]) if sequence_parallel else mine[0][1]
        grad_weight, main_grad = (torch.cat([m[j] for m in mine]) for j in (2, 5))
        fp32, exact = eager(head, torch.float32), eager(head, torch.float64)
        rival = rounded(fp32, head.hidden.dtype)
        for ours, theirs, truth in zip(Result(mine[0][0], grad_hidden, grad_weight), rival, exact, strict=True):
            assert_as_accurate(ours, theirs, truth)
        assert_as_accurate(main_grad, fp32.grad_weight, exact.grad_weight)
        torch.testing.assert_close(mine[0][3], mine[0][4], rtol=1e-6, atol=2e-6)
        for other in mine[1:]:  # bit for bit, or the ranks of a replicated loss drift apart
            assert torch.equal(other[0], mine[0][0]) and all(map(torch.equal, other[3], mine[0][3]))
            assert sequence_parallel or torch.equal(other[1], mine[0][1])


def test_partial_gradients_of_bf16_are_summed_in_fp32(ranks):
    """Two shards whose parts of the gradient nearly cancel: rounded to bf16 first, they would leave an error of 0.4 %
    of a part, far above that of their sum."""
    torch.manual_seed(1)
    weight = torch.full((64, 8), 4.0) + torch.randint(-16, 17, (64, 8)) / 32
    head = make_head(torch.bfloat16, (8,), 64, PLAIN, h=8)._replace(weight=weight.bfloat16())
    rival, exact = (eager(head, dtype).grad_hidden for dtype in (torch.float32, torch.float64))
    for sequence_parallel in (False, True):
        results = ranks.run(2, run_cases, [head], sequence_parallel)
        ours = torch.cat([result[0][1] for result in results]) if sequence_parallel else results[0][0][1]
        assert_as_accurate(ours, rival.bfloat16(), exact)


def collectives(rank: int, world_size: int, sequence_parallel: bool) -> tuple[list[str], list[str]]:
    """Names of those in the forward and in the backward, of a call in four chunks."""
    from torch.profiler import ProfilerActivity, profile

    hidden, weight = torch.randn(8, 2, 16).requires_grad_(), torch.randn(40, 16).requires_grad_()
    local = hidden.chunk(world_size)[rank] if sequence_parallel else hidden
    target = torch.zeros(8, 2, dtype=torch.int64)
    names = []
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        loss = linear_reward_shaped_cross_entropy(
            local, weight, target, RANKED, dist.group.WORLD, sequence_parallel=sequence_parallel, chunk_tokens=4
        )
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        loss.sum().backward()
    for trace in (forward, backward):
        names.append([event.name for event in trace.events() if event.name.startswith("c10d::")])
    return names[0], names[1]


@pytest.mark.parametrize(
    "sequence_parallel, forward, backward",
    [(False, ["allgather"], ["allreduce"]), (True, ["allgather", "allgather"], ["allgather", "reduce_scatter"])],
)
def test_the_collectives_do_not_depend_on_the_chunks(ranks, sequence_parallel, forward, backward):
    for names in ranks.run(2, collectives, sequence_parallel):
        for found, expected in zip(names, (forward, backward), strict=True):
            assert len(found) == len(expected), names
            assert all(kind in name for name, kind in zip(found, expected, strict=True)), names


def refusals(rank: int, world_size: int) -> list[str]:
    hidden, target, group = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), dist.group.WORLD
    messages = []
    for weight, options in (
        (torch.zeros([32, 48][rank], 8), {}),
        (torch.zeros(32, 8), {"sequence_parallel": True}),
        (torch.zeros(32, 8), {"vocab_size": 65}),
    ):
        try:
            linear_reward_shaped_cross_entropy(hidden, weight, target, PLAIN, group, **options)
        except InputError as error:
            messages.append(str(error))
    return messages


def test_every_rank_refuses(ranks):
    for unequal, split, padded in ranks.run(2, refusals):
        assert "the logits of weight have [32, 48] columns" in unequal
        assert "expected [8] for hidden [4, 8] on each of 2 sequence-parallel ranks" in split
        assert "vocab_size is 65; expected 1 to 64" in padded
