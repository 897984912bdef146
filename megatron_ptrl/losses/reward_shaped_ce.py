"""Reward-shaped cross entropy over vocabulary-parallel logits (arXiv:2512.22955)."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ptrl import ops
from megatron_ptrl.config import RewardShaping
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.once import once_differentiable

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# torch 2.13 deprecates the older name.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group(Protocol):
    """The part of a process group that is asked when it has one rank; a larger one must be a real group."""

    def rank(self) -> int: ...
    def size(self) -> int: ...


class TokenStats(NamedTuple):
    """What the forward pass knows about each token; the target's shape, no gradient, 0 where the target is ignored."""

    logprob: Tensor
    """log p_x in nats, fp32."""
    entropy: Tensor
    """Of the distribution over the whole vocabulary, in nats, fp32."""
    head_mass: Tensor
    """P_head: probability of the top-k without the target, fp32."""
    target_in_head: Tensor
    """Whether the target is among the top-k, bool."""

    @property
    def tail_mass(self) -> Tensor:
        """1 - p_x - P_head, without subtracting p_x from 1; columns that pad the vocabulary count here."""
        return (-torch.expm1(self.logprob) - self.head_mass).clamp(min=0)


def reward_shaped_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 (frozen)
    tp_group: Group | None = None,
    *,
    inplace_backward: bool = False,
    ignore_index: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Per-token loss of next-token prediction as a one-step policy; plain cross entropy by default.

    vocab_parallel_logits: [..., v/tp] bf16, fp16 or fp32, unchanged by the forward; rank r of `tp_group` holds the
        columns from r v/tp on. fp64 is computed in torch operators (for gradcheck).
    target: [...] int64 ids in the whole vocabulary, the same on every rank; `ignore_index` gives loss and gradient 0
    vocab_size: real tokens when the vocabulary is padded to v; the padding stays in the softmax, as in Megatron, and is
        neither ranked nor rewarded
    returns: [...] fp32 (fp64 for fp64), the same on every rank

    loss = -sg(w) log p_x - lambda_head P_head - lambda_tail P_tail,   w = p_x^(1 - (1 - p_x)^beta)

    P_head is the probability of the `top_k` largest logits without the target, P_tail that of the other real tokens.
    The target is ranked too; ties with the k-th logit are all in; w and the ranking carry no gradient (sg).
    dloss/dz_j = p_j (W - lambda_j) for j != x and p_x W - w at x, with W = w + lambda_head P_head + lambda_tail P_tail.

    Cost: forward, one read of the logits and, over a group, one all-gather of 28 bytes a token and rank, plus
    `top_k` logits where lambda_head differs from lambda_tail; backward, one read and one write, no collective. Kept
    for the backward: the logits and 32 bytes a token. `inplace_backward` writes the gradient over the logits, which
    must then not be used again: their version counter moves on, and a second backward raises RuntimeError. On CPUs the
    memory of the last gradient of 16 MiB or more that was freed is kept for the next of its size.

    Raises InputError for a wrong shape or dtype, shards of unequal width, a `vocab_size` above v, a target outside of
    the vocabulary (on CPUs; on GPUs, which nothing waits for, its loss and gradient are NaN), a `top_k` above it (an
    untouched default is capped where no reward depends on it).
    """
    call = Call(shaping, tp_group, inplace_backward, ignore_index, vocab_size, with_stats=False)
    return _apply(vocab_parallel_logits, target, call)[0]


def reward_shaped_cross_entropy_with_stats(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 (frozen)
    tp_group: Group | None = None,
    *,
    inplace_backward: bool = False,
    ignore_index: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, TokenStats]:
    """`reward_shaped_cross_entropy` and, from the same read of the logits, the statistics of each token.

    Always ranks: the all-gather carries the `top_k` logits even where no reward depends on them.
    """
    call = Call(shaping, tp_group, inplace_backward, ignore_index, vocab_size, with_stats=True)
    loss, stats = _apply(vocab_parallel_logits, target, call)
    logprob, entropy, head_mass, target_in_head = stats.view(ops.STATS, *target.shape)
    return loss, TokenStats(logprob, entropy, head_mass, target_in_head.bool())


@dataclass(frozen=True)
class Call:
    """The arguments that are no tensors."""

    shaping: RewardShaping
    tp_group: Group | None
    inplace_backward: bool
    ignore_index: int | None
    vocab_size: int | None
    with_stats: bool

    @property
    def shards(self) -> int:
        return 1 if self.tp_group is None else self.tp_group.size()

    def vocab_start(self, columns: int) -> int:
        return 0 if self.tp_group is None else self.tp_group.rank() * columns

    def ranked(self, columns: int) -> int:
        """How many of this shard's columns are real tokens."""
        if self.vocab_size is None:
            return columns
        return min(max(self.vocab_size - self.vocab_start(columns), 0), columns)

    @property
    def top_k(self) -> int:
        return self.shaping.top_k if self.with_stats or self.shaping.ranks_matter else 0


def _apply(logits: Tensor, target: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    _check_tensors(logits, target, call)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return _RewardShapedCrossEntropy.apply(logits, target, call)


class _RewardShapedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        columns, shaping, ids = logits.shape[-1], call.shaping, target.reshape(-1).contiguous()
        start, ranked = call.vocab_start(columns), call.ranked(columns)
        numbers, keys = ops.reward_shaped_ce_stats(
            logits, ids, start, ranked, call.top_k, call.with_stats, call.ignore_index
        )
        every_numbers, every_keys = exchange(numbers, keys, call)
        # After the exchange, so that every rank raises and none is left waiting.
        check_vocabulary(every_numbers, target, columns * call.shards, call)
        loss, coefficients, stats = ops.reward_shaped_ce_combine(
            every_numbers, every_keys, ids, shaping.beta, shaping.lambda_head, shaping.lambda_tail, call.ignore_index
        )
        ctx.save_for_backward(logits, ids, coefficients)
        ctx.place = (start, ranked)
        ctx.inplace = call.inplace_backward
        ctx.spent = False
        ctx.mark_non_differentiable(stats)
        return loss.view(target.shape), stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
        if ctx.spent:
            raise RuntimeError(
                "reward_shaped_cross_entropy: second backward after inplace_backward=True, but the first one wrote the "
                "gradient over the logits; use inplace_backward=False"
            )
        logits, ids, coefficients = ctx.saved_tensors
        upstream = grad_loss.reshape(-1).to(coefficients.dtype).contiguous()
        if not ctx.inplace:
            return ops.reward_shaped_ce_grad(logits, ids, upstream, coefficients, *ctx.place), None, None
        ctx.spent = True
        ops.reward_shaped_ce_grad_(logits, ids, upstream, coefficients, *ctx.place)
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), None, None


def exchange(numbers: Tensor, keys: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """[n, ...] of this rank -> [tp, n, ...] of all, in one all-gather."""
    if call.shards == 1:
        return numbers.unsqueeze(0), keys.unsqueeze(0)
    parts = (numbers, keys)
    record = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
    every = record.new_empty(call.shards * len(record))
    all_gather(every, record, group=call.tp_group)
    pieces = every.view(call.shards, -1).split([part.nbytes for part in parts], dim=1)
    # Contiguous: a rank's bytes may start where its dtype cannot.
    numbers, keys = (
        piece.contiguous().view(-1).view(part.dtype).view(call.shards, *part.shape)
        for piece, part in zip(pieces, parts, strict=True)
    )
    return numbers, keys


def _check_tensors(logits: Tensor, target: Tensor, call: Call) -> None:
    if logits.dtype not in DTYPES:
        raise InputError(f"vocab_parallel_logits are {logits.dtype}; expected bfloat16, float16 or float32")
    if target.dtype != torch.int64:
        raise InputError(f"target is {target.dtype}; expected int64 token ids")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise InputError(f"vocab_parallel_logits have shape {list(logits.shape)}; expected [..., v/tp] with v/tp >= 1")
    if logits.shape[:-1] != target.shape:
        raise InputError(
            f"target has shape {list(target.shape)}; expected {list(logits.shape[:-1])}, that of "
            f"vocab_parallel_logits {list(logits.shape)} without the vocabulary (Megatron: [s, b] for [s, b, v/tp])"
        )
    if logits.device != target.device:
        raise InputError(f"target is on {target.device}; expected {logits.device}, where the logits are")
    if call.inplace_backward and (logits.stride(-1) != 1 or _overlaps(logits)):
        raise InputError(
            f"vocab_parallel_logits have strides {list(logits.stride())}, which a gradient cannot be written over; "
            "expected a dense last dimension and rows that do not overlap, or inplace_backward=False"
        )
    check_top_k(logits.shape[-1], call)


def _overlaps(x: Tensor) -> bool:
    """Whether elements may share memory: a stride is shorter than what lies within it."""
    within = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < within:
            return True
        within += stride * (size - 1)
    return False


def check_top_k(columns: int, call: Call) -> None:
    """Against the whole vocabulary, of which a shard has `columns`."""
    call.shaping.check_vocabulary(columns * call.shards if call.vocab_size is None else call.vocab_size)


def check_vocabulary(
    every_numbers: Tensor | None, target: Tensor, columns: int, call: Call, sharded: str = "vocab_parallel_logits"
) -> None:
    """Widths (None: there is one shard) and target values, read without waiting for a device: on a CPU only.

    Not under torch.compile, whose graph it would break; a wrong target's loss and gradient are NaN there, too.
    """
    if target.device.type != "cpu" or target.numel() == 0 or torch.compiler.is_compiling():
        return
    widths = [columns] if every_numbers is None else [int(width) for width in every_numbers[:, 0, ops.WIDTH]]
    if len(set(widths)) > 1:
        raise InputError(f"{sharded} have {widths} columns on the ranks of tp_group; expected the same number on each")
    vocabulary = columns if call.vocab_size is None else call.vocab_size
    if not 1 <= vocabulary <= columns:
        raise InputError(
            f"vocab_size is {vocabulary}; expected 1 to {columns}, the {widths[0]} columns of each of "
            f"{call.shards} tensor-parallel ranks"
        )
    wrong = (target < 0) | (target >= vocabulary)
    if call.ignore_index is not None:
        wrong &= target != call.ignore_index
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        raise InputError(
            f"target{position} is {int(target[tuple(position)])}; expected 0 to {vocabulary - 1}"
            + ("" if call.ignore_index is None else f" or ignore_index {call.ignore_index}")
            + "; use ignore_index for positions without a target"
        )
