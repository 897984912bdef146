"""The reward-shaped cross entropy straight from the hidden states: the logits of all tokens never exist at once."""

from typing import Any

import torch
from torch import Tensor

from megatron_ptrl import ops
from megatron_ptrl.config import DEFAULT_CHUNK_TOKENS, RewardShaping
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


def linear_reward_shaped_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 (frozen)
    tp_group: Group | None = None,
    *,
    sequence_parallel: bool = False,
    ignore_index: int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """`reward_shaped_cross_entropy` of the logits hidden @ weight^T, which exist for `chunk_tokens` tokens at a time.

    hidden: [..., h] bf16, fp16 or fp32, the same on every rank; with `sequence_parallel` rank r of `tp_group` holds the
        r-th of tp equal parts of the first dimension: [s/tp, b, h]
    weight: [v/tp, h] in the dtype of `hidden`; rank r holds the rows from r v/tp on
    target: [...] int64 ids of all tokens ([s, b], also with `sequence_parallel`), the same on every rank
    gradient_accumulation_fusion: add the gradient of `weight` to `weight.main_grad` where there is one, as Megatron's
        linear layers do: `grad_added_to_main_grad` is set, and the gradient handed to autograd is a placeholder (of
        zeros where `zero_out_wgrad` asks for them) or None
    returns: [...] fp32 (fp64 for fp64), the same on every rank; it takes any gradient per token

    Logits and their gradient are rounded to the dtype of `hidden`, as the head of a Megatron model rounds them. Both
    gradients are summed in fp32, over vocabulary, tokens, chunks and ranks, and rounded once.

    Cost: four products of n h v/tp multiply-adds, because the backward computes the logits again. Forward, one
    all-gather of 28 bytes a token and rank plus, where head and tail differ, `top_k` logits; with `sequence_parallel`
    one of the hidden states before it. Backward, one all-reduce of the gradient of `hidden` in fp32 or, with
    `sequence_parallel`, an all-gather of the hidden states and a reduce-scatter of that gradient. Kept for the
    backward: `hidden` and 32 bytes a token. Peak: one chunk of logits, chunk_tokens v/tp elements, beside the
    gradients; over a group the one of `hidden` takes 4 n h bytes; that of a bf16 or fp16 `weight` 4 h v/tp until it is
    rounded, nothing where it goes into `main_grad`.

    Raises InputError as `reward_shaped_cross_entropy` does, and for a `hidden`, `weight` and `target` that do not fit.
    """
    call = Call(shaping, tp_group, False, ignore_index, vocab_size, with_stats=False)
    head = Head(call, sequence_parallel, chunk_tokens, gradient_accumulation_fusion)
    return _apply(hidden, weight, target, head)[0]


def linear_reward_shaped_cross_entropy_with_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 (frozen)
    tp_group: Group | None = None,
    *,
    sequence_parallel: bool = False,
    ignore_index: int | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    gradient_accumulation_fusion: bool = False,
    mask_padding: bool = False,
) -> tuple[Tensor, TokenStats]:
    """`linear_reward_shaped_cross_entropy` and, from the same read of the logits, the statistics of each token.

    mask_padding: the columns behind `vocab_size` have no part in the softmax, nor any gradient

    Always ranks: the all-gather carries the `top_k` logits even where no reward depends on them.
    """
    call = Call(shaping, tp_group, False, ignore_index, vocab_size, with_stats=True)
    head = Head(call, sequence_parallel, chunk_tokens, gradient_accumulation_fusion, mask_padding)
    loss, stats = _apply(hidden, weight, target, head)
    logprob, entropy, head_mass, target_in_head = stats.view(ops.STATS, *target.shape)
    return loss, TokenStats(logprob, entropy, head_mass, target_in_head.bool())


def _apply(hidden: Tensor, weight: Tensor, target: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    check_tensors(hidden, weight, target, head)
    return _LinearRewardShapedCrossEntropy.apply(hidden, weight, target, head)


class _LinearRewardShapedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        call, columns, ids = head.call, len(weight), target.reshape(-1).contiguous()
        place = (call.vocab_start(columns), call.ranked(columns))
        rows = all_tokens(hidden, head)
        numbers = rows.new_empty(len(rows), ops.NUMBERS, dtype=sum_dtype(rows))
        keys = rows.new_empty(len(rows), call.top_k)
        for part, logits in chunks(rows, weight, head):
            numbers[part], keys[part] = ops.reward_shaped_ce_stats(
                logits, ids[part], *place, call.top_k, call.with_stats, call.ignore_index
            )
        every_numbers, every_keys = exchange(numbers, keys, call)
        # After the exchange, so that every rank raises and none is left waiting.
        check_vocabulary(every_numbers, target, columns * call.shards, call, sharded="the logits of weight")
        shaping = call.shaping
        loss, coefficients, stats = ops.reward_shaped_ce_combine(
            every_numbers, every_keys, ids, shaping.beta, shaping.lambda_head, shaping.lambda_tail, call.ignore_index
        )
        ctx.save_for_backward(hidden, weight, ids, coefficients)
        ctx.head, ctx.place = head, place
        # Not among the saved tensors: other layers and microbatches add to it before this backward comes.
        ctx.main_grad = getattr(weight, "main_grad", None) if head.gradient_accumulation_fusion else None
        ctx.mark_non_differentiable(stats)
        return loss.view(target.shape), stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, ids, coefficients = ctx.saved_tensors
        head, (for_hidden, for_weight, *_) = ctx.head, ctx.needs_input_grad
        upstream = grad_loss.reshape(-1).to(coefficients.dtype).contiguous()
        rows = all_tokens(hidden, head)
        # Over a group this is one of several terms, and rounded only when they are summed.
        dtype = rows.dtype if head.call.shards == 1 else sum_dtype(rows)
        grad_rows = torch.zeros_like(rows, dtype=dtype) if for_hidden else None
        grad_weight = ctx.main_grad
        if for_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=sum_dtype(weight))
        for part, logits in chunks(rows, weight, head):
            ops.reward_shaped_ce_grad_(logits, ids[part], upstream[part], coefficients[part], *ctx.place)
            if grad_rows is not None:
                add_product(grad_rows[part], logits, weight)
            if for_weight:
                add_product(grad_weight, logits.t(), rows[part])
        grad_hidden = None if grad_rows is None else reduce(grad_rows, head).to(hidden.dtype).view(hidden.shape)
        if not for_weight:
            return grad_hidden, None, None, None
        if ctx.main_grad is None:
            return grad_hidden, grad_weight.to(weight.dtype), None, None
        return grad_hidden, placeholder(weight), None, None
