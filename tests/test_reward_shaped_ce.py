"""The reward-shaped cross entropy on one rank: value, gradient and statistics against fp64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accuracy import PLAIN, SHAPINGS, assert_as_accurate, eager_and_exact, value_and_gradient
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_ptrl import (
    RewardShaping,
    TokenStats,
    reward_shaped_cross_entropy,
    reward_shaped_cross_entropy_with_stats,
)
from megatron_ptrl.reference import token_stats

pytestmark = pytest.mark.usefixtures("device")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# 1 row: cut into segments when wide. 129 and 4097: no multiple of a vector. 33: more rows than threads.
SHAPES = [(1, 8), (33, 129), (20, 4097), (2, 70001)]
RANKED = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.05, top_k=100)


def logits_and_target(tokens: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens + vocab)
    return (torch.randn(tokens, vocab) * scale).to(dtype), torch.randint(vocab, (tokens,))


def check(z: Tensor, target: Tensor, shaping: RewardShaping, vocab_size: int | None = None) -> None:
    """Loss, gradient and statistics reach the bar, and the forward leaves its input alone."""
    shaping = replace(shaping, top_k=min(shaping.top_k, vocab_size or z.shape[-1]))
    upstream = torch.rand(target.shape) + 0.5
    before = z.clone()
    loss, gradient = value_and_gradient(
        lambda leaf: reward_shaped_cross_entropy(leaf, target, shaping, vocab_size=vocab_size), z, upstream
    )
    with_stats, stats = reward_shaped_cross_entropy_with_stats(z, target, shaping, vocab_size=vocab_size)
    assert torch.equal(z, before)
    assert loss.dtype == torch.float32 and gradient.dtype == z.dtype and gradient.shape == z.shape
    eager, exact = eager_and_exact(z, target, upstream, shaping, vocab_size)
    assert_as_accurate(loss, eager[0], exact[0])
    assert_as_accurate(with_stats, eager[0], exact[0])
    assert_as_accurate(gradient, eager[1], exact[1])

    eager_stats = token_stats(z.float(), target, shaping.top_k, vocab_size)
    exact_stats = token_stats(z.double(), target, shaping.top_k, vocab_size)
    for ours, eager_stat, exact_stat in zip(stats[:3], eager_stats, exact_stats, strict=False):
        assert ours.dtype == torch.float32 and ours.shape == target.shape
        assert_as_accurate(ours, eager_stat, exact_stat)
    assert torch.equal(stats.target_in_head, exact_stats[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, vocab", SHAPES)
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_accuracy(tokens, vocab, dtype, shaping):
    check(*logits_and_target(tokens, vocab, dtype), shaping)


@pytest.mark.parametrize("top_k", [1, 2, 31, 100, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 2, 5, 40])
def test_ties_with_the_kth_logit_are_all_in(levels, dtype, top_k):
    torch.manual_seed(0)
    z, target = torch.randint(levels, (12, 3000)).to(dtype) - levels // 2, torch.randint(3000, (12,))
    check(z, target, replace(RANKED, top_k=top_k))
    # One stretch of distinct values followed by equal ones, and the reverse.
    z[:, :600] = torch.linspace(-8, 8, 600).to(dtype)
    check(z, target, replace(RANKED, top_k=top_k))
    check(z.flip(-1), target, replace(RANKED, top_k=top_k))


def test_zeros_of_both_signs_tie():
    z = torch.zeros(4, 2048, dtype=torch.bfloat16)
    z[:, ::2] = -0.0
    z[:, 5:40] = 1.0
    check(z, torch.tensor([0, 1, 5, 2047]), replace(RANKED, top_k=36))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_extreme_rows(dtype, shaping):
    """+-1e4, columns and whole blocks of -inf, a constant row, p_x -> 1 and p_x -> 0."""
    z, target = logits_and_target(10, 5000, dtype)
    z[0] = (z[0].float().sign() * 1e4).to(dtype)
    z[1] *= 1000
    z[2, 7::3] = -torch.inf
    target[2] = 0
    z[3, :4096] = -torch.inf
    target[3] = 4500
    z[4] = 2.5
    z[5, :] = -torch.inf
    z[5, 17], z[5, 18], target[5] = 1.0, 2.0, 17
    z[6], target[6] = 0.0, 3
    z[6, 3] = 24.6  # 1 - p_x = 1e-7
    z[7, target[7]] = -65.0  # p_x = 1e-30
    z[8], target[8] = -100.0, 9
    z[8, 9] = 100.0  # every other token underflows
    z[9, target[9]] = -1e4
    check(z, target, shaping)


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_a_confident_target_keeps_its_gradient(shaping):
    """Relative to the gradient itself, which is of the order 1 - p_x: no subtraction from 1 survives this."""
    z, target = logits_and_target(32, 4096, torch.float32, scale=0.1)
    z.scatter_add_(1, target[:, None], torch.linspace(5, 25, 32)[:, None])  # up to 1 - p_x = 6e-8
    upstream = torch.ones(32)
    _, gradient = value_and_gradient(lambda leaf: reward_shaped_cross_entropy(leaf, target, shaping), z, upstream)
    _, exact = eager_and_exact(z, target, upstream, shaping)[1]
    at_target = gradient.double().gather(1, target[:, None]) / exact.gather(1, target[:, None]) - 1
    assert at_target.abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])  # of a CPU, of a GPU or from fp16, and of filled memory
def test_any_nan_from_above_reaches_the_gradient(dtype, bits):
    upstream = torch.tensor([bits, bits], dtype=torch.int32).view(torch.float32)
    leaf = torch.randn(2, 300).to(dtype).requires_grad_()
    reward_shaped_cross_entropy(leaf, torch.tensor([3, 299]), RANKED).backward(upstream)
    assert leaf.grad.isnan().all()


def test_all_minus_infinity_and_nan_give_nan():
    z = torch.zeros(3, 300)
    z[0] = -torch.inf
    z[1, 5] = torch.nan
    z[2, 5] = torch.inf
    loss, gradient = value_and_gradient(
        lambda leaf: reward_shaped_cross_entropy(leaf, torch.zeros(3, dtype=torch.int64), RANKED), z, torch.ones(3)
    )
    assert loss.isnan().all() and gradient.isnan().any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_vocabulary(dtype):
    z, target = logits_and_target(9, 3000, dtype)
    target %= 2750
    z[:, 2750:] += 2.0  # the largest logits are padding, which must not be ranked
    for shaping in SHAPINGS:
        check(z, target, shaping, vocab_size=2750)


@pytest.mark.parametrize("shaping", [PLAIN, RANKED])
def test_ignored_tokens(shaping):
    z, target = logits_and_target(8, 500, torch.bfloat16)
    target[[0, 5]] = -100
    z[5] = torch.nan
    leaf = z.requires_grad_()
    loss, stats = reward_shaped_cross_entropy_with_stats(leaf, target, shaping, ignore_index=-100)
    loss.sum().backward()
    for value in (loss, *stats):
        assert not value[[0, 5]].any()
    assert not leaf.grad[[0, 5]].any()
    kept = [1, 2, 3, 4, 6, 7]
    expected, _ = value_and_gradient(
        lambda rows: reward_shaped_cross_entropy(rows, target[kept], shaping), z[kept], torch.ones(6)
    )
    assert torch.equal(loss[kept], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_is_cross_entropy(dtype):
    z, target = logits_and_target(50, 1000, dtype)
    upstream = torch.rand(50)
    ours = value_and_gradient(lambda leaf: reward_shaped_cross_entropy(leaf, target), z, upstream)
    torchs = value_and_gradient(lambda leaf: F.cross_entropy(leaf.float(), target, reduction="none"), z, upstream)
    torch.testing.assert_close(ours[0], torchs[0])
    torch.testing.assert_close(ours[1], torchs[1])


def test_gradient_sums_to_zero():
    z, target = logits_and_target(40, 2000, torch.float32)
    for shaping in SHAPINGS:
        _, gradient = value_and_gradient(
            lambda leaf, shaping=shaping: reward_shaped_cross_entropy(leaf, target, shaping), z, torch.ones(40)
        )
        assert (gradient.double().sum(-1).abs() / gradient.abs().double().sum(-1)).max() < 1e-6


@pytest.mark.parametrize("shaping", [s for s in SHAPINGS if s.beta == 0])
def test_gradcheck(shaping):
    """At beta 0, where the value has the gradient of the loss: otherwise w is held constant in the gradient alone."""
    z, target = logits_and_target(4, 13, torch.float64)
    shaping = replace(shaping, top_k=5)
    assert torch.autograd.gradcheck(
        lambda leaf: reward_shaped_cross_entropy(leaf, target, shaping, vocab_size=12), z.requires_grad_()
    )


def test_any_leading_dimensions_and_strides():
    z, target = logits_and_target(24, 333, torch.bfloat16)
    upstream = torch.rand(24)
    expected = value_and_gradient(lambda leaf: reward_shaped_cross_entropy(leaf, target, RANKED), z, upstream)
    cut = torch.zeros(24, 400, dtype=torch.bfloat16)[:, 3:336].copy_(z)  # neither aligned nor contiguous
    swapped = z.view(4, 6, 333).transpose(0, 1).contiguous().transpose(0, 1)
    columns = z.t().contiguous().t()
    for same, shape in ((cut, (24,)), (swapped, (4, 6)), (columns, (24,)), (z.view(2, 3, 4, 333), (2, 3, 4))):
        leaf = same.detach().requires_grad_()
        loss = reward_shaped_cross_entropy(leaf, target.view(shape), RANKED)
        loss.backward(upstream.view(shape))
        assert torch.equal(loss.reshape(-1), expected[0])
        assert torch.equal(leaf.grad.reshape(24, 333), expected[1])
    assert torch.equal(reward_shaped_cross_entropy(z, target.repeat_interleave(2)[::2], RANKED), expected[0])


def test_no_tokens():
    z = torch.zeros(0, 2, 10, requires_grad=True)
    loss, stats = reward_shaped_cross_entropy_with_stats(z, torch.zeros(0, 2, dtype=torch.int64), PLAIN)
    loss.sum().backward()
    assert loss.shape == stats.entropy.shape == (0, 2) and z.grad.shape == z.shape


def test_default_top_k_is_capped_where_no_reward_depends_on_it():
    z, target = logits_and_target(6, 20, torch.float32)
    _, stats = reward_shaped_cross_entropy_with_stats(z, target)
    assert stats.target_in_head.all()
    torch.testing.assert_close(stats.head_mass, 1 - stats.logprob.exp())
    torch.testing.assert_close(stats.tail_mass, torch.zeros(6), atol=2e-7, rtol=0)


def test_tail_mass_of_a_confident_token():
    z = torch.zeros(1, 1000)
    z[0, 0] = 40.0
    _, stats = reward_shaped_cross_entropy_with_stats(z, torch.tensor([0]), RewardShaping(top_k=1))
    assert isinstance(stats, TokenStats)
    torch.testing.assert_close(stats.tail_mass, torch.tensor([999 * 4.248354e-18]), rtol=1e-5, atol=0)


def test_statistics_carry_no_gradient():
    z, target = logits_and_target(5, 200, torch.float32)
    _, stats = reward_shaped_cross_entropy_with_stats(z.requires_grad_(), target)
    assert not any(value.requires_grad for value in stats)


@given(constant=st.floats(-50, 50), seed=st.integers(0, 999), shaping=st.sampled_from(SHAPINGS))
def test_a_constant_on_all_logits_changes_nothing(constant, seed, shaping):
    torch.manual_seed(seed)
    z, target = torch.randn(3, 150).double(), torch.randint(150, (3,))
    plain, shifted = (
        value_and_gradient(lambda leaf: reward_shaped_cross_entropy(leaf, target, shaping), logits, torch.ones(3))
        for logits in (z, z + constant)
    )
    torch.testing.assert_close(plain, shifted)


@given(
    logits=st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 3.0]), min_size=1, max_size=700),
    top_k=st.integers(1, 700),
    seed=st.integers(0, 99),
)
def test_ranking_of_few_distinct_values(logits, top_k, seed):
    z = torch.tensor([logits], dtype=torch.bfloat16)
    target = torch.tensor([seed % len(logits)])
    top_k = min(top_k, len(logits))
    _, stats = reward_shaped_cross_entropy_with_stats(z, target, RewardShaping(top_k=top_k))
    _, _, head_mass, target_in_head = token_stats(z.double(), target, top_k)
    torch.testing.assert_close(stats.head_mass.double(), head_mass, atol=1e-6, rtol=1e-6)
    assert torch.equal(stats.target_in_head, target_in_head)
