"""Pre-training data as a reinforcement signal, for Megatron-Core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_ptrl.config import RewardShaping

if TYPE_CHECKING:
    from megatron_ptrl.losses.linear_head import (
        linear_reward_shaped_cross_entropy,
        linear_reward_shaped_cross_entropy_with_stats,
    )
    from megatron_ptrl.losses.reward_shaped_ce import (
        TokenStats,
        reward_shaped_cross_entropy,
        reward_shaped_cross_entropy_with_stats,
    )

__all__ = [
    "RewardShaping",
    "TokenStats",
    "linear_reward_shaped_cross_entropy",
    "linear_reward_shaped_cross_entropy_with_stats",
    "reward_shaped_cross_entropy",
    "reward_shaped_cross_entropy_with_stats",
]


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds to import, and the data stages do without it.
    if name in __all__:
        home = "linear_head" if name.startswith("linear_") else "reward_shaped_ce"
        return getattr(import_module(f"megatron_ptrl.losses.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
