"""Parts of a head that holds the logits of one chunk of tokens at a time: chunks, products, sums over ranks, checks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.padding import bar_padding_
from megatron_ptrl.losses.reward_shaped_ce import DTYPES, Call, all_gather, check_top_k

# torch 2.13 deprecates the older name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Rows or columns of bf16 and fp16 factors that are widened at a time, where no product sums in fp32 by itself.
_WIDENED = 4096


@dataclass(frozen=True)
class Head:
    """The arguments of a linear head that are no tensors."""

    call: Call
    sequence_parallel: bool
    chunk_tokens: int
    gradient_accumulation_fusion: bool
    mask_padding: bool = False

    @property
    def parts(self) -> int:
        """Into how many the first dimension of the hidden states is cut."""
        return self.call.shards if self.sequence_parallel else 1


def sum_dtype(x: Tensor) -> torch.dtype:
    """In which products of `x` are summed: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def all_tokens(hidden: Tensor, head: Head) -> Tensor:
    """This rank's part of the hidden states -> those of all tokens, [n, h]."""
    mine = hidden.reshape(-1, hidden.shape[-1])
    if head.parts == 1:
        return mine
    every = mine.new_empty(head.parts * len(mine), mine.shape[1])
    all_gather(every, mine.contiguous(), group=head.call.tp_group)
    return every


def chunks(rows: Tensor, weight: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Which tokens, and their logits; the next ones take the same memory."""
    logits = rows.new_empty(min(head.chunk_tokens, len(rows)), len(weight))
    real = head.call.ranked(len(weight)) if head.mask_padding else len(weight)
    for start in range(0, len(rows), head.chunk_tokens):
        part = slice(start, min(start + head.chunk_tokens, len(rows)))
        yield part, bar_padding_(torch.mm(rows[part], weight.t(), out=logits[: part.stop - start]), real)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
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


def reduce(grad_rows: Tensor, head: Head) -> Tensor:
    """The sum over the shards of the vocabulary; with sequence parallelism this rank's part of it."""
    if head.call.shards == 1:
        return grad_rows
    if not head.sequence_parallel:
        dist.all_reduce(grad_rows, group=head.call.tp_group)
        return grad_rows
    mine = grad_rows.new_empty(len(grad_rows) // head.parts, grad_rows.shape[1])
    _reduce_scatter(mine, grad_rows, group=head.call.tp_group)
    return mine


def placeholder(weight: Tensor) -> Tensor | None:
    """What autograd gets when the gradient is in `main_grad` already; Megatron's data-parallel hooks wait for it."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # A tied embedding adds its own gradient to this one, and the hook then takes the sum.
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def check_tensors(hidden: Tensor, weight: Tensor, target: Tensor, head: Head) -> None:
    """InputError for dtypes, shapes and devices that do not fit; the ids are checked after the first exchange."""
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
