"""Batches -> Megatron's pipeline schedule -> sums over tokens -> one optimizer step, or an evaluation.

Every figure is a sum over unmasked tokens until the last moment, so that it does not depend on how the global batch is
cut into ranks and microbatches.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_ptrl.config import RunConfig
from megatron_ptrl.data.batches import Batch
from megatron_ptrl.losses.reward_shaped_ce import TokenStats
from megatron_ptrl.training.mcore import RewardShapedGPTModel, unwrap
from megatron_ptrl.training.weighting import ONLINE, TokenWeighting

Batches = Iterator[Batch]

_SUMS = ("num_tokens", "loss", "ce", "entropy", "target_probability", "head_mass", "tail_mass")


def forward_step(
    batches: Batches, model: torch.nn.Module, *, weighting: TokenWeighting | None = None
) -> tuple[Tensor, Any]:
    """Megatron's forward step: next batch through this stage, and the function that makes a loss of its output."""
    batch = on_this_rank(next(batches))
    return forward(model, batch), partial(_loss_and_sums, unwrap(model), batch, weighting)


def forward(model: torch.nn.Module, batch: Batch) -> Tensor:
    """A batch that is `on_this_rank` through this stage: hidden states, or the loss (b, s)."""
    return model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )


def on_this_rank(batch: Batch) -> Batch:
    """The batch on the device, cut to this context-parallel rank's part of each row."""
    # What an online reference found out was found out here.
    here = {ONLINE: batch[ONLINE]} if ONLINE in batch else {}
    moved = {name: _to_device(tensor) for name, tensor in batch.items() if name not in here}
    if parallel_state.get_context_parallel_world_size() > 1:
        moved = get_batch_on_this_cp_rank(moved)
    return moved | here


def _to_device(tensor: Tensor | None) -> Tensor | None:
    return tensor.cuda(non_blocking=True) if tensor is not None and torch.cuda.is_available() else tensor


def _loss_and_sums(
    model: RewardShapedGPTModel, batch: Batch, weighting: TokenWeighting | None, loss: Tensor
) -> tuple[Tensor, Tensor, dict]:
    """Megatron's triple: summed loss, number of tokens it is divided by, and what the logs need, summed over tokens.

    loss: (b, s), or its sum over the mask already
    """
    loss_mask = cast(Tensor, batch["loss_mask"])
    num_tokens = divisor = loss_mask.sum().int()
    of_weights: list[Tensor] = []
    if weighting is not None:
        weights, of_weights = weighting.weigh(cast(TokenStats, model.token_stats).logprob.t(), batch)
        loss = loss * weights
        if weighting.counts_kept_tokens:
            divisor = (weights * loss_mask).sum().int()
        of_weights = [divisor.float(), *of_weights]
    total = loss if loss.dim() == 0 else (loss * loss_mask).sum()
    sums = [num_tokens.float(), total.detach()]
    if model.token_stats is None:
        sums += [total.detach()] + [total.new_full((), math.nan)] * 4
    else:
        stats, mask = model.token_stats, loss_mask.t()
        columns = (-stats.logprob, stats.entropy, stats.logprob.exp(), stats.head_mass, stats.tail_mass)
        sums += [(column * mask).sum() for column in columns]
        model.token_stats = None
    # The schedule divides `total` in place afterwards; stack copies it.
    return total, divisor, {"sums": torch.stack([*sums, *of_weights])}


def train_step(
    config: RunConfig,
    chunks: list[Any],
    optimizer: MegatronOptimizer,
    batches: Batches,
    num_microbatches: int,
    weighting: TokenWeighting | None = None,
) -> dict[str, float]:
    """One optimizer step. Returns means over the unmasked tokens of the global batch and the gradient's norm.

    With RHO-1's weights `loss` is the mean over the tokens they keep; all other means are over all unmasked ones.
    """
    step = partial(forward_step, weighting=weighting)
    reports, grad_norm = optimize(config, chunks, optimizer, step, batches, num_microbatches)
    return {**_means(reports, weighting.names if weighting else ()), "grad_norm": grad_norm}


def optimize(
    config: RunConfig,
    chunks: list[Any],
    optimizer: MegatronOptimizer,
    step: Callable[..., tuple[Tensor, Any]],
    batches: Batches,
    num_microbatches: int,
) -> tuple[list[Any], float]:
    """One optimizer step by Megatron's forward step; what its losses report on the last stage, the gradient's norm."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = run_schedule(config, chunks, step, batches, num_microbatches, forward_only=False)
    _, grad_norm, _ = optimizer.step()
    return reports, float(grad_norm)


@torch.no_grad()
def evaluate(config: RunConfig, chunks: list[Any], batches: Batches, num_microbatches: int) -> dict[str, float]:
    """Means over the unmasked tokens of `num_microbatches` batches on each data-parallel rank."""
    for chunk in chunks:
        chunk.eval()
    reports = run_schedule(config, chunks, forward_step, batches, num_microbatches, forward_only=True)
    for chunk in chunks:
        chunk.train()
    return _means(reports)


def run_schedule(
    config: RunConfig,
    chunks: list[Any],
    step: Callable[..., tuple[Tensor, Any]],
    batches: Batches,
    num_microbatches: int,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """`step` over the microbatches by Megatron's schedule; what its loss function reports, on the last stage.

    collect: the loss function is called with `non_loss_data` and need not give a loss
    """
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=_share(batches, len(chunks)),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch,
        decoder_seq_length=config.data.seq_length,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


def _share(batches: Batches, num_chunks: int) -> Any:
    """Every model chunk walks the same microbatches at its own pace (interleaved schedule)."""
    if num_chunks == 1:
        return batches
    waiting: list[list[Batch]] = [[] for _ in range(num_chunks)]

    def walk(mine: list[Batch]) -> Batches:
        while True:
            if not mine:
                batch = next(batches, None)
                if batch is None:
                    return
                for queue in waiting:
                    queue.append(batch)
            yield mine.pop(0)

    return [walk(queue) for queue in waiting]


def _means(reports: list[dict[str, Tensor]], of_weights: tuple[str, ...] = ()) -> dict[str, float]:
    """Sum over microbatches, data- and context-parallel ranks and from the last stage to all; then divide.

    of_weights: names of what a `TokenWeighting` adds to the sums, behind the number of tokens that divides the loss
    Cost: two all-reduces of 7 floats, with weights of up to 23.
    """
    names = (*_SUMS, "loss_tokens", *of_weights) if of_weights else _SUMS
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    zero = torch.zeros(len(names), device=device)
    sums = torch.stack([report["sums"] for report in reports]).sum(0) if reports else zero
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    totals = dict(zip(names, sums.tolist(), strict=True))
    num_tokens = totals.pop("num_tokens")
    loss_tokens = totals.pop("loss_tokens", num_tokens)
    means = {name: total / max(num_tokens, 1.0) for name, total in totals.items()}
    means["loss"] = totals["loss"] / max(loss_tokens, 1.0)
    known = {name: mean for name, mean in means.items() if name in ("loss", "ce") or not math.isnan(mean)}
    return {"num_tokens": num_tokens, **known}
