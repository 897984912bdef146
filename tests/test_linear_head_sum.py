"""The head whose gradients are computed in the forward, on one rank: numbers, products, `main_grad`, refusals."""

from dataclasses import replace

import pytest
import torch
from accuracy import PLAIN, SHAPINGS, assert_as_accurate
from heads import Head, Result, eager, make_head, rounded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ptrl import (
    RewardShaping,
    linear_reward_shaped_cross_entropy,
    linear_reward_shaped_cross_entropy_sum,
    linear_reward_shaped_cross_entropy_sum_with_stats,
    linear_reward_shaped_cross_entropy_with_stats,
)
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses import linear_head_sum

RANKED = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.05, top_k=20)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaves(head: Head) -> tuple[Tensor, Tensor]:
    return head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()


def compute(head: Head, scale: float, chunk_tokens: int = 7) -> Result:
    """The sum weighted by `head.upstream`, and its gradients times `scale`."""
    hidden, weight = leaves(head)
    total = linear_reward_shaped_cross_entropy_sum(
        hidden, weight, head.target, head.upstream, head.shaping, chunk_tokens=chunk_tokens, **head.options
    )
    assert torch.equal(hidden, head.hidden) and torch.equal(weight, head.weight)
    return Result(total.detach(), *torch.autograd.grad(total, (hidden, weight), torch.tensor(scale)))


def per_token(head: Head, scale: float, chunk_tokens: int = 7) -> Result:
    """The same from the function that takes a gradient per token."""
    hidden, weight = leaves(head)
    loss = linear_reward_shaped_cross_entropy(
        hidden, weight, head.target, head.shaping, chunk_tokens=chunk_tokens, **head.options
    )
    total = (head.upstream * loss).sum()
    return Result(total.detach(), *torch.autograd.grad(total, (hidden, weight), torch.tensor(scale)))


def check(head: Head, scale: float) -> None:
    dtype, result = head.hidden.dtype, compute(head, scale)
    assert result.loss.shape == () and result.loss.dtype == torch.float32
    assert result.grad_hidden.dtype == result.grad_weight.dtype == dtype
    fp32, exact = eager(head, torch.float32), eager(head, torch.float64)
    assert_as_accurate(result.loss, *((head.upstream * loss).sum() for loss in (fp32.loss, exact.loss)))
    # The scalar comes last: what the head rounds does not contain it.
    rivals = rounded(Result(fp32.loss, scale * fp32.grad_hidden.to(dtype), scale * fp32.grad_weight), dtype)
    for ours, theirs, truth in zip(result[1:], rivals[1:], exact[1:], strict=True):
        assert_as_accurate(ours, theirs, scale * truth)


@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
def test_as_accurate_as_eager_for_every_shaping(shaping):
    torch.manual_seed(0)
    check(make_head(torch.bfloat16, (5, 4), 301, replace(shaping, top_k=20)), 0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(1,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"vocab_size": 250}, {"ignore_index": -100}], ids=str)
def test_as_accurate_as_eager_for_every_shape(dtype, leading, options):
    torch.manual_seed(1)
    check(make_head(dtype, leading, 301, RANKED, **options), -3.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("options", [{}, {"vocab_size": 250, "ignore_index": -100}], ids=str)
def test_the_function_per_token_gives_the_same_bits(dtype, chunk_tokens, options):
    torch.manual_seed(2)
    head = make_head(dtype, (5, 4), 301, RANKED, **options)
    head.upstream[1] = 0
    assert all(map(torch.equal, compute(head, 1.0, chunk_tokens), per_token(head, 1.0, chunk_tokens)))


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1 + 2**-8), (torch.float16, 1 + 2**-11)])
def test_the_scalar_from_above_is_not_rounded(dtype, scale):
    torch.manual_seed(9)
    head = make_head(dtype, (20,), 301, RANKED)
    unscaled = compute(head, 1.0).grad_hidden
    expected = (scale * unscaled.float()).to(dtype)
    assert not torch.equal(expected, unscaled)
    assert torch.equal(compute(head, scale).grad_hidden, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_losses_of_the_tokens(dtype):
    torch.manual_seed(3)
    head = make_head(dtype, (5, 4), 301, PLAIN, ignore_index=-100)
    hidden, weight = leaves(head)
    loss, stats = linear_reward_shaped_cross_entropy_with_stats(
        hidden, weight, head.target, chunk_tokens=7, **head.options
    )
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            total, losses, others = linear_reward_shaped_cross_entropy_sum_with_stats(
                hidden, weight, head.target, head.upstream, chunk_tokens=7, **head.options
            )
        assert total.requires_grad == recording
        assert torch.equal(losses, loss) and not losses.requires_grad
        for ours, theirs in zip(others, stats, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and not ours.requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float64])
def test_a_token_weight_of_any_real_dtype_is_a_constant(dtype):
    torch.manual_seed(4)
    head = make_head(torch.float32, (9,), 40, RANKED)
    head = head._replace(upstream=(torch.rand(9) * 3).to(dtype))
    expected = per_token(head._replace(upstream=head.upstream.float()), 1.0)
    if dtype.is_floating_point:
        head.upstream.requires_grad_()
    assert all(map(torch.equal, compute(head, 1.0), expected))


def test_gradcheck_and_no_second_derivative():
    torch.manual_seed(5)
    hidden, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    target, token_weight = torch.randint(11, (5,)), torch.rand(5, dtype=torch.float64)
    shaping = RewardShaping(lambda_head=0.3, lambda_tail=-0.1, top_k=4)

    def total(hidden, weight):
        return linear_reward_shaped_cross_entropy_sum(hidden, weight, target, token_weight, shaping, chunk_tokens=2)

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), weight.requires_grad_()))
    for power in (1, 2):  # of 1 the gradient that comes from above is a constant
        (first,) = torch.autograd.grad(total(hidden, weight) ** power, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()


def test_a_second_backward_a_frozen_weight_and_frozen_hidden_states():
    torch.manual_seed(6)
    head = make_head(torch.float32, (9,), 40, RANKED)
    expected = compute(head, 1.0)
    hidden, weight = leaves(head)
    rest = (head.target, head.upstream, RANKED)
    total = linear_reward_shaped_cross_entropy_sum(hidden, weight, *rest, chunk_tokens=7)
    for scale in (1.0, 4.0):  # the second one with the gradients of the first one handed out
        again = torch.autograd.grad(total, (hidden, weight), torch.tensor(scale), retain_graph=True)
        assert all(map(torch.equal, again, [scale * gradient for gradient in expected[1:]]))
    torch.autograd.grad(total, (hidden, weight))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(total, (hidden, weight))
    for leaf, others, gradient in (
        (hidden, (hidden, head.weight), expected.grad_hidden),
        (weight, (head.hidden, weight), expected.grad_weight),
    ):
        total = linear_reward_shaped_cross_entropy_sum(*others, *rest, chunk_tokens=7)
        assert torch.equal(torch.autograd.grad(total, leaf)[0], gradient)


class Products(TorchDispatchMode):
    """Counts multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.numel() * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_products_and_one_where_no_gradient_is_asked_for(dtype):
    head = make_head(dtype, (20,), 301, RANKED)
    for function, expected in ((compute, 3), (per_token, 4)):
        with Products() as products:
            function(head, 1.0)
        assert products.count == expected * 20 * 301 * 48
    hidden, weight = leaves(head)
    rest = (head.target, head.upstream, RANKED)
    with torch.no_grad(), Products() as products:
        total = linear_reward_shaped_cross_entropy_sum(hidden, weight, *rest, chunk_tokens=7)
    assert products.count == 20 * 301 * 48 and not total.requires_grad
    assert torch.equal(total, compute(head, 1.0).loss)
    with Products() as products:
        total = linear_reward_shaped_cross_entropy_sum(head.hidden, head.weight, *rest)
    assert products.count == 20 * 301 * 48 and not total.requires_grad


def test_no_tokens():
    hidden, weight = torch.zeros(0, 2, 8, requires_grad=True), torch.ones(30, 8, requires_grad=True)
    total = linear_reward_shaped_cross_entropy_sum(
        hidden, weight, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    )
    total.backward()
    assert total == 0 and hidden.grad.shape == hidden.shape and not weight.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_two_microbatches_goes_to_main_grad(dtype, tied):
    torch.manual_seed(7)
    heads = [make_head(dtype, (11,), 70, RANKED) for _ in range(2)]
    heads[1] = heads[1]._replace(weight=heads[0].weight)
    weight = torch.nn.Parameter(heads[0].weight.clone())
    before, scale = torch.randn(weight.shape), 0.3
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = before.clone(), False, tied
    hidden = [head.hidden.clone().requires_grad_() for head in heads]
    totals = [
        linear_reward_shaped_cross_entropy_sum(
            x, weight, head.target, head.upstream, RANKED, chunk_tokens=4, gradient_accumulation_fusion=True
        )
        for x, head in zip(hidden, heads, strict=True)
    ]
    assert torch.equal(weight.main_grad, before) and not weight.grad_added_to_main_grad
    for x, total in zip(hidden, totals, strict=True):
        _, placeholder = torch.autograd.grad(total, (x, weight), torch.tensor(scale))
        assert weight.grad_added_to_main_grad
        assert placeholder.shape == weight.shape and placeholder.dtype == dtype
        assert not tied or not placeholder.any()
    scaled = [head._replace(upstream=scale * head.upstream) for head in heads]
    rivals, exact = ([eager(head, d).grad_weight for head in scaled] for d in (torch.float32, torch.float64))
    assert_as_accurate(weight.main_grad, before + sum(rivals), before.double() + sum(exact))


def test_main_grad_is_left_alone_unless_asked_for_and_autograd_gets_none_without_megatrons_mark():
    head = make_head(torch.float32, (5,), 30, PLAIN)
    weight = torch.nn.Parameter(head.weight.clone())
    weight.main_grad = torch.zeros_like(weight)
    arguments = (head.hidden, weight, head.target, head.upstream)
    linear_reward_shaped_cross_entropy_sum(*arguments).backward()
    assert weight.grad.any() and not weight.main_grad.any()
    plain, weight.grad = weight.grad, None
    linear_reward_shaped_cross_entropy_sum(*arguments, gradient_accumulation_fusion=True).backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, plain)


def test_more_rows_of_weight_than_are_scaled_at_a_time(monkeypatch):
    monkeypatch.setattr(linear_head_sum, "_SCALED", 128)
    torch.manual_seed(8)
    check(make_head(torch.bfloat16, (6,), 301, RANKED), 0.7)


def test_bad_input_is_told_in_one_line():
    hidden, weight, target = torch.zeros(6, 2, 8), torch.zeros(30, 8), torch.zeros(6, 2, dtype=torch.int64)

    def refused(said, target=target, token_weight=torch.ones(6, 2), **options):  # noqa: B008 (read only)
        with pytest.raises(InputError, match=said) as caught:
            linear_reward_shaped_cross_entropy_sum(hidden, weight, target, token_weight, **options)
        assert "\n" not in str(caught.value)

    refused(r"token_weight has shape \[12\]; expected \[6, 2\], that of target", token_weight=torch.ones(12))
    refused("token_weight is torch.complex64; expected a real dtype", token_weight=torch.ones(6, 2) * 1j)
    refused("token_weight is on meta; expected cpu", token_weight=torch.ones(6, 2, device="meta"))
    refused(r"target has shape \[2, 6\]; expected \[6, 2\] for hidden \[6, 2, 8\]$", target=target.t())
    refused("chunk_tokens is 0; expected >= 1", chunk_tokens=0)
    refused("top_k is 31; expected at most the 30 tokens", shaping=RewardShaping(lambda_head=1.0, top_k=31))
    refused(r"target\[0, 0\] is 30; expected 0 to 29", target=target + 30)
    refused("vocab_size is 31; expected 1 to 30", vocab_size=31)
