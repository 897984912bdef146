"""Pre-training data as a reinforcement signal, for Megatron-Core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_ptrl.config import PolicyLossConfig, RewardShaping

if TYPE_CHECKING:
    from megatron_ptrl.losses.linear_head import (
        linear_reward_shaped_cross_entropy,
        linear_reward_shaped_cross_entropy_with_stats,
    )
    from megatron_ptrl.losses.linear_head_sum import (
        linear_reward_shaped_cross_entropy_sum,
        linear_reward_shaped_cross_entropy_sum_with_stats,
    )
    from megatron_ptrl.losses.policy import PolicyLoss, group_advantages, policy_loss
    from megatron_ptrl.losses.remit import remit_weights, rho1_weights
    from megatron_ptrl.losses.reward_shaped_ce import (
        TokenStats,
        reward_shaped_cross_entropy,
        reward_shaped_cross_entropy_with_stats,
    )

__all__ = [
    "PolicyLoss",
    "PolicyLossConfig",
    "RewardShaping",
    "TokenStats",
    "group_advantages",
    "linear_reward_shaped_cross_entropy",
    "linear_reward_shaped_cross_entropy_sum",
    "linear_reward_shaped_cross_entropy_sum_with_stats",
    "linear_reward_shaped_cross_entropy_with_stats",
    "policy_loss",
    "remit_weights",
    "reward_shaped_cross_entropy",
    "reward_shaped_cross_entropy_with_stats",
    "rho1_weights",
]

_HOMES = {
    "PolicyLoss": "policy",
    "group_advantages": "policy",
    "linear_reward_shaped_cross_entropy": "linear_head",
    "linear_reward_shaped_cross_entropy_sum": "linear_head_sum",
    "linear_reward_shaped_cross_entropy_sum_with_stats": "linear_head_sum",
    "linear_reward_shaped_cross_entropy_with_stats": "linear_head",
    "policy_loss": "policy",
    "remit_weights": "remit",
    "rho1_weights": "remit",
}


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and the data stages do without it.
    if name in __all__:
        return getattr(import_module(f"megatron_ptrl.losses.{_HOMES.get(name, 'reward_shaped_ce')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
