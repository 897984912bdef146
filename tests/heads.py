"""Hidden states, weights and targets of a language-model head, and the same head in eager torch, in fp32 and fp64."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ptrl import RewardShaping
from megatron_ptrl.reference import reward_shaped_cross_entropy


class Head(NamedTuple):
    """One call: its tensors, the gradient per token that comes from above, and the options."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    upstream: Tensor
    shaping: RewardShaping
    options: dict


class Result(NamedTuple):
    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def make_head(
    dtype: torch.dtype, leading: tuple[int, ...], vocab: int, shaping: RewardShaping, h: int = 48, **options: int
) -> Head:
    """Coarse numbers in bf16 and fp16, so that every order of summation gives the same logit before it is rounded: a
    logit on the border between two roundings would else be as far off as the whole error that is looked for."""
    if dtype == torch.float32:
        hidden, weight = torch.randn(*leading, h), torch.randn(vocab, h) * 0.4
    else:
        hidden, weight = torch.randint(-12, 13, (*leading, h)) / 8, torch.randint(-16, 17, (vocab, h)) / 32
    target = torch.randint(options.get("vocab_size", vocab), leading)
    if "ignore_index" in options:
        target.view(-1)[::3] = options["ignore_index"]
    return Head(hidden.to(dtype), weight.to(dtype), target, torch.rand(leading) + 0.5, shaping, options)


def eager(head: Head, dtype: torch.dtype) -> Result:
    """The head in `dtype`, its logits rounded to that of the model; with fp32 their gradient is rounded, too."""
    leaves = [x.to(dtype).requires_grad_() for x in (head.hidden, head.weight)]
    exact = leaves[0] @ leaves[1].t()
    if dtype == torch.float64:
        logits = exact + (exact.to(head.hidden.dtype).double() - exact).detach()
        if head.hidden.dtype == torch.float32:
            logits = exact
    else:
        logits = exact.to(head.hidden.dtype).to(dtype)
    ignored = head.target == head.options.get("ignore_index", -1)
    target = head.target.masked_fill(ignored, 0)
    loss = reward_shaped_cross_entropy(logits, target, head.shaping, head.options.get("vocab_size"))
    loss = torch.where(ignored, 0, loss)
    gradients = torch.autograd.grad(loss, leaves, head.upstream.to(dtype))
    return Result(loss.detach(), *gradients)


def rounded(result: Result, dtype: torch.dtype) -> Result:
    """Gradients in the dtype in which autograd gets them."""
    return Result(result.loss, result.grad_hidden.to(dtype), result.grad_weight.to(dtype))
