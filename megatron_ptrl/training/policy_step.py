"""Microbatches of responses -> Megatron's pipeline schedule -> the policy loss -> one optimizer step.

Every figure is a sum over the tokens of responses until the last moment, or a maximum, so that it does not depend on
how the step is cut into ranks and microbatches.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ptrl.config import PolicyLossConfig, RLConfig
from megatron_ptrl.data.batches import Batch
from megatron_ptrl.data.rollouts import barred
from megatron_ptrl.losses.policy import policy_loss
from megatron_ptrl.losses.reward_shaped_ce import TokenStats
from megatron_ptrl.training import loop
from megatron_ptrl.training.mcore import RewardShapedGPTModel, unwrap

OLD, REFERENCE = "old_logprobs", "reference_logprobs"
"""Keys of a batch: fp32 (b, s), of the labels, by the policy before the updates, and by the frozen reference."""

_SUMS = ("num_tokens", "divisor", "loss", "ratio", "clipped", "kl", "importance", "entropy", "ce")
_MISMATCH = ("logprob_difference", "rollout_kl", "token_mult_prob_error")
_MAXIMA = ("ratio_max", "logprob_difference_max")


def train_step(config: RLConfig, chunks: list[Any], optimizer: Any, batches: list[Batch]) -> dict[str, float]:
    """One optimizer step on this rank's microbatches. Returns means over the tokens of all responses.

    num_tokens; loss: divided as `policy.aggregation` says     ratio, ratio_max, clip_share, kl, importance_weight
    entropy, ce: of the policy, in nats a token     grad_norm
    logprob_difference: mean |d| with d = log-probability by the trainer less that by the engine; logprob_difference_max
    rollout_kl: mean of exp(d) - 1 - d, KL(engine || trainer)     token_mult_prob_error: mean of exp |d|
    """
    step = partial(_forward_step, policy=config.policy)
    reports, grad_norm = loop.optimize(config, chunks, optimizer, step, iter(batches), len(batches))
    return {**_means(reports, with_mismatch=config.rollout.as_drawn), "grad_norm": grad_norm}


@torch.no_grad()
def measure(config: RLConfig, chunks: list[Any], batches: list[Batch]) -> dict[str, float]:
    """What `train_step` returns but grad_norm, without a step. Cost: a forward pass. Collective."""
    step = partial(_forward_step, policy=config.policy)
    reports = loop.run_schedule(config, chunks, step, iter(batches), len(batches), forward_only=True)
    return _means(reports, with_mismatch=config.rollout.as_drawn)


@torch.no_grad()
def add_logprobs(config: Any, chunks: list[Any], batches: list[Batch], key: str) -> None:
    """The log-probabilities of the labels by `chunks`, under `key` of each batch on the last pipeline stage.

    config: of the model that the chunks are of, in the layout of the run. One forward pass; collective.
    """
    step = partial(_score_step, key=key)
    loop.run_schedule(config, chunks, step, iter(batches), len(batches), forward_only=True, collect=True)


def _forward(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Batch, Batch, Tensor]:
    batch = next(batches)
    here = loop.on_this_rank(batch)
    here["attention_mask"] = barred(cast(Tensor, here["sequence_ids"]))
    return batch, here, loop.forward(model, here)


def _score_step(batches: Iterator[Batch], model: torch.nn.Module, *, key: str) -> tuple[Tensor, Any]:
    batch, _, output = _forward(batches, model)

    def keep(loss: Tensor, non_loss_data: bool) -> None:
        batch[key] = -loss

    return output, keep


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module, *, policy: PolicyLossConfig) -> tuple[Tensor, Any]:
    _, batch, output = _forward(batches, model)
    return output, partial(_loss_and_sums, unwrap(model), batch, policy)


def _loss_and_sums(
    model: RewardShapedGPTModel, batch: Batch, policy: PolicyLossConfig, token_loss: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's triple. token_loss: (b, s), -log p of each label."""
    mask, sampled = cast(Tensor, batch["loss_mask"]), cast(Tensor, batch["rollout_logprobs"])
    found = policy_loss(
        -token_loss,
        cast(Tensor, batch["advantages"]),
        mask,
        policy,
        old_logprobs=batch.get(OLD),
        rollout_logprobs=sampled,
        reference_logprobs=batch.get(REFERENCE),
        sequence_ids=batch["sequence_ids"],
    )
    stats, model.token_stats = cast(TokenStats, model.token_stats), None
    with torch.no_grad():
        old = batch.get(OLD)
        difference = ((-token_loss if old is None else old) - sampled).where(mask != 0, 0.0)
        away = difference.abs()
        sums = [
            *(found.num_tokens, found.divisor, found.total, found.ratio, found.clipped, found.kl, found.importance),
            *((stats.entropy.t() * mask).sum(), (token_loss * mask).sum()),
            *(away.sum(), (torch.expm1(difference) - difference).sum(), (away.exp() * mask).sum()),
        ]
        # The schedule divides the total in place afterwards; stack copies it.
        report = {
            "sums": torch.stack([value.double() for value in sums]),
            "maxima": torch.stack([found.ratio_max.double(), away.amax().double()]),
        }
    return found.total, found.divisor.int(), report


def _means(reports: list[dict[str, Tensor]], *, with_mismatch: bool) -> dict[str, float]:
    """Over microbatches, data-parallel ranks, and from the last stage to all. Cost: four all-reduces of 14 doubles."""
    names = (*_SUMS, *_MISMATCH)
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    maxima = torch.zeros(len(_MAXIMA), dtype=torch.float64, device=device)
    for report in reports:
        sums += report["sums"]
        maxima = torch.maximum(maxima, report["maxima"])
    for group in (parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        dist.all_reduce(sums, group=group)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    totals = dict(zip(names, sums.tolist(), strict=True))
    largest = dict(zip(_MAXIMA, maxima.tolist(), strict=True))
    num_tokens, divisor = totals.pop("num_tokens"), totals.pop("divisor")
    means = {name: total / max(num_tokens, 1.0) for name, total in totals.items()}
    means["loss"] = totals["loss"] / max(divisor, 1.0)
    means["clip_share"] = means.pop("clipped")
    means["importance_weight"] = means.pop("importance")
    if with_mismatch:
        means["logprob_difference_max"] = largest["logprob_difference_max"]
    else:
        means = {name: mean for name, mean in means.items() if name not in _MISMATCH}
    return {"num_tokens": num_tokens, **means, "ratio_max": largest["ratio_max"]}
