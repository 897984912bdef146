"""The losses inside torch.compile: one graph, the same figures."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ptrl import (
    RewardShaping,
    linear_reward_shaped_cross_entropy,
    linear_reward_shaped_cross_entropy_sum,
    reward_shaped_cross_entropy,
    reward_shaped_cross_entropy_with_stats,
)

SHAPED = RewardShaping(beta=-0.25, lambda_head=0.05, lambda_tail=-0.1, top_k=5)


def of_logits(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return reward_shaped_cross_entropy(F.linear(x, w), y, SHAPED).mean()


def in_place(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return reward_shaped_cross_entropy(F.linear(x, w), y, SHAPED, inplace_backward=True).mean()


def with_stats(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    loss, stats = reward_shaped_cross_entropy_with_stats(F.linear(x, w), y, SHAPED)
    return (loss * stats.entropy).sum()


def of_hidden(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return linear_reward_shaped_cross_entropy(x, w, y, SHAPED, chunk_tokens=4).mean()


def of_hidden_in_the_forward(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return linear_reward_shaped_cross_entropy_sum(x, w, y, torch.ones(len(y)), SHAPED, chunk_tokens=4)


@pytest.mark.parametrize("loss", [of_logits, in_place, with_stats, of_hidden, of_hidden_in_the_forward])
def test_compiled_losses_are_the_same(loss: Callable[..., Tensor]):
    torch.manual_seed(0)
    x, w, y = torch.randn(6, 16), torch.randn(50, 16), torch.randint(50, (6,))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for run in (loss, compiled):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, w)]
        value = run(*leaves, y)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)
