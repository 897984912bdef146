"""The reward-shaped loss in Megatron-Core's own models and schedules, from version 0.16 on.

    LanguageModule.compute_language_model_loss   every loss of GPT, Mamba and hybrid models and of their prediction
        heads comes through it, fused or not, by whatever name that version reaches its cross entropy
    schedules.forward_step_calc_loss             what every schedule does with a microbatch's loss on the last stage
        -> ReMiT's weights on the losses, and averages beside `lm loss` in the report that goes to the logs

Both are looked up where they are called, so that it does not matter what was imported before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ptrl.config import RewardShaping
from megatron_ptrl.errors import InputError
from megatron_ptrl.integrations.cross_entropy import IGNORE_INDEX
from megatron_ptrl.losses.reward_shaped_ce import TokenStats, reward_shaped_cross_entropy_with_stats

STATS = "_ptrl_token_stats"
CE, ENTROPY, REWARD_WEIGHT, TOKEN_WEIGHT = "ptrl ce", "ptrl entropy", "ptrl reward weight", "ptrl token weight"
_NEXT_TOKEN_MODELS = {"GPTModel", "MambaModel", "HybridModel"}


class Weighting(Protocol):
    """Weights of the tokens of a training microbatch."""

    def __call__(self, logprob: Tensor, loss_mask: Tensor) -> Tensor:
        """logprob, loss_mask: (b, s/cp) of this rank -> weights (b, s/cp) fp32 without gradient."""

    def close(self) -> None:
        """Data sets that are built from now on are Megatron's own again."""


@dataclass(frozen=True)
class Shaped:
    """What the models of this process compute."""

    shaping: RewardShaping
    vocab_size: Callable[[], int | None] = lambda: None
    """Real tokens of a padded vocabulary. Asked at the first loss: Megatron knows its tokenizer late."""
    weighting: Weighting | None = None


_active: Shaped | None = None
_installed = False


def use(shaped: Shaped) -> None:
    """Compute this loss in all models of the process from now on. Raises InputError for an unknown Megatron-Core."""
    global _active
    _install()
    _active = shaped


def stop() -> None:
    """Megatron's own loss and data again."""
    global _active
    if _active is not None and _active.weighting is not None:
        _active.weighting.close()
    _active = None


def _install() -> None:
    global _installed
    if _installed:
        return
    module = _attribute("megatron.core.models.common.language_module.language_module", "LanguageModule")
    compute = _attribute_of(module, "compute_language_model_loss")
    schedules = import_module("megatron.core.pipeline_parallel.schedules")
    calc_loss = _attribute_of(schedules, "forward_step_calc_loss")

    @wraps(compute)
    def compute_language_model_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        return compute(self, labels, logits) if _active is None else _shaped_loss(_active, self, labels, logits)

    @wraps(calc_loss)
    def forward_step_calc_loss(model: Any, output_tensor: Any, loss_func: Any, *args: Any, **kwargs: Any) -> Any:
        if _active is not None and loss_func is not None:
            loss_func = partial(_report, _active, model, loss_func)
        return calc_loss(model, output_tensor, loss_func, *args, **kwargs)

    module.compute_language_model_loss = compute_language_model_loss
    schedules.forward_step_calc_loss = forward_step_calc_loss  # type: ignore[attr-defined]
    _installed = True


def _attribute(module: str, name: str) -> Any:
    return _attribute_of(import_module(module), name)


def _attribute_of(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        version = getattr(import_module("megatron.core"), "__version__", "of an unknown version")
        raise InputError(
            f"Megatron-Core {version} has no {owner.__name__}.{name}, where its loss is reached; expected 0.16 or newer"
        )
    return getattr(owner, name)


def _shaped_loss(shaped: Shaped, model: Any, labels: Tensor, logits: Tensor) -> Tensor:
    """labels [b, s], logits [s, b, v/tp] -> loss [b, s] fp32; the by-products stay at the model."""
    if not _NEXT_TOKEN_MODELS & {kind.__name__ for kind in type(model).__mro__}:
        raise InputError(
            f"{type(model).__name__} does not predict the next token, as the rewards suppose; expected one of "
            f"{', '.join(sorted(_NEXT_TOKEN_MODELS))}"
        )
    shaping = shaped.shaping
    if not shaping.ranks_matter:
        # Only the head's mass, which nobody asks for here, would depend on it.
        shaping = RewardShaping(shaping.beta, shaping.lambda_head, shaping.lambda_tail, top_k=1)
    rewarded = shaping.lambda_head or shaping.lambda_tail
    loss, stats = reward_shaped_cross_entropy_with_stats(
        logits,
        labels.transpose(0, 1).contiguous(),
        shaping,
        model.pg_collection.tp,
        # Megatron's prediction heads read their logits again in the forward, and nothing does in the backward.
        inplace_backward=torch.is_grad_enabled(),
        ignore_index=IGNORE_INDEX,
        vocab_size=shaped.vocab_size() if rewarded else None,
    )
    # Those of the prediction heads come first, so that the main loss's remain.
    setattr(model, STATS, stats)
    return loss.transpose(0, 1).contiguous()


def _report(shaped: Shaped, model: Any, loss_func: Callable[..., Any], output: Tensor, **kwargs: Any) -> Any:
    """What `loss_func` returns for the weighted losses, with averages over the same tokens in its report."""
    if kwargs.get("non_loss_data"):
        return loss_func(output, **kwargs)
    stats = _take_stats(model)
    loss_mask = _loss_mask(loss_func, output)
    logprob = stats.logprob.t()
    columns = {CE: -logprob, ENTROPY: stats.entropy.t(), REWARD_WEIGHT: reward_weight(logprob, shaped.shaping.beta)}
    if shaped.weighting is not None and torch.is_grad_enabled():
        weights = shaped.weighting(logprob, loss_mask)
        columns[TOKEN_WEIGHT] = weights
        output = output * weights
    loss, *num_tokens, report = loss_func(output, **kwargs)
    for name, column in columns.items():
        total = (column * loss_mask).sum().view(1)
        if num_tokens:
            report[name] = torch.cat([total, num_tokens[0].detach().view(1)])
        else:
            report[name] = total / loss_mask.sum().clamp(min=1)
    return loss, *num_tokens, report


def _take_stats(model: Any) -> TokenStats:
    while STATS not in vars(model) and hasattr(model, "module"):
        model = model.module
    stats = vars(model).pop(STATS, None)
    if stats is None:
        raise InputError(
            f"the loss of {type(model).__name__} did not come from its compute_language_model_loss; expected a model "
            "that was given labels, and no distillation"
        )
    return stats


def _loss_mask(loss_func: Any, output: Tensor) -> Tensor:
    """The loss mask (b, s) that a forward step's `partial(loss_func, loss_mask, ...)` holds."""
    if isinstance(loss_func, partial):
        for value in (*loss_func.args, *loss_func.keywords.values()):
            if isinstance(value, Tensor) and value.numel() == output.numel():
                return value.view(output.shape).float()
    raise InputError(
        "the forward step returned a loss function without its loss mask; expected partial(loss_func, loss_mask, ...), "
        "as in Megatron's pretrain_gpt.py"
    )


def reward_weight(logprob: Tensor, beta: float) -> Tensor:
    """w = p^(1 - (1 - p)^beta), the weight of a token's own log-probability under `beta`; logprob's shape, fp32."""
    logprob = logprob.detach().float()
    w = ((1 - (-torch.expm1(logprob)) ** beta) * logprob).exp()
    # At p = 1 the exponent is 0 times infinity; w tends to 1 there for beta > -1.
    return torch.where(logprob == 0, 1, w) if beta else torch.ones_like(w)
