"""The reward-shaped cross entropy straight from the hidden states: the logits of all tokens never exist at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ptrl import ops
from megatron_ptrl.config import DEFAULT_CHUNK_TOKENS, RewardShaping
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.reward_shaped_ce import (
    DTYPES,
    Call,
    Group,
    TokenStats,
    all_gather,
    check_top_k,
    check_vocabulary,
    exchange,
)

# torch 2.13 deprecates the older name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Rows or columns of bf16 and fp16 factors that are widened at a time, where no product sums in fp32 by itself.
_WIDENED = 4096


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
    head = _Head(call, sequence_parallel, chunk_tokens, gradient_accumulation_fusion)
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
) -> tuple[Tensor, TokenStats]:
    """`linear_reward_shaped_cross_entropy` and, from the same read of the logits, the statistics of each token.

    Always ranks: the all-gather carries the `top_k` logits even where no reward depends on them.
    """
    call = Call(shaping, tp_group, False, ignore_index, vocab_size, with_stats=True)
    head = _Head(call, sequence_parallel, chunk_tokens, gradient_accumulation_fusion)
    loss, stats = _apply(hidden, weight, target, head)
    logprob, entropy, head_mass, target_in_head = stats.view(ops.STATS, *target.shape)
    return loss, TokenStats(logprob, entropy, head_mass, target_in_head.bool())


@dataclass(frozen=True)
class _Head:
    """The arguments that are no tensors."""

    call: Call
    sequence_parallel: bool
    chunk_tokens: int
    gradient_accumulation_fusion: bool

    @property
    def parts(self) -> int:
        """Into how many the first dimension of the hidden states is cut."""
        return self.call.shards if self.sequence_parallel else 1


def _apply(hidden: Tensor, weight: Tensor, target: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
    _check_tensors(hidden, weight, target, head)
    return _LinearRewardShapedCrossEntropy.apply(hidden, weight, target, head)


class _LinearRewardShapedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        call, columns, ids = head.call, len(weight), target.reshape(-1).contiguous()
        place = (call.vocab_start(columns), call.ranked(columns))
        rows = _all_tokens(hidden, head)
        numbers = rows.new_empty(len(rows), ops.NUMBERS, dtype=_sum_dtype(rows))
        keys = rows.new_empty(len(rows), call.top_k)
        for part, logits in _chunks(rows, weight, head.chunk_tokens):
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
        rows = _all_tokens(hidden, head)
        # Over a group this is one of several terms, and rounded only when they are summed.
        dtype = rows.dtype if head.call.shards == 1 else _sum_dtype(rows)
        grad_rows = torch.zeros_like(rows, dtype=dtype) if for_hidden else None
        grad_weight = ctx.main_grad
        if for_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=_sum_dtype(weight))
        for part, logits in _chunks(rows, weight, head.chunk_tokens):
            ops.reward_shaped_ce_grad_(logits, ids[part], upstream[part], coefficients[part], *ctx.place)
            if grad_rows is not None:
                _add_product(grad_rows[part], logits, weight)
            if for_weight:
                _add_product(grad_weight, logits.t(), rows[part])
        grad_hidden = None if grad_rows is None else _reduce(grad_rows, head).to(hidden.dtype).view(hidden.shape)
        if not for_weight:
            return grad_hidden, None, None, None
        if ctx.main_grad is None:
            return grad_hidden, grad_weight.to(weight.dtype), None, None
        return grad_hidden, _placeholder(weight), None, None


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _all_tokens(hidden: Tensor, head: _Head) -> Tensor:
    """This rank's part of the hidden states -> those of all tokens, [n, h]."""
    mine = hidden.reshape(-1, hidden.shape[-1])
    if head.parts == 1:
        return mine
    every = mine.new_empty(head.parts * len(mine), mine.shape[1])
    all_gather(every, mine.contiguous(), group=head.call.tp_group)
    return every


def _chunks(rows: Tensor, weight: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Which tokens, and their logits; the next ones take the same memory."""
    logits = rows.new_empty(min(chunk_tokens, len(rows)), len(weight))
    for start in range(0, len(rows), chunk_tokens):
        part = slice(start, min(start + chunk_tokens, len(rows)))
        yield part, torch.mm(rows[part], weight.t(), out=logits[: part.stop - start])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the dtype of `total` where that is wider than that of the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for i in range(0, a.shape[0], _WIDENED):
            for k in range(0, a.shape[1], _WIDENED):
                left, right = a[i : i + _WIDENED, k : k + _WIDENED], b[k : k + _WIDENED]
                total[i : i + _WIDENED].addmm_(left.to(total.dtype), right.to(total.dtype))


def _reduce(grad_rows: Tensor, head: _Head) -> Tensor:
    """The sum over the shards of the vocabulary; with sequence parallelism this rank's part of it."""
    if head.call.shards == 1:
        return grad_rows
    if not head.sequence_parallel:
        dist.all_reduce(grad_rows, group=head.call.tp_group)
        return grad_rows
    mine = grad_rows.new_empty(len(grad_rows) // head.parts, grad_rows.shape[1])
    _reduce_scatter(mine, grad_rows, group=head.call.tp_group)
    return mine


def _placeholder(weight: Tensor) -> Tensor | None:
    """What autograd gets when the gradient is in `main_grad` already; Megatron's data-parallel hooks wait for it."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # A tied embedding adds its own gradient to this one, and the hook then takes the sum.
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _check_tensors(hidden: Tensor, weight: Tensor, target: Tensor, head: _Head) -> None:
    if hidden.dtype not in DTYPES:
        raise InputError(f"hidden is {hidden.dtype}; expected bfloat16, float16 or float32")
    if weight.dtype != hidden.dtype:
        raise InputError(f"weight is {weight.dtype}; expected {hidden.dtype}, the dtype of hidden")
    if target.dtype != torch.int64:
        raise InputError(f"target is {target.dtype}; expected int64 token ids")
    if hidden.dim() < 2:
        raise InputError(f"hidden has shape {list(hidden.shape)}; expected [s, b, h] or [n, h]")
    if weight.dim() != 2 or len(weight) == 0 or weight.shape[1] != hidden.shape[-1]:
        raise InputError(
            f"weight has shape {list(weight.shape)}; expected [v/tp, {hidden.shape[-1]}], the last dimension that of "
            f"hidden {list(hidden.shape)}"
        )
    expected = [hidden.shape[0] * head.parts, *hidden.shape[1:-1]]
    if list(target.shape) != expected:
        split = f" on each of {head.parts} sequence-parallel ranks" if head.sequence_parallel else ""
        raise InputError(
            f"target has shape {list(target.shape)}; expected {expected} for hidden {list(hidden.shape)}{split}"
        )
    for name, tensor in (("weight", weight), ("target", target)):
        if tensor.device != hidden.device:
            raise InputError(f"{name} is on {tensor.device}; expected {hidden.device}, where hidden is")
    if head.chunk_tokens < 1:
        raise InputError(f"chunk_tokens is {head.chunk_tokens}; expected >= 1")
    check_top_k(len(weight), head.call)
