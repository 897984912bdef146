"""Rewards of groups -> advantages -> the clipped policy loss of GRPO, Dr. GRPO and DAPO.

    rewards (groups, samples) --group_advantages--> advantages --policy_loss--> summed loss, what it is divided by

The sum and its divisor stay apart: Megatron adds both over microbatches and ranks before it divides, so that the loss
does not depend on how a batch is cut.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ptrl.config.policy import PolicyLossConfig
from megatron_ptrl.errors import InputError

STD_EPSILON = 1e-6


class PolicyLoss(NamedTuple):
    """Sums over the unmasked tokens of a batch; divide `total` by `divisor`, the other sums by `num_tokens`."""

    total: Tensor
    """The loss, a scalar with gradient."""
    divisor: Tensor
    """int64: tokens with `token_mean`, else responses that have an unmasked token."""
    num_tokens: Tensor
    """int64"""
    ratio: Tensor
    """policy / policy before the update"""
    ratio_max: Tensor
    """Largest one; 0 without tokens. The only figure that is no sum."""
    clipped: Tensor
    """Tokens that the clip leaves without gradient."""
    kl: Tensor
    """The estimate of KL(policy || reference) in nats; 0 without a reference."""
    importance: Tensor
    """Weights that importance sampling gives; 1 each when it is off."""


def group_advantages(rewards: Tensor, *, valid: Tensor | None = None, normalize_std: bool = True) -> Tensor:
    """Reward minus its group's mean, over its group's deviation; (groups, samples) in and out.

    rewards: float     valid: bool, True where a sample was judged; None for all

    A_i = (r_i - mean r) / (std r + 1e-6), GRPO (arXiv:2402.03300), with the unbiased deviation.
    `normalize_std=False` is Dr. GRPO (arXiv:2503.20783): dividing overweights questions that are nearly always or
    never solved. Equal rewards give 0, and so does a sample that is alone; one that is not `valid` takes no part in
    mean and deviation, whatever its reward, and gets 0.

    Raises InputError for another shape, or a valid reward that is not finite.
    """
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise InputError(
            f"rewards has shape {list(rewards.shape)} and dtype {rewards.dtype}; expected floats (groups, samples)"
        )
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    if valid.shape != rewards.shape or valid.dtype != torch.bool:
        raise InputError(
            f"valid has shape {list(valid.shape)} and dtype {valid.dtype}; expected bool {list(rewards.shape)}"
        )
    rewards = rewards.where(valid, 0.0)
    if not rewards.isfinite().all():
        group, sample = (~rewards.isfinite()).nonzero()[0].tolist()
        raise InputError(f"rewards[{group}, {sample}] is {rewards[group, sample]}; expected a finite number")
    count = valid.sum(-1, keepdim=True)
    mean = rewards.sum(-1, keepdim=True) / count.clamp(min=1)
    # A mean of equal numbers may be off by its last bit, which the division would blow up.
    low = rewards.where(valid, torch.inf).amin(-1, keepdim=True)
    high = rewards.where(valid, -torch.inf).amax(-1, keepdim=True)
    centred = (rewards - mean).where(valid & (low < high), 0.0)
    if not normalize_std:
        return centred
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + STD_EPSILON)


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    config: PolicyLossConfig = PolicyLossConfig(),  # noqa: B008 (frozen)
    *,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> PolicyLoss:
    """The summed loss of a batch of responses, with what it is to be divided by.

    logprobs: (b, s) float, of each token under the policy, in nats, with gradient
    advantages: (b, s) float, each response's repeated over its tokens
    loss_mask: (b, s), 1 or True for the tokens of responses, 0 for prompts, padding and responses that are left out;
        there the other arguments may hold anything
    old_logprobs: (b, s), under the policy before the update; None for `logprobs` themselves: the first update
    rollout_logprobs: (b, s), by the sampler; needed by `config.importance_sampling`
    reference_logprobs: (b, s), by the frozen reference; needed by `config.kl_coef`
    sequence_ids: (b, s) int64 >= 0, the same number for the tokens of one response, within its row; None when each row
        is one response. Responses do not go over the ends of rows.

    per token: w (max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef KL),  r = exp(logprob - old_logprob)
    w: the importance weight min(exp(old_logprob - rollout_logprob), cap), or that of the response, or 1
    total: sum of the tokens, each over its response's tokens with `sequence_mean`, over `normalizer` with `constant`

    Without clipping in effect, the gradient of the first update is that of REINFORCE: -A grad logprob.

    Cost: element-wise over (b, s); no collective. Raises InputError for shapes that differ or a missing argument.
    """
    named = {
        "advantages": advantages,
        "loss_mask": loss_mask,
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "reference_logprobs": reference_logprobs,
        "sequence_ids": sequence_ids,
    }
    _check(logprobs, named, config)
    mask = loss_mask.bool()

    def seen(values: Tensor) -> Tensor:
        return values.to(logprobs.dtype).where(mask, 0.0)

    logprobs = seen(logprobs)
    old = logprobs.detach() if old_logprobs is None else seen(old_logprobs)
    advantages = seen(advantages)
    responses = _Responses(mask, sequence_ids)
    ratio = (logprobs - old).exp()
    clamped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clamped)
    kl = torch.zeros_like(loss)
    if reference_logprobs is not None:
        kl = _kl(logprobs - seen(reference_logprobs), config.kl_estimator)
        loss = loss + config.kl_coef * kl
    importance = torch.ones_like(loss)
    if config.importance_sampling != "off":
        assert rollout_logprobs is not None
        importance = _importance((old - seen(rollout_logprobs)).detach(), responses, config)
        loss = loss * importance
    if config.aggregation == "sequence_mean":
        loss = loss / responses.lengths().clamp(min=1)
    elif config.aggregation == "constant":
        loss = loss / config.normalizer
    num_tokens = mask.sum()
    total = loss.where(mask, 0.0).sum()
    with torch.no_grad():
        ratio = ratio.where(mask, 0.0)
        return PolicyLoss(
            total=total,
            divisor=num_tokens if config.aggregation == "token_mean" else responses.count(),
            num_tokens=num_tokens,
            ratio=ratio.sum(),
            ratio_max=ratio.amax(),
            clipped=(mask & (-advantages * ratio < -advantages * clamped)).sum(),
            kl=kl.where(mask, 0.0).sum(),
            importance=importance.where(mask, 0.0).sum(),
        )


def _check(logprobs: Tensor, named: dict[str, Tensor | None], config: PolicyLossConfig) -> None:
    if logprobs.dim() != 2 or not logprobs.is_floating_point():
        raise InputError(
            f"logprobs has shape {list(logprobs.shape)} and dtype {logprobs.dtype}; expected floats (b, s)"
        )
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise InputError(
                f"{name} has shape {list(tensor.shape)}; expected that of logprobs, {list(logprobs.shape)}"
            )
    if config.importance_sampling != "off" and named["rollout_logprobs"] is None:
        raise InputError(f"importance_sampling is {config.importance_sampling}; expected rollout_logprobs with it")
    if config.kl_coef and named["reference_logprobs"] is None:
        raise InputError(f"kl_coef is {config.kl_coef}; expected reference_logprobs with it")


def _kl(log_ratio: Tensor, estimator: str) -> Tensor:
    """Per token, of log(policy / reference); the estimators of http://joschu.net/blog/kl-approx.html."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


def _importance(log_ratio: Tensor, responses: "_Responses", config: PolicyLossConfig) -> Tensor:
    if config.importance_sampling == "token":
        return log_ratio.exp().clamp(max=config.importance_cap)
    ratio = responses.sums(log_ratio).exp()
    return ratio.where(ratio <= config.importance_cap, 0.0)


class _Responses:
    """The responses of a batch by the tokens they are made of."""

    def __init__(self, mask: Tensor, sequence_ids: Tensor | None) -> None:
        rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand_as(mask)
        self._mask = mask
        self._place = rows
        self._size = mask.shape[0]
        if sequence_ids is not None:
            # Ids of masked tokens may be anything, so they count as the row's first.
            ids = sequence_ids.where(mask, 0)
            width = int(ids.max()) + 1 if ids.numel() else 1
            self._place, self._size = rows * width + ids, mask.shape[0] * width

    def sums(self, values: Tensor) -> Tensor:
        """(b, s): each token gets the sum over the unmasked tokens of its response."""
        total = values.new_zeros(self._size).index_add_(0, self._place.flatten(), values.where(self._mask, 0).flatten())
        return total[self._place]

    def lengths(self) -> Tensor:
        """(b, s) int64: unmasked tokens of each token's response."""
        return self.sums(self._mask.long())

    def count(self) -> Tensor:
        """int64: responses with an unmasked token."""
        tokens = torch.zeros(self._size, dtype=torch.long, device=self._mask.device)
        return (tokens.index_add_(0, self._place.flatten(), self._mask.long().flatten()) > 0).sum()
