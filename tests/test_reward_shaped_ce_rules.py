"""What the reward-shaped cross entropy refuses, and the rules of the in-place backward."""

import math

import pytest
import torch

from megatron_ptrl import RewardShaping, reward_shaped_cross_entropy, reward_shaped_cross_entropy_with_stats
from megatron_ptrl.errors import InputError

RANKED = RewardShaping(beta=-0.25, lambda_head=0.1, top_k=5)


def refused(match: str, z=None, target=None, shaping=RANKED, call=reward_shaped_cross_entropy, **options) -> None:
    z = torch.zeros(2, 3, 40) if z is None else z
    target = torch.zeros(2, 3, dtype=torch.int64) if target is None else target
    with pytest.raises(InputError, match=match) as caught:
        call(z, target, shaping, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beta", [-1.0, -1.5, math.nan, math.inf])
def test_beta(beta):
    with pytest.raises(InputError, match=f"beta is {beta}"):
        RewardShaping(beta=beta)


def test_top_k_above_the_vocabulary():
    refused("top_k is 41; expected at most the 40 tokens", shaping=RewardShaping(lambda_head=0.1, top_k=41))
    refused("top_k is 41", shaping=RewardShaping(top_k=41))
    refused("top_k is 100", shaping=RewardShaping(lambda_tail=0.1))
    refused("top_k is 31; expected at most the 30", shaping=RewardShaping(lambda_tail=0.1, top_k=31), vocab_size=30)
    reward_shaped_cross_entropy(torch.zeros(1, 40), torch.zeros(1, dtype=torch.int64), RewardShaping(0.5, 0.1, 0.1))


@pytest.mark.parametrize("value", [-1, 40, -100])
def test_target_outside_the_vocabulary(value):
    target = torch.zeros(2, 3, dtype=torch.int64)
    target[1, 2] = value
    refused(rf"target\[1, 2\] is {value}; expected 0 to 39;", target=target)
    refused(rf"target\[1, 2\] is {value}; expected 0 to 39 or ignore_index -7;", target=target, ignore_index=-7)
    reward_shaped_cross_entropy(torch.zeros(2, 3, 40), target, RANKED, ignore_index=value)


def test_target_in_the_padding():
    refused(r"target\[0, 0\] is 35; expected 0 to 34", target=torch.full((2, 3), 35), vocab_size=35)


@pytest.mark.parametrize("vocab_size", [0, -1, 41])
def test_vocab_size(vocab_size):
    refused(f"vocab_size is {vocab_size}; expected 1 to 40", shaping=RewardShaping(), vocab_size=vocab_size)


def test_shapes_and_dtypes():
    refused(r"target has shape \[3, 2\]; expected \[2, 3\]", target=torch.zeros(3, 2, dtype=torch.int64))
    refused("target is torch.int32; expected int64", target=torch.zeros(2, 3, dtype=torch.int32))
    refused("vocab_parallel_logits are torch.int64", z=torch.zeros(2, 3, 40, dtype=torch.int64))
    refused(r"shape \[2, 3, 0\]; expected .* v/tp >= 1", z=torch.zeros(2, 3, 0))
    refused(r"shape \[\]", z=torch.tensor(1.0), target=torch.tensor(0))


def test_in_place_backward_needs_logits_that_can_be_overwritten():
    refused("strides", z=torch.zeros(2, 40, 3).transpose(1, 2), inplace_backward=True)
    refused("strides", z=torch.zeros(1, 1, 40).expand(2, 3, 40), inplace_backward=True)
    refused("strides", z=torch.zeros(2 * 3 * 39 + 1).as_strided((2, 3, 40), (117, 39, 1)), inplace_backward=True)


def test_in_place_backward_writes_the_same_gradient_over_the_logits():
    torch.manual_seed(0)
    weight = torch.randn(16, 300, dtype=torch.bfloat16)
    target, upstream = torch.randint(300, (7,)), torch.rand(7)
    gradients = []
    for inplace in (False, True):
        hidden = torch.linspace(-1, 1, 7 * 16).view(7, 16).bfloat16().requires_grad_()
        z = hidden @ weight
        before, version = z.detach().clone(), z._version
        loss, stats = reward_shaped_cross_entropy_with_stats(z, target, RANKED, inplace_backward=inplace)
        assert torch.equal(z, before) and z._version == version
        loss.backward(upstream)
        assert torch.equal(z, before) != inplace
        assert (z._version > version) == inplace
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


def test_in_place_backward_of_a_leaf():
    z, target = torch.randn(4, 50), torch.randint(50, (4,))
    leaf, overwritten = (z.clone().requires_grad_() for _ in range(2))
    reward_shaped_cross_entropy(leaf, target, RANKED).sum().backward()
    reward_shaped_cross_entropy(overwritten, target, RANKED, inplace_backward=True).sum().backward()
    assert torch.equal(overwritten.grad, leaf.grad)


def test_second_backward():
    z, target = torch.randn(4, 50, requires_grad=True), torch.randint(50, (4,))
    loss = reward_shaped_cross_entropy(z * 1, target, RANKED)
    first, second = (torch.autograd.grad(loss.sum(), z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    loss = reward_shaped_cross_entropy(z * 1, target, RANKED, inplace_backward=True)
    torch.autograd.grad(loss.sum(), z, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward after inplace_backward=True"):
        torch.autograd.grad(loss.sum(), z)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_second_derivative(inplace):
    z, target = torch.randn(4, 50, requires_grad=True), torch.randint(50, (4,))
    loss = reward_shaped_cross_entropy(z * 1, target, RANKED, inplace_backward=inplace).sum()
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (loss.detach() + gradient.square().sum()).backward()


def test_in_place_backward_is_noticed_by_others_who_saved_the_logits():
    z = torch.randn(4, 50, requires_grad=True) * 1
    other = z.square().sum()
    reward_shaped_cross_entropy(z, torch.randint(50, (4,)), RANKED, inplace_backward=True).sum().backward(
        retain_graph=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
