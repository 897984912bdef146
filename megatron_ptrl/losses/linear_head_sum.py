"""The weighted sum of the loss from hidden states, with its gradients computed in the forward: the logits once.

A gradient per token that comes from above would come too late. Here only a scalar may come, which the gradients are
multiplied by: the loss scale, or 1 over the number of tokens.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ptrl import ops
from megatron_ptrl.config import DEFAULT_CHUNK_TOKENS, RewardShaping
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.chunked_head import (
    Head,
    add_product,
    all_tokens,
    check_tensors,
    chunks,
    placeholder,
    reduce,
    sum_dtype,
)
from megatron_ptrl.losses.once import once_differentiable
from megatron_ptrl.losses.reward_shaped_ce import Call, Group, TokenStats, check_vocabulary, exchange

# Rows of a gradient that are multiplied at a time, because a CPU makes a copy of what it converts.
_SCALED = 4096


def linear_reward_shaped_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 (frozen)
    tp_group: Group | None = None,
    *,
    sequence_parallel: bool = False,
    ignore_index: int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """sum over tokens of token_weight * `linear_reward_shaped_cross_entropy`, with three products instead of four.

    hidden, weight, target, gradient_accumulation_fusion: as there
    token_weight: [...] like `target`, of any real dtype, the same on every rank; a constant, whatever made it
    returns: scalar fp32 (fp64 for fp64), the same on every rank

    Logits, and their gradient times `token_weight`, are rounded to the dtype of `hidden`; both gradients are summed in
    fp32, that of `hidden` rounded once. The scalar that the backward brings comes on top of that, in fp32, and what it
    gives is rounded again; in fp16 a loss scale against underflow therefore belongs into `token_weight`.

    Cost: three products of n h v/tp multiply-adds, all in the forward (one where nothing needs a gradient). Forward,
    one all-gather a chunk of 28 bytes a token and rank plus, where head and tail differ, `top_k` logits; one all-reduce
    of the gradient of `hidden` in fp32 or, with `sequence_parallel`, an all-gather of the hidden states and a
    reduce-scatter of that gradient. Backward, no collective. Kept for the backward: the gradients, that of `hidden` in
    its dtype, that of `weight` in fp32, 4 h v/tp bytes, which are then added to `main_grad` or rounded. Peak: one chunk
    of logits beside the gradients; over a group the one of `hidden` takes 4 n h bytes.

    Raises InputError as `linear_reward_shaped_cross_entropy` does, and for a `token_weight` that does not fit.
    """
    call = Call(shaping, tp_group, False, ignore_index, vocab_size, with_stats=False)
    head = Head(call, sequence_parallel, chunk_tokens, gradient_accumulation_fusion)
    return _apply(hidden, weight, target, token_weight, head)[0]


def linear_reward_shaped_cross_entropy_sum_with_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 (frozen)
    tp_group: Group | None = None,
    *,
    sequence_parallel: bool = False,
    ignore_index: int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    gradient_accumulation_fusion: bool = False,
) -> tuple[Tensor, Tensor, TokenStats]:
    """`linear_reward_shaped_cross_entropy_sum`, the loss [...] of each token without a gradient, and its statistics.

    Always ranks: the all-gathers carry the `top_k` logits even where no reward depends on them.
    """
    call = Call(shaping, tp_group, False, ignore_index, vocab_size, with_stats=True)
    head = Head(call, sequence_parallel, chunk_tokens, gradient_accumulation_fusion)
    total, loss, stats = _apply(hidden, weight, target, token_weight, head)
    logprob, entropy, head_mass, target_in_head = stats.view(ops.STATS, *target.shape)
    return total, loss, TokenStats(logprob, entropy, head_mass, target_in_head.bool())


def _apply(
    hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors(hidden, weight, target, head)
    if token_weight.shape != target.shape:
        raise InputError(
            f"token_weight has shape {list(token_weight.shape)}; expected {list(target.shape)}, that of target"
        )
    if token_weight.is_complex():
        raise InputError(f"token_weight is {token_weight.dtype}; expected a real dtype")
    if token_weight.device != hidden.device:
        raise InputError(f"token_weight is on {token_weight.device}; expected {hidden.device}, where hidden is")
    # Inside of the function the answer is always no.
    recording = torch.is_grad_enabled()
    return _LinearRewardShapedCrossEntropySum.apply(hidden, weight, target, token_weight.detach(), head, recording)


class _LinearRewardShapedCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, head: Head, recording: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        call, columns, ids = head.call, len(weight), target.reshape(-1).contiguous()
        for_hidden, for_weight = (recording and needed for needed in ctx.needs_input_grad[:2])
        if call.shards == 1:
            check_vocabulary(None, target, columns, call)
        rows = all_tokens(hidden, head)
        dtype = sum_dtype(rows)
        upstream = token_weight.reshape(-1).to(dtype).contiguous()
        loss, stats = rows.new_empty(len(rows), dtype=dtype), rows.new_empty(ops.STATS, len(rows), dtype=dtype)
        # Over a group this is one of several terms, and rounded only when they are summed.
        grad_rows = torch.zeros_like(rows, dtype=rows.dtype if call.shards == 1 else dtype) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if for_weight else None
        for part, logits in chunks(rows, weight, head):
            share = upstream[part] if for_hidden or for_weight else None
            loss[part], stats[:, part] = _loss_and_gradient_(logits, ids[part], share, target, call)
            if grad_rows is not None:
                add_product(grad_rows[part], logits, weight)
            if grad_weight is not None:
                add_product(grad_weight, logits.t(), rows[part])
        grad_hidden = None if grad_rows is None else reduce(grad_rows, head).to(hidden.dtype).view(hidden.shape)
        # Saved, not attributes: autograd lets go of them as soon as they are spent, and keeps them for `retain_graph`.
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight = weight
        ctx.main_grad = getattr(weight, "main_grad", None) if head.gradient_accumulation_fusion else None
        loss = loss.view(target.shape)
        ctx.mark_non_differentiable(loss, stats)
        return (upstream * loss.view(-1)).sum(), loss, stats

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_total.reshape(1)
        for_hidden = None if grad_hidden is None else _scaled(grad_hidden, scale, grad_hidden.dtype)
        if grad_weight is None:
            for_weight = None
        elif ctx.main_grad is None:
            for_weight = _scaled(grad_weight, scale, ctx.weight.dtype)
        else:
            ctx.main_grad.addcmul_(grad_weight, scale)
            for_weight = placeholder(ctx.weight)
        return for_hidden, for_weight, None, None, None, None


def _loss_and_gradient_(
    logits: Tensor, ids: Tensor, upstream: Tensor | None, target: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """Loss [n] and statistics [4, n] of a chunk; with `upstream` [n] the gradient is written over the logits."""
    columns, shaping = logits.shape[-1], call.shaping
    start, ranked = call.vocab_start(columns), call.ranked(columns)
    rewards = (shaping.beta, shaping.lambda_head, shaping.lambda_tail, call.ignore_index)
    if call.shards == 1 and upstream is not None:
        return ops.reward_shaped_ce_one_pass_(logits, ids, upstream, ranked, call.top_k, call.with_stats, *rewards)
    numbers, keys = ops.reward_shaped_ce_stats(
        logits, ids, start, ranked, call.top_k, call.with_stats, call.ignore_index
    )
    every_numbers, every_keys = exchange(numbers, keys, call)
    # After the exchange, so that every rank raises and none is left waiting.
    check_vocabulary(every_numbers, target, columns * call.shards, call, sharded="the logits of weight")
    loss, coefficients, stats = ops.reward_shaped_ce_combine(every_numbers, every_keys, ids, *rewards)
    if upstream is not None:
        ops.reward_shaped_ce_grad_(logits, ids, upstream, coefficients, start, ranked)
    return loss, stats


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a tensor of one element, in the wider of their dtypes, then rounded."""
    product = torch.empty_like(x, dtype=dtype)
    for rows, out in zip(x.split(_SCALED), product.split(_SCALED), strict=True):
        torch.mul(rows, scale, out=out)
    return product
