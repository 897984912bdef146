"""The head without its logits, on one rank: numbers, memory, `main_grad`, refusals."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accuracy import PLAIN, SHAPINGS, assert_as_accurate
from heads import Head, Result, eager, make_head, rounded

from megatron_ptrl import (
    RewardShaping,
    linear_reward_shaped_cross_entropy,
    linear_reward_shaped_cross_entropy_with_stats,
    reward_shaped_cross_entropy,
    reward_shaped_cross_entropy_with_stats,
)
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.padding import bar_padding_

RANKED = RewardShaping(beta=-0.25, lambda_head=0.1, lambda_tail=-0.05, top_k=20)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compute(head: Head, chunk_tokens: int = 7) -> Result:
    hidden, weight = (x.detach().clone().requires_grad_() for x in (head.hidden, head.weight))
    loss = linear_reward_shaped_cross_entropy(
        hidden, weight, head.target, head.shaping, chunk_tokens=chunk_tokens, **head.options
    )
    assert torch.equal(hidden, head.hidden) and torch.equal(weight, head.weight)
    return Result(loss.detach(), *torch.autograd.grad(loss, (hidden, weight), head.upstream))


def check(head: Head, result: Result) -> None:
    dtype = head.hidden.dtype
    assert result.loss.dtype == torch.float32 and result.grad_hidden.dtype == result.grad_weight.dtype == dtype
    rival = rounded(eager(head, torch.float32), dtype)
    for ours, theirs, exact in zip(result, rival, eager(head, torch.float64), strict=True):
        assert_as_accurate(ours, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shaping", SHAPINGS, ids=str)
def test_as_accurate_as_eager_for_every_shaping(dtype, shaping):
    torch.manual_seed(0)
    head = make_head(dtype, (5, 4), 301, replace(shaping, top_k=20))
    check(head, compute(head))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(1,), (33,), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"vocab_size": 250}, {"ignore_index": -100}], ids=str)
def test_as_accurate_as_eager_for_every_shape(dtype, leading, options):
    torch.manual_seed(1)
    head = make_head(dtype, leading, 301, RANKED, **options)
    check(head, compute(head))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_can_be_left_out_of_the_softmax(dtype):
    """As though the weight had no such rows, though they are the largest of all; dense logits alike."""
    torch.manual_seed(3)
    real, shaping = 250, RANKED
    narrow = make_head(dtype, (33,), real, shaping)
    exact = eager(narrow, torch.float64)
    rival = rounded(eager(narrow, torch.float32), dtype)
    hidden, weight = narrow.hidden.clone().requires_grad_(), torch.full((301, narrow.weight.shape[1]), 9.0, dtype=dtype)
    weight[:real] = narrow.weight
    weight.requires_grad_()
    options = {"vocab_size": real, "chunk_tokens": 7, "mask_padding": True}
    loss, _ = linear_reward_shaped_cross_entropy_with_stats(hidden, weight, narrow.target, shaping, **options)
    of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight), narrow.upstream)
    assert not of_weight[real:].any()
    for ours, theirs, best in zip((loss, of_hidden, of_weight[:real]), rival, exact, strict=True):
        assert_as_accurate(ours.detach(), theirs, best)

    logits = (narrow.hidden @ weight.detach().t()).requires_grad_()
    alone = logits.detach()[:, :real].clone().requires_grad_()
    dense = reward_shaped_cross_entropy(bar_padding_(logits * 1, real), narrow.target, shaping, vocab_size=real)
    without = reward_shaped_cross_entropy(alone, narrow.target, shaping)
    torch.testing.assert_close(dense, without)
    (found,), (expected,) = torch.autograd.grad(dense.sum(), logits), torch.autograd.grad(without.sum(), alone)
    torch.testing.assert_close(found[:, :real], expected)
    assert not found[:, real:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_columns_than_are_widened_at_a_time(dtype):
    torch.manual_seed(2)
    head = make_head(dtype, (6,), 9001, RANKED, h=16)
    # One chunk: over so many columns a product of fewer rows sums in an order of its own, up to three times as far off.
    check(head, compute(head, chunk_tokens=6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks_are_summed_in_fp32(dtype):
    """Every token pushes the same way, so that a sum kept in bf16 would stop growing."""
    torch.manual_seed(3)
    head = make_head(dtype, (1,), 60, PLAIN, h=8)
    head = head._replace(
        hidden=head.hidden.expand(600, 8).contiguous(), target=head.target.expand(600), upstream=torch.ones(600)
    )
    check(head, compute(head, chunk_tokens=1))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 20, 1000])
def test_the_logits_path_gives_the_same(chunk_tokens):
    torch.manual_seed(4)
    head = make_head(torch.bfloat16, (5, 4), 333, RANKED, vocab_size=300)
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    logits = F.linear(hidden, weight)
    expected, stats = reward_shaped_cross_entropy_with_stats(logits, head.target, RANKED, vocab_size=300)
    loss, linear_stats = linear_reward_shaped_cross_entropy_with_stats(
        hidden, weight, head.target, RANKED, vocab_size=300, chunk_tokens=chunk_tokens
    )
    assert torch.equal(loss, expected)
    for ours, theirs in zip(linear_stats, stats, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and not ours.requires_grad
    result = compute(head, chunk_tokens)
    assert torch.equal(result.loss, expected)
    expected.backward(head.upstream)
    torch.testing.assert_close((result.grad_hidden, result.grad_weight), (hidden.grad, weight.grad))


def test_gradcheck():
    torch.manual_seed(5)
    hidden, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    target = torch.randint(11, (5,))
    shaping = RewardShaping(lambda_head=0.3, lambda_tail=-0.1, top_k=4)

    def loss(hidden, weight):
        return linear_reward_shaped_cross_entropy(hidden, weight, target, shaping, chunk_tokens=2)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def test_a_second_backward_a_frozen_weight_and_frozen_hidden_states():
    torch.manual_seed(6)
    head = make_head(torch.float32, (9,), 40, RANKED)
    expected = compute(head)
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    loss = linear_reward_shaped_cross_entropy(hidden, weight, head.target, RANKED, chunk_tokens=7)
    for _ in range(2):
        again = torch.autograd.grad(loss, (hidden, weight), head.upstream, retain_graph=True)
        assert all(map(torch.equal, again, expected[1:]))
    for leaf, others, gradient in (
        (hidden, (hidden, head.weight), expected.grad_hidden),
        (weight, (head.hidden, weight), expected.grad_weight),
    ):
        loss = linear_reward_shaped_cross_entropy(*others, head.target, RANKED, chunk_tokens=7)
        assert torch.equal(torch.autograd.grad(loss, leaf, head.upstream)[0], gradient)
    with torch.no_grad():
        assert not linear_reward_shaped_cross_entropy(hidden, weight, head.target, RANKED).requires_grad


def test_no_tokens():
    hidden, weight = torch.zeros(0, 2, 8, requires_grad=True), torch.ones(30, 8, requires_grad=True)
    loss = linear_reward_shaped_cross_entropy(hidden, weight, torch.zeros(0, 2, dtype=torch.int64))
    loss.sum().backward()
    assert loss.shape == (0, 2) and hidden.grad.shape == hidden.shape and not weight.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_two_microbatches_goes_to_main_grad(dtype, tied):
    torch.manual_seed(7)
    heads = [make_head(dtype, (11,), 70, RANKED) for _ in range(2)]
    heads[1] = heads[1]._replace(weight=heads[0].weight)
    weight = torch.nn.Parameter(heads[0].weight.clone())
    before = torch.randn(weight.shape)
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = before.clone(), False, tied
    for head in heads:
        hidden = head.hidden.clone().requires_grad_()
        loss = linear_reward_shaped_cross_entropy(
            hidden, weight, head.target, RANKED, chunk_tokens=4, gradient_accumulation_fusion=True
        )
        _, placeholder = torch.autograd.grad(loss, (hidden, weight), head.upstream)
        assert weight.grad_added_to_main_grad
        assert placeholder.shape == weight.shape and placeholder.dtype == dtype
        assert not tied or not placeholder.any()
    rivals, exact = ([eager(head, d).grad_weight for head in heads] for d in (torch.float32, torch.float64))
    assert_as_accurate(weight.main_grad, before + sum(rivals), before.double() + sum(exact))


def test_main_grad_is_left_alone_unless_asked_for_and_autograd_gets_none_without_megatrons_mark():
    head = make_head(torch.float32, (5,), 30, PLAIN)
    weight = torch.nn.Parameter(head.weight.clone())
    weight.main_grad = torch.zeros_like(weight)
    linear_reward_shaped_cross_entropy(head.hidden, weight, head.target).sum().backward()
    assert weight.grad.any() and not weight.main_grad.any()
    plain, weight.grad = weight.grad, None
    linear_reward_shaped_cross_entropy(
        head.hidden, weight, head.target, gradient_accumulation_fusion=True
    ).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, plain)


PEAK = """
import sys, torch
from pathlib import Path
from megatron_ptrl import linear_reward_shaped_cross_entropy, reward_shaped_cross_entropy
torch.set_num_threads(1)

def run(tokens):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 64).bfloat16().requires_grad_()
    weight = torch.randn(16384, 64).bfloat16().requires_grad_()
    target = torch.randint(16384, (tokens,))
    if sys.argv[1] == "linear":
        loss = linear_reward_shaped_cross_entropy(hidden, weight, target, chunk_tokens=128)
    else:
        loss = reward_shaped_cross_entropy(hidden @ weight.t(), target, inplace_backward=True)
    loss.sum().backward()

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

run(128)  # threads, libraries, one chunk
before = peak()
run(4096)
print(peak() - before)
"""


def test_the_peak_is_that_of_one_chunk():
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak is read from /proc")
    grown = {
        name: int(subprocess.run([sys.executable, "-c", PEAK, name], capture_output=True, text=True, check=True).stdout)
        for name in ("linear", "logits")
    }
    every_logit = 4096 * 16384 * 2
    # 32 times the tokens: their hidden states, gradients and coefficients are 1.5 MB, their logits 134 MB.
    assert grown["logits"] > 0.9 * every_logit
    assert grown["linear"] < 0.1 * every_logit


def test_bad_input_is_told_in_one_line():
    hidden, weight, target = torch.zeros(6, 2, 8), torch.zeros(30, 8), torch.zeros(6, 2, dtype=torch.int64)

    def refused(said, hidden=hidden, weight=weight, target=target, **options):
        with pytest.raises(InputError, match=said) as caught:
            linear_reward_shaped_cross_entropy(hidden, weight, target, **options)
        assert "\n" not in str(caught.value)

    refused("hidden is torch.int64; expected bfloat16", hidden=hidden.long())
    refused("weight is torch.bfloat16; expected torch.float32, the dtype of hidden", weight=weight.bfloat16())
    refused("target is torch.float32; expected int64", target=target.float())
    refused(r"hidden has shape \[8\]; expected \[s, b, h\] or \[n, h\]", hidden=hidden[0, 0])
    refused(r"weight has shape \[30, 4\]; expected \[v/tp, 8\]", weight=weight[:, :4])
    refused(r"weight has shape \[0, 8\]", weight=weight[:0])
    refused(r"target has shape \[2, 6\]; expected \[6, 2\] for hidden \[6, 2, 8\]$", target=target.t())
    refused("weight is on meta; expected cpu", weight=weight.to("meta"))
    refused("chunk_tokens is 0; expected >= 1", chunk_tokens=0)
    refused("top_k is 31; expected at most the 30 tokens", shaping=RewardShaping(lambda_head=1.0, top_k=31))
    refused(r"target\[0, 0\] is 30; expected 0 to 29", target=target + 30)
    refused("vocab_size is 31; expected 1 to 30", vocab_size=31)
