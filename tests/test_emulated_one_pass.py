"""The CUDA kernel of one pass in the emulation of thread block clusters, against fp64 and against the three kernels."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy import SHAPINGS, assert_as_accurate, eager_and_exact
from emulated import DTYPES, Emulated, compile_kernels
from test_emulated_kernels import hard_rows
from test_reward_shaped_ce import RANKED, logits_and_target
from torch import Tensor

from megatron_ptrl import RewardShaping
from megatron_ptrl.reference import token_stats

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    prebuilt = os.environ.get("PTRL_EMULATED_KERNELS")
    return Emulated(Path(prebuilt) if prebuilt else compile_kernels(tmp_path_factory.mktemp("emulated")))


Found = tuple[Tensor, Tensor, Tensor]  # loss, statistics, gradient


def in_one_pass(kernels: Emulated, z: Tensor, target: Tensor, upstream: Tensor, ranked: int, call: tuple) -> Found:
    gradient = z.clone()
    loss, stats = kernels.one_pass_(gradient, target, upstream, ranked, *call)
    return loss, stats, gradient


def in_two_passes(kernels: Emulated, z: Tensor, target: Tensor, upstream: Tensor, ranked: int, call: tuple) -> Found:
    top_k, entropy, *constants = call
    numbers, keys = kernels.stats(z, target, 0, ranked, top_k, entropy, call[-1])
    loss, coefficients, stats = kernels.combine(numbers[None], keys[None], target, *constants)
    return loss, stats, kernels.grad(z, target, upstream, coefficients, 0, ranked)


def call_of(shaping: RewardShaping, ignore_index: int | None = -100) -> tuple:
    return shaping.top_k, True, shaping.beta, shaping.lambda_head, shaping.lambda_tail, ignore_index


def assert_same(one: Found, two: Found) -> None:
    """Sums in another order: fp32 rounding in loss and statistics, one unit in the last place of a gradient."""
    for ours, theirs in zip((one[0], *one[1]), (two[0], *two[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(one[1][3], two[1][3])  # the same threshold
    kind = torch.finfo(one[2].dtype)
    rounding = (kind.eps, kind.smallest_normal * kind.eps) if kind.bits == 16 else (2e-6, 1e-8)
    torch.testing.assert_close(one[2], two[2], rtol=rounding[0], atol=rounding[1], equal_nan=True)


def assert_accurate(found: Found, z: Tensor, target: Tensor, upstream: Tensor, shaping: RewardShaping, ranked: int):
    eager, exact = eager_and_exact(z, target, upstream, shaping, ranked)
    assert_as_accurate(found[0], eager[0], exact[0])
    assert_as_accurate(found[2], eager[1], exact[1])
    stats = [token_stats(each, target, shaping.top_k, ranked) for each in (z.float(), z.double())]
    for ours, eager_stat, exact_stat in zip(found[1][:3], *(each[:3] for each in stats), strict=True):
        assert_as_accurate(ours, eager_stat, exact_stat)
    assert torch.equal(found[1][3].bool(), stats[1][3])


def cut(kernels: Emulated, columns: int, dtype: torch.dtype, blocks: int) -> None:
    """Gives the clusters so many blocks; eight are made even of rows that are too short for them."""
    loads = -(-columns // blocks * dtype.itemsize // 16)
    kernels.stretch(0 if blocks == 8 else 16 * loads)
    assert kernels.blocks(dtype, columns, 1) == blocks or loads == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_every_template(kernels, dtype, shaping):
    z, target = logits_and_target(6, 1037, dtype)
    shaping, upstream = replace(shaping, top_k=20), torch.rand(6) - 0.3
    cut(kernels, 1037, dtype, 4)
    ranked = in_one_pass(kernels, z, target, upstream, 1037, call_of(shaping))
    assert_accurate(ranked, z, target, upstream, shaping, 1037)
    for top_k, entropy in ((20, False), (0, True), (0, False)):
        call = (top_k, entropy, *call_of(shaping)[2:])
        one, two = (run(kernels, z, target, upstream, 1037, call) for run in (in_one_pass, in_two_passes))
        for _, stats, _ in (one, two):
            stats[1] *= entropy  # else not a number that means anything
        assert_same(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "columns, blocks, tops", [(8, 1, (1,)), (8, 8, (2,)), (37, 2, (30,)), (37, 8, (1, 256)), (513, 4, (1, 60, 256)),
                              (520, 8, (60,)), (2603, 2, (60,))]
)  # fmt: skip
def test_hard_rows(kernels, columns, blocks, tops, dtype):
    """Ties, full buffers, constant rows; the target in every block; the largest logits are padding; one row ignored."""
    z, ranked = hard_rows(columns, dtype), columns - 3
    z[:, ranked:] += 9
    z[8] = z[8].nan_to_num(neginf=-30)  # a target of -inf has no loss to compare
    target, upstream = torch.arange(11) * ranked // 11, torch.linspace(-1, 1, 11) + 0.05
    cut(kernels, columns, dtype, blocks)
    for top_k in tops:
        shaping = replace(RANKED, top_k=top_k)
        found = in_one_pass(kernels, z, target, upstream, ranked, call_of(shaping))
        assert_same(found, in_two_passes(kernels, z, target, upstream, ranked, call_of(shaping)))
        if top_k <= ranked:
            assert_accurate(found, z, target, upstream, shaping, ranked)


@pytest.mark.parametrize("blocks", [1, 8])
def test_an_ignored_row_is_not_looked_at(kernels, blocks):
    z, target = logits_and_target(4, 600, torch.bfloat16)
    cut(kernels, 600, torch.bfloat16, blocks)
    call = call_of(replace(RANKED, top_k=40))
    found = in_one_pass(kernels, z, target, torch.ones(4), 600, call)
    z[2], target[2] = torch.nan, -100
    loss, stats, gradient = in_one_pass(kernels, z, target, torch.ones(4), 600, call)
    for value, with_it in ((loss, found[0]), (stats.T, found[1].T), (gradient, found[2])):
        assert value[2].eq(0).all()
        value[2] = with_it[2]
        assert torch.equal(value, with_it)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [0, 100])
def test_the_order_in_which_threads_run_changes_no_bit(kernels, dtype, top_k):
    z, target = hard_rows(2600, dtype), torch.arange(11) * 230
    cut(kernels, 2600, dtype, 8)
    found = []
    for seed in range(3):
        kernels.seed(seed)
        call = (top_k, *call_of(RANKED)[1:])
        found.append(
            torch.cat([x.float().view(-1) for x in in_one_pass(kernels, z, target, z[:, 0].float(), 2600, call)])
        )
    assert all(torch.equal(each.nan_to_num(7), found[0].nan_to_num(7)) for each in found[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alignment_and_strides_change_no_bit(kernels, dtype):
    z, target = logits_and_target(12, 777, dtype)
    upstream, call = torch.rand(12), call_of(replace(RANKED, top_k=40))
    cut(kernels, 777, dtype, 4)
    expected = in_one_pass(kernels, z, target, upstream, 777, call)
    for offset in range(0, 8, 3):
        around = torch.zeros(12, 801, dtype=dtype)
        place = around[:, offset : offset + 777].view(3, 4, 777).copy_(z.view(3, 4, 777))
        loss, stats = kernels.one_pass_(place, target, upstream, 777, *call)
        found = (loss, stats, around[:, offset : offset + 777].clone())
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        around[:, offset : offset + 777] = 0
        assert around.count_nonzero() == 0  # nothing beside the rows was written


@pytest.mark.parametrize("top_k", [0, 40])
def test_not_a_number_and_infinity_give_nan(kernels, top_k):
    z = torch.zeros(4, 300)
    z[0], z[1, 5], z[2, 5], z[3] = -torch.inf, torch.nan, torch.inf, torch.nan
    cut(kernels, 300, torch.float32, 4)
    call = (top_k, *call_of(RANKED)[1:])
    loss, _, gradient = in_one_pass(kernels, z, torch.zeros(4).long(), torch.ones(4), 300, call)
    assert loss.isnan().all() and gradient.isnan().any(-1).all()


def test_the_longest_rows_fit_and_longer_ones_take_two_passes(kernels):
    kernels.stretch(32 * 1024)
    for dtype, columns, blocks in (
        (torch.bfloat16, 8, 1), (torch.bfloat16, 32_000, 2), (torch.float16, 50_257, 4), (torch.bfloat16, 128_256, 8),
        (torch.bfloat16, 262_144, 8), (torch.float32, 262_144, 8), (torch.float32, 500_000, 0),
    ):  # fmt: skip
        assert kernels.blocks(dtype, columns, 100, on_gpu=True) == blocks
    assert kernels.blocks(torch.float32, 262_144, 1024, on_gpu=True) == 8
    assert kernels.blocks(torch.float32, 1000, 1025, on_gpu=True) == 0
