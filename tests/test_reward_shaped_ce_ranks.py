"""The reward-shaped cross entropy over a vocabulary sharded on gloo ranks, and the pool of ranks itself."""

import os
import time
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accuracy import PLAIN, SHAPINGS, assert_as_accurate, eager_and_exact
from ranks import TIMEOUT, RankError
from torch import Tensor

from megatron_ptrl import RewardShaping, reward_shaped_cross_entropy, reward_shaped_cross_entropy_with_stats
from megatron_ptrl.errors import InputError

RANKED = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.05, top_k=50)
Case = tuple[Tensor, Tensor, Tensor, RewardShaping, dict]


def cases() -> list[Case]:
    """Logits, targets, upstream gradients, shaping and options, for four ranks at most."""
    torch.manual_seed(0)
    made: list[Case] = []

    def add(z: Tensor, shaping: RewardShaping, **options: int) -> None:
        target = torch.randint(options.get("vocab_size", z.shape[-1]), z.shape[:-1])
        made.append((z, target, torch.rand(target.shape) + 0.5, shaping, options))

    for shaping in SHAPINGS:
        add(torch.randn(9, 1000) * 3, replace(shaping, top_k=50))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        add((torch.randn(3, 5, 1000) * 3).to(dtype), RANKED)
        add(torch.randint(3, (20, 800)).to(dtype), RANKED)  # far more ties than places
        # 210 of 1000 columns are padding: with four ranks the last has 40 real ones, fewer than top_k.
        add((torch.randn(9, 1000) * 3).to(dtype), RANKED, vocab_size=790)
        # Three of four shards are padding.
        add((torch.randn(9, 400) * 3).to(dtype), RANKED, vocab_size=100)
    ascending = torch.arange(2000.0).repeat(4, 1) / 100
    add(ascending, RANKED)
    add(-ascending, RANKED)
    empty_shard = torch.randn(8, 1200) * 3
    empty_shard[:4, :300] = -torch.inf
    empty_shard[4:, 600:] = -torch.inf
    add(empty_shard, RANKED)
    made[-1][1][:] = 450
    add(torch.randn(1, 80000) * 3, RANKED)  # few rows: cut into segments within a rank too
    return made


def run_cases(rank: int, world_size: int, every: list[Case]) -> list[tuple[Tensor, ...]]:
    results = []
    for z, target, upstream, shaping, options in every:
        shard = z.chunk(world_size, -1)[rank].detach().clone().requires_grad_()
        with warnings.catch_warnings(action="error"):
            loss, stats = reward_shaped_cross_entropy_with_stats(shard, target, shaping, dist.group.WORLD, **options)
            bare = reward_shaped_cross_entropy(shard, target, shaping, dist.group.WORLD, **options)
        assert torch.equal(loss, bare)
        loss.backward(upstream)
        results.append((loss.detach(), shard.grad, *stats))
    return results


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_sharding_changes_nothing(ranks, tp):
    every = cases()
    results = ranks.run(tp, run_cases, every)
    for i, (z, target, upstream, shaping, options) in enumerate(every):
        eager, exact = eager_and_exact(z, target, upstream, shaping, **options)
        loss, *stats = results[0][i][:1] + results[0][i][2:]
        gradient = torch.cat([results[rank][i][1] for rank in range(tp)], -1)
        assert_as_accurate(loss, eager[0], exact[0])
        assert_as_accurate(gradient, eager[1], exact[1])
        _, unsharded = reward_shaped_cross_entropy_with_stats(z, target, shaping, **options)
        torch.testing.assert_close(stats, list(unsharded), rtol=1e-6, atol=2e-6)
        for rank in range(1, tp):  # bit for bit, or the ranks of a replicated loss drift apart
            assert torch.equal(results[rank][i][0], loss)
            for ours, theirs in zip(stats, results[rank][i][2:], strict=True):
                assert torch.equal(ours, theirs)


def count_collectives(rank: int, world_size: int) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    z = torch.randn(4, 64).bfloat16().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        loss, _ = reward_shaped_cross_entropy_with_stats(z, torch.zeros(4, dtype=torch.int64), PLAIN, dist.group.WORLD)
        loss.sum().backward()
    return [event.name for event in trace.events() if event.name.startswith("c10d::")]


def test_one_collective_forward_and_none_backward(ranks):
    for names in ranks.run(2, count_collectives):
        assert len(names) == 1 and "allgather" in names[0]


def compare_with_megatron(rank: int, world_size: int, z: Tensor, target: Tensor, upstream: Tensor) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    group = parallel_state.get_tensor_model_parallel_group()
    ours, theirs = (z.chunk(world_size, -1)[rank].detach().clone().requires_grad_() for _ in range(2))
    loss = reward_shaped_cross_entropy(ours, target, RewardShaping(), group)
    expected = vocab_parallel_cross_entropy(theirs * 1, target)  # a copy, because it overwrites fp32 logits
    torch.testing.assert_close(loss, expected)
    (loss * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_is_megatrons_cross_entropy(ranks, tp, dtype):
    torch.manual_seed(0)
    z, target, upstream = torch.randn(6, 2, 640).to(dtype) * 3, torch.randint(640, (6, 2)), torch.rand(6, 2)
    ranks.run(tp, compare_with_megatron, z, target, upstream)


def unequal_shards(rank: int, world_size: int) -> str:
    target = torch.tensor([0, 70, 3])
    try:
        reward_shaped_cross_entropy(torch.zeros(3, [32, 48][rank]), target, RewardShaping(), dist.group.WORLD)
    except InputError as error:
        return str(error)
    return ""


def test_unequal_shards_are_refused_on_every_rank(ranks):
    for message in ranks.run(2, unequal_shards):
        assert "[32, 48] columns" in message


class OneRank:
    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def test_a_group_of_one_needs_no_process_group():
    z, target = torch.randn(4, 30), torch.randint(30, (4,))
    assert torch.equal(reward_shaped_cross_entropy(z, target), reward_shaped_cross_entropy(z, target, PLAIN, OneRank()))


def misbehave(rank: int, world_size: int, how: str) -> int:
    if rank == 1 and how == "raise":
        raise KeyError("on purpose")
    if rank == 1 and how == "die":
        os._exit(3)
    if rank == 1 and how == "hang":
        time.sleep(60)
    if how == "leave the others waiting" and rank == 0:
        raise KeyError("on purpose")
    if how != "raise":
        dist.barrier()
    return rank


@pytest.mark.parametrize(
    "how, said, timeout",
    [("raise", "on purpose", TIMEOUT), ("die", "rank 1 of 2: died", TIMEOUT), ("hang", "rank 1 of 2: no answer", 3.0)],
)
def test_the_pool_reports_and_survives(ranks, how, said, timeout):
    # Processes that are still starting give no answer either.
    assert ranks.run(2, misbehave, "") == [0, 1]
    with pytest.raises(RankError, match=said):
        ranks.run(2, misbehave, how, timeout=timeout)
    assert ranks.run(2, misbehave, "") == [0, 1]
