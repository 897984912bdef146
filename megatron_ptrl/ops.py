"""Typed wrappers and fake kernels for csrc/, and the same operators in torch for what csrc/ does not serve.

No operator here communicates. Rows are tokens; a shard holds the columns `vocab_start ..` of each row, of which the
first `ranked` are real tokens and the others pad the vocabulary. The columns of `numbers`, `coefficients` and `stats`
are listed in csrc/reward_shaped_ce.h.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_C.so")

NUMBERS = 7
WIDTH = 6  # the column of `numbers` that holds how many columns the shard has
COEFFICIENTS = 6
STATS = 4

_Function = TypeVar("_Function", bound=Callable[..., bool])


def _constant_when_compiled(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result, which would import the compiler, for seconds, before it does this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_compiled
def load_kernels() -> bool:
    """Whether the compiled operators are there; `MEGATRON_PTRL_KERNELS=0` in the environment turns them off."""
    return _load_kernels()


@cache
def _load_kernels() -> bool:
    if os.environ.get("MEGATRON_PTRL_KERNELS") == "0":
        return False
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        reason = str(error) if LIBRARY.exists() else f"{LIBRARY.name} was not built"
        warnings.warn(
            f"megatron_ptrl computes its losses in torch operators, slower and with more memory: {reason}; "
            "install a C++ compiler, then megatron_ptrl again",
            stacklevel=2,
        )
        return False
    _warn_if_older_than_its_sources()
    _register_fakes()
    return True


def _warn_if_older_than_its_sources() -> None:
    """By make's rule, in a source tree; elsewhere there are no sources to be older than."""
    built = LIBRARY.stat().st_mtime
    newer = sorted(path.name for path in (LIBRARY.parents[1] / "csrc").glob("*") if path.stat().st_mtime > built)
    if newer:
        warnings.warn(
            f"{LIBRARY} is older than csrc/{newer[0]}, so what it computes may not be what is written there; "
            "build it again: make quickstart does, or python setup.py build_ext --inplace",
            stacklevel=3,
        )


def _served_by_kernels(x: Tensor) -> bool:
    """The kernels know bf16, fp16 and fp32, on the devices they were built for."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not load_kernels():
        return False
    return x.device.type == "cpu" or _has_kernels(x.device.type)


@_constant_when_compiled
def _has_kernels(device: str) -> bool:
    """Whether the library was built for this kind of device; told once where it was not."""
    return _look_for_kernels(device)


@cache
def _look_for_kernels(device: str) -> bool:
    name = "megatron_ptrl::reward_shaped_ce_stats"
    found = torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())
    if not found and device != "meta":
        warnings.warn(
            f"megatron_ptrl has no kernels for {device}; its losses run there in torch operators, slower and with more "
            "memory",
            stacklevel=2,
        )
    return found


def reward_shaped_ce_stats(
    logits: Tensor,
    target: Tensor,
    vocab_start: int,
    ranked: int,
    top_k: int,
    entropy: bool,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """What this shard knows of each row, in one read of the logits: `numbers` [n, 7], `keys` [n, top_k].

    logits: [..., v/tp] with a dense last dimension     target: [n] int64 global ids
    `keys` are the shard's top_k largest real logits, the k-th last, -inf where it has fewer.
    """
    operator = torch.ops.megatron_ptrl.reward_shaped_ce_stats if _served_by_kernels(logits) else _stats
    return operator(logits, target, vocab_start, ranked, top_k, entropy, ignore_index)


def reward_shaped_ce_combine(
    numbers: Tensor,
    keys: Tensor,
    target: Tensor,
    beta: float,
    lambda_head: float,
    lambda_tail: float,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`numbers` [shards, n, 7], `keys` [shards, n, top_k] -> loss [n], coefficients [n, 6], stats [4, n]."""
    operator = torch.ops.megatron_ptrl.reward_shaped_ce_combine if _served_by_kernels(keys) else _combine
    return operator(numbers, keys, target, beta, lambda_head, lambda_tail, ignore_index)


def reward_shaped_ce_grad(
    logits: Tensor, target: Tensor, grad_loss: Tensor, coefficients: Tensor, vocab_start: int, ranked: int
) -> Tensor:
    """The gradient of this shard's logits in their dtype and shape; grad_loss [n] is per token."""
    operator = torch.ops.megatron_ptrl.reward_shaped_ce_grad if _served_by_kernels(logits) else _grad
    return operator(logits, target, grad_loss, coefficients, vocab_start, ranked)


def reward_shaped_ce_grad_(
    logits: Tensor, target: Tensor, grad_loss: Tensor, coefficients: Tensor, vocab_start: int, ranked: int
) -> None:
    """The same, written over the logits."""
    if _served_by_kernels(logits):
        torch.ops.megatron_ptrl.reward_shaped_ce_grad_(logits, target, grad_loss, coefficients, vocab_start, ranked)
    else:
        logits.copy_(_grad(logits, target, grad_loss, coefficients, vocab_start, ranked))


def reward_shaped_ce_one_pass_(
    logits: Tensor,
    target: Tensor,
    grad_loss: Tensor,
    ranked: int,
    top_k: int,
    entropy: bool,
    beta: float,
    lambda_head: float,
    lambda_tail: float,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """Of an unsharded vocabulary, loss [n] and stats [4, n]; the gradient, scaled by grad_loss [n], over the logits."""
    if _served_by_kernels(logits):
        return torch.ops.megatron_ptrl.reward_shaped_ce_one_pass_(
            logits, target, grad_loss, ranked, top_k, entropy, beta, lambda_head, lambda_tail, ignore_index
        )
    numbers, keys = _stats(logits, target, 0, ranked, top_k, entropy, ignore_index)
    loss, coefficients, stats = _combine(
        numbers[None], keys[None], target, beta, lambda_head, lambda_tail, ignore_index
    )
    logits.copy_(_grad(logits, target, grad_loss, coefficients, 0, ranked))
    return loss, stats


def remit_gap_sums(
    logprob: Tensor, reference_logprob: Tensor, keep: Tensor, segment: Tensor | None, segments: int
) -> Tensor:
    """Sum of reference_logprob - logprob over the kept tokens of each segment, and their number: [2, segments] fp64.

    logprob, reference_logprob: [b, s] fp32 or fp64     keep: [b, s] bool     segment: [b, s] int64, None for the row
    A segment with a kept gap that is not finite, or on GPUs above 2^34 nats, has a sum that is not finite. The kernels
    repeat to the bit. A segment out of range is refused on CPUs; on GPUs it is left out, and its weights are NaN.
    """
    operator = torch.ops.megatron_ptrl.remit_gap_sums if _remit_kernels(logprob) else _remit_gap_sums
    return operator(logprob, reference_logprob, keep, segment, segments)


def remit_weights(
    logprob: Tensor, reference_logprob: Tensor, keep: Tensor, segment: Tensor | None, sums: Tensor, epsilon: float
) -> Tensor:
    """clip(2 sigmoid(gap - mean gap of the segment), 1 - epsilon, 1 + epsilon), 0 where not kept: [b, s] fp32."""
    operator = torch.ops.megatron_ptrl.remit_weights if _remit_kernels(logprob) else _remit_weights
    return operator(logprob, reference_logprob, keep, segment, sums, epsilon)


def _remit_kernels(x: Tensor) -> bool:
    """They know fp32 only: a float a token is too little work for more."""
    return x.dtype == torch.float32 and _served_by_kernels(x)


def _register_fakes() -> None:
    """Shapes and dtypes only: lets torch.compile see through the operators."""

    @torch.library.register_fake("megatron_ptrl::reward_shaped_ce_stats")
    def _(logits: Tensor, target: Tensor, vocab_start: int, ranked: int, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
        rows = target.shape[0]
        return logits.new_empty(rows, NUMBERS, dtype=torch.float32), logits.new_empty(rows, top_k)

    @torch.library.register_fake("megatron_ptrl::reward_shaped_ce_combine")
    def _(numbers: Tensor, keys: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows = target.shape[0]
        return numbers.new_empty(rows), numbers.new_empty(rows, COEFFICIENTS), numbers.new_empty(STATS, rows)

    @torch.library.register_fake("megatron_ptrl::reward_shaped_ce_grad")
    def _(logits: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(logits)

    @torch.library.register_fake("megatron_ptrl::reward_shaped_ce_grad_")
    def _(*_: Any) -> None:
        return None

    @torch.library.register_fake("megatron_ptrl::reward_shaped_ce_one_pass_")
    def _(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        loss = logits.new_empty(target.shape[0], dtype=torch.float32)
        return loss, loss.new_empty(STATS, target.shape[0])

    @torch.library.register_fake("megatron_ptrl::remit_gap_sums")
    def _(logprob: Tensor, reference_logprob: Tensor, keep: Tensor, segment: Tensor | None, segments: int) -> Tensor:
        return logprob.new_empty(2, segments, dtype=torch.float64)

    @torch.library.register_fake("megatron_ptrl::remit_weights")
    def _(logprob: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(logprob)


def _local(target: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """The target's column in this shard, clamped into it, and whether it really is there; [n, 1] both."""
    column = target.unsqueeze(-1) - vocab_start
    return column.clamp(0, max(columns - 1, 0)), (column >= 0) & (column < columns)


def _stats(
    logits: Tensor, target: Tensor, vocab_start: int, ranked: int, top_k: int, entropy: bool, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    columns = logits.shape[-1]
    rows = logits.reshape(-1, columns)
    z = rows.to(torch.promote_types(logits.dtype, torch.float32))
    column, here = _local(target, vocab_start, columns)
    peak = z.amax(-1, keepdim=True)
    x = z - peak.masked_fill(peak == -torch.inf, 0)
    e = torch.where(here & (torch.arange(columns, device=z.device) == column), 0, x.exp())
    weighted = torch.where(e == 0, 0, e * x).sum(-1) if entropy else torch.zeros_like(peak[:, 0])
    at_target = torch.where(here, z.gather(1, column), 0)
    at_target = torch.where(here & (column >= ranked), torch.nan, at_target).squeeze(1)  # it pads the vocabulary

    keys = rows.new_full((len(rows), top_k), -torch.inf)
    listed = min(top_k, ranked)
    keys[:, :listed] = rows[:, :ranked].topk(listed, dim=-1).values
    ties = (rows[:, :ranked] == keys[:, -1:]).sum(-1) if top_k else torch.zeros_like(target)
    width = torch.full_like(target, columns)
    numbers = [peak[:, 0], e[:, :ranked].sum(-1), e[:, ranked:].sum(-1), weighted, at_target, ties, width]
    return torch.stack([number.to(z.dtype) for number in numbers], dim=1), keys


def _head(keys: Tensor, ties: Tensor, peak: Tensor, at_target: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of e^(z - peak) over the head without the target, and the head's smallest logit, each [n]."""
    shards, rows, top_k = keys.shape
    if top_k == 0:
        return torch.zeros_like(peak), torch.full_like(peak, torch.inf)
    every = keys.transpose(0, 1).reshape(rows, shards * top_k)
    threshold = every.topk(top_k, dim=-1).values[:, -1]
    # A list that ends in the threshold may stand for more of it than it had room for.
    listed = (keys == threshold[:, None]).sum(-1)
    tied = torch.where(keys[..., -1] == threshold, ties, listed).sum(0) - (at_target == threshold).to(ties.dtype)
    is_target = every == at_target[:, None]
    is_target &= is_target.cumsum(-1) == 1  # any one entry that equals the target will do for it
    above = torch.where((every > threshold[:, None]) & ~is_target, (every - peak[:, None]).exp(), 0).sum(-1)
    return above + torch.where(tied > 0, tied * (threshold - peak).exp(), 0), threshold


def _combine(
    numbers: Tensor,
    keys: Tensor,
    target: Tensor,
    beta: float,
    lambda_head: float,
    lambda_tail: float,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    peaks, real, padded, weighted, at_target, ties, widths = numbers.double().unbind(-1)
    z_x, peak = at_target.sum(0), peaks.amax(0)
    z_x = torch.where((target >= 0) & (target < widths.sum(0)), z_x, torch.nan)  # loud where it is no token
    shift = torch.where(peaks == -torch.inf, 0, peaks - peak)
    scale = shift.exp()
    t = (scale * (weighted + shift * (real + padded))).sum(0)
    real, padded = (scale * real).sum(0), (scale * padded).sum(0)
    head, threshold = _head(keys.double(), ties, peak, z_x)

    others, e_x = real + padded, (z_x - peak).exp()
    total = others + e_x
    p, q = e_x / total, others / total
    log_p = torch.where(e_x > others, -torch.log1p(others / e_x), z_x - peak - total.log())
    log_q = torch.where(e_x > others, q.log(), torch.log1p(-p))
    exponent = -torch.expm1(beta * log_q)
    w = (exponent * log_p).exp() if beta else torch.ones_like(p)
    w = torch.where((others == 0) | (e_x == 0), 1, w)
    reward = lambda_head * head / total + lambda_tail * (real - head).clamp(min=0) / total
    loss = -w * log_p - reward
    factors = [(w + reward - constant) / total for constant in (lambda_head, lambda_tail, 0.0)]
    coefficients = torch.stack([peak, *factors, p * reward - w * q, threshold], dim=1)
    t = t + torch.where(e_x == 0, 0, e_x * (z_x - peak))
    stats = torch.stack([log_p, total.log() - t / total, head / total, (z_x >= threshold).double()])

    if ignore_index is not None:
        ignored = target == ignore_index
        loss = loss.masked_fill(ignored, 0)
        coefficients = coefficients.masked_fill(ignored[:, None], 0)
        stats = stats.masked_fill(ignored, 0)
    return loss.to(numbers.dtype), coefficients.to(numbers.dtype), stats.to(numbers.dtype)


def _grad(
    logits: Tensor, target: Tensor, grad_loss: Tensor, coefficients: Tensor, vocab_start: int, ranked: int
) -> Tensor:
    columns = logits.shape[-1]
    z = logits.reshape(-1, columns).to(coefficients.dtype)
    shift, head, tail, padded, at_target, threshold = coefficients[..., None].unbind(1)
    factor = torch.where(z >= threshold, head, tail)
    factor[:, ranked:] = padded
    grad = factor * (z - shift).exp()
    column, here = _local(target, vocab_start, columns)
    grad = torch.where(here & (torch.arange(columns, device=z.device) == column), at_target, grad)
    # An ignored token: its logits may be anything, NaN included.
    grad = torch.where((coefficients == 0).all(-1, keepdim=True), 0, grad * grad_loss[:, None])
    return grad.to(logits.dtype).view(logits.shape)


def _remit_gap_sums(
    logprob: Tensor, reference_logprob: Tensor, keep: Tensor, segment: Tensor | None, segments: int
) -> Tensor:
    gap = torch.where(keep, reference_logprob.double() - logprob.double(), 0)
    at = _segment_of(logprob, segment).reshape(-1)
    sums = gap.new_zeros(2, segments)
    for total, values in zip(sums, (gap, keep.double()), strict=True):
        total.index_add_(0, at, values.reshape(-1))
    return sums


def _remit_weights(
    logprob: Tensor, reference_logprob: Tensor, keep: Tensor, segment: Tensor | None, sums: Tensor, epsilon: float
) -> Tensor:
    # NaN, not infinite: an infinite mean would clip to weights that look right.
    mean = torch.where(sums[0].isfinite(), sums[0] / sums[1].clamp(min=1), torch.nan)
    centred = reference_logprob.double() - logprob.double() - mean[_segment_of(logprob, segment)]
    weights = (2 * centred.sigmoid()).clamp(1 - epsilon, 1 + epsilon)
    return torch.where(keep, weights, 0).float()


def _segment_of(logprob: Tensor, segment: Tensor | None) -> Tensor:
    rows = torch.arange(len(logprob), device=logprob.device)
    return rows[:, None].expand(logprob.shape) if segment is None else segment
