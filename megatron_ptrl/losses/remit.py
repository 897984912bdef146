"""Weights of tokens by how much a reference prefers them: ReMiT (arXiv:2602.03075) and RHO-1 (arXiv:2404.07965)."""

from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ptrl import ops
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.reward_shaped_ce import DTYPES, Group, all_gather


def remit_weights(
    logprob: Tensor,
    reference_logprob: Tensor,
    loss_mask: Tensor,
    *,
    epsilon: float = 0.2,
    document_ids: Tensor | None = None,
    cp_group: Group | None = None,
) -> Tensor:
    """Weight of each token's loss, near 1: above where the reference is surer of the token than the model is.

    logprob, reference_logprob: [b, s] log p of each target in nats, any float dtype; detached
    loss_mask: [b, s] bool, integer or float; a token of mask 0 gets weight 0 and may hold anything, NaN included
    document_ids: [b, s] int64, any ids, equal within a document of a row, which need not be in one piece
    cp_group: ranks that hold the other parts of the same rows, cut in any way
    returns: [b, s] fp32 without gradient

    weight = clip(2 sigmoid(gap - mean gap), 1 - epsilon, 1 + epsilon),   gap = reference_logprob - logprob

    The mean is over the unmasked tokens of the row or, with `document_ids`, of the document in the row. The loss is
    the sum of weight times -log p over the number of unmasked tokens, not over the sum of the weights.

    Cost: two reads of the log-probabilities, sums in fp64. Over a `cp_group` one all-reduce of 16 bytes a row; with
    `document_ids` one of 16 bytes for each token of all ranks, after an all-gather of the ids; they are sorted by row.
    On GPUs nothing waits for the device, and the weights repeat to the bit.

    Raises InputError for tensors that do not fit, an epsilon outside of [0, 1) and, on CPUs, a log-probability of an
    unmasked token that is not finite; on GPUs the weights of its row or document are NaN.
    """
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon is {epsilon}; expected 0 (every weight 1) or more, below 1 (the paper's is 0.2)")
    _check(logprob, reference_logprob, loss_mask, document_ids)
    dtype = torch.promote_types(torch.promote_types(logprob.dtype, reference_logprob.dtype), torch.float32)
    current, reference = (x.detach().to(dtype).contiguous() for x in (logprob, reference_logprob))
    keep = (loss_mask != 0).contiguous()
    segment, segments = _segments(document_ids, len(logprob), cp_group)
    sums = ops.remit_gap_sums(current, reference, keep, segment, segments)
    if cp_group is not None and cp_group.size() > 1:
        dist.all_reduce(sums, group=cp_group)
    # After the exchange, so that every rank raises and none is left waiting.
    if sums.device.type == "cpu" and not sums.isfinite().all():
        _refuse_row(int((~sums[0].isfinite()).nonzero()[0]) // max(segments // len(logprob), 1))
    return ops.remit_weights(current, reference, keep, segment, sums, epsilon)


def rho1_weights(
    logprob: Tensor,
    reference_logprob: Tensor,
    loss_mask: Tensor,
    *,
    keep: float = 0.8,
    document_ids: Tensor | None = None,
    cp_group: Group | None = None,
) -> Tensor:
    """1 for the share `keep` of the tokens with the largest excess loss, 0 for the others.

    logprob, reference_logprob, loss_mask, document_ids, cp_group: as `remit_weights` takes them
    returns: [b, s] fp32 without gradient

    excess loss = (-logprob) - (-reference_logprob), largest where the reference is surer of the token than the model.
    Of n unmasked tokens of a row, or of a document of it, keep * n are kept, rounded to the nearest (halves up) and at
    least one; ties with the last of them are kept too, so that a model which equals its reference keeps all. The loss
    is the sum of weight times -log p over the number of kept tokens.

    Cost: two sorts of all tokens. Over a `cp_group` one all-gather of 16 bytes a token, after that of `remit_weights`,
    and every rank sorts the whole rows: the same weights as those of unsplit rows.

    Raises InputError for tensors that do not fit, a `keep` outside of (0, 1] and a log-probability of an unmasked
    token that is not finite.
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep is {keep}; expected a share above 0, at most 1 (the papers' is 0.8)")
    _check(logprob, reference_logprob, loss_mask, document_ids)
    segment, segments = _segments(document_ids, len(logprob), cp_group)
    if segment is None:
        segment = torch.arange(segments, device=logprob.device)[:, None].expand(logprob.shape)
    mask = loss_mask != 0
    excess = torch.where(mask, reference_logprob.detach().double() - logprob.detach().double(), 0)
    # Masked tokens share a segment of their own, behind the others; numbers of segments are exact in fp64.
    mine = torch.stack([excess, torch.where(mask, segment, segments).double()])
    every = mine.unsqueeze(0)
    if cp_group is not None and cp_group.size() > 1:
        every = mine.new_empty(cp_group.size() * 2, *logprob.shape)
        all_gather(every, mine, group=cp_group)
        every = every.view(-1, 2, *logprob.shape)
    if not every.isfinite().all():
        _refuse_row(int((~every.isfinite()).nonzero()[0, 2]))
    threshold = _smallest_kept(every[:, 0].reshape(-1), every[:, 1].reshape(-1).long(), segments, keep)
    return (mask & (excess >= threshold[segment])).float()


def _smallest_kept(excess: Tensor, segment: Tensor, segments: int, keep: float) -> Tensor:
    """The excess loss of the last kept token of each segment, [segments]; anything for a segment without tokens."""
    order = excess.argsort(descending=True)
    order = order[segment[order].argsort(stable=True)]
    counts = torch.bincount(segment, minlength=segments + 1)[:segments]
    kept = (keep * counts.double() + 0.5).long().clamp(min=1)
    last = counts.cumsum(0) - counts + kept - 1
    return excess[order[last.clamp(max=max(len(order) - 1, 0))]] if len(order) else excess.new_zeros(segments)


def _refuse_row(row: int) -> NoReturn:
    raise InputError(
        f"logprob or reference_logprob is not finite at an unmasked token of row {row}; expected finite "
        "log-probabilities, or loss_mask 0"
    )


def _segments(document_ids: Tensor | None, rows: int, cp_group: Group | None) -> tuple[Tensor | None, int]:
    """Number of the (row, document) of each token, alike on all ranks, and what these numbers stay below.

    Not `unique`: on a GPU that waits to learn how many ids there are. An id's number is its place among the sorted ids
    of its row, so that there are as many numbers as tokens, most of them of no document.
    """
    if document_ids is None:
        return None, rows
    ranks = 1 if cp_group is None else cp_group.size()
    mine = document_ids.contiguous()
    every = mine
    if ranks > 1:
        every = mine.new_empty(ranks * rows, mine.shape[1])
        all_gather(every, mine, group=cp_group)
    s = mine.shape[1]
    tokens = ranks * s
    ordered = every.view(ranks, rows, s).transpose(0, 1).reshape(rows, tokens).sort(dim=-1).values
    first = torch.arange(rows, device=mine.device) * tokens
    return torch.searchsorted(ordered, mine) + first[:, None], rows * tokens


def _check(logprob: Tensor, reference_logprob: Tensor, loss_mask: Tensor, document_ids: Tensor | None) -> None:
    if logprob.dim() != 2:
        raise InputError(f"logprob has shape {list(logprob.shape)}; expected [b, s]")
    others = {"reference_logprob": reference_logprob, "loss_mask": loss_mask, "document_ids": document_ids}
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.shape != logprob.shape:
            raise InputError(f"{name} has shape {list(tensor.shape)}; expected {list(logprob.shape)}, that of logprob")
        if tensor.device != logprob.device:
            raise InputError(f"{name} is on {tensor.device}; expected {logprob.device}, where logprob is")
    for name, tensor in (("logprob", logprob), ("reference_logprob", reference_logprob)):
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} is {tensor.dtype}; expected bfloat16, float16 or float32")
    if document_ids is not None and document_ids.dtype != torch.int64:
        raise InputError(f"document_ids is {document_ids.dtype}; expected int64")
