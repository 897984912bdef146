"""The policy loss: how far a step may go, what it is divided by, what is held against a reference or a sampler."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_ptrl.config.checks import require


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """Clipped policy gradient over groups of responses. The defaults are GRPO's (arXiv:2402.03300) without KL, with
    every token of the batch weighted alike as in DAPO (arXiv:2503.14476)."""

    clip_low: float = 0.2
    """The ratio is cut off below `1 - clip_low`."""
    clip_high: float = 0.2
    """The ratio is cut off above `1 + clip_high`; 0.28 with a clip_low of 0.2 is DAPO's clip-higher."""
    kl_coef: float = 0.0
    """Nats of loss per nat of KL(policy || reference), over the tokens that the loss is computed on: none of a group
    that rollout.drop_equal_groups leaves out. 0 runs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """d = log(policy / reference): k1 is d, whose gradient has mean 0; k2 is d^2 / 2; k3 is exp(-d) + d - 1, GRPO's."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Mean over all tokens (DAPO), mean over responses of their means (GRPO), or sum of each response's tokens over
    `normalizer`, then the mean over responses (Dr. GRPO, arXiv:2503.20783)."""
    normalizer: int = 1024
    """`constant`: tokens that a response's sum is divided by, usually the longest response."""
    normalize_std: bool = True
    """Divide advantages by the group's deviation: unbiased, + 1e-6. False is Dr. GRPO's."""
    importance_sampling: Literal["off", "token", "sequence_mask"] = "off"
    """What makes up for a sampler whose probabilities differ from the trainer's. `token`: each token's loss times its
    own ratio, at most `importance_cap`. `sequence_mask`: each response's loss times the product of its tokens' ratios,
    and nothing from responses whose product is above the cap."""
    importance_cap: float = 2.0
    """Largest such ratio."""

    def __post_init__(self) -> None:
        require(0 <= self.clip_low <= 1, f"policy.clip_low is {self.clip_low}; expected 0 to 1")
        require(self.clip_high >= 0, f"policy.clip_high is {self.clip_high}; expected >= 0")
        require(
            self.kl_coef >= 0 and math.isfinite(self.kl_coef), f"policy.kl_coef is {self.kl_coef}; expected 0 or more"
        )
        require(self.normalizer >= 1, f"policy.normalizer is {self.normalizer}; expected >= 1")
        require(self.importance_cap > 0, f"policy.importance_cap is {self.importance_cap}; expected > 0")
