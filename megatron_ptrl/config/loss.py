"""The rewards, and how the loss is computed."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_ptrl.config.checks import require

DEFAULT_TOP_K = 100
DEFAULT_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class RewardShaping:
    """Rewards of next-token prediction as a one-step policy (arXiv:2512.22955). The defaults are cross entropy."""

    beta: float = 0.0
    """Exponent of the positive reward, > -1. Below 0 the distribution sharpens, above 0 it flattens."""
    lambda_head: float = 0.0
    """The paper's lambda-tilde: reward of the other tokens among the `top_k` most probable; > 0 keeps them alive."""
    lambda_tail: float = 0.0
    """The paper's lambda-hat: reward of the tokens outside the `top_k`. Below 0 pushes them down."""
    top_k: int = DEFAULT_TOP_K
    """How many of the most probable tokens form the head; ties with the last one are all in."""

    def __post_init__(self) -> None:
        for name in ("beta", "lambda_head", "lambda_tail"):
            value = getattr(self, name)
            require(math.isfinite(value), f"{name} is {value}; expected a finite number")
        require(
            self.beta > -1,
            f"beta is {self.beta}; expected > -1, because at -1 and below the reward of a token the model is already "
            "sure of does not tend to 1 (the paper's settings are -0.25, 0 and 0.5)",
        )
        require(isinstance(self.top_k, int) and self.top_k >= 1, f"top_k is {self.top_k}; expected an integer >= 1")

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError for a `top_k` above the vocabulary; an untouched default is capped where no reward needs it."""
        capped = self.top_k == DEFAULT_TOP_K and not self.ranks_matter
        require(
            self.top_k <= vocab_size or capped,
            f"top_k is {self.top_k}; expected at most the {vocab_size} tokens of the vocabulary",
        )

    @property
    def ranks_matter(self) -> bool:
        """Whether the loss needs the top-k: not when head and tail have the same reward."""
        return self.lambda_head != self.lambda_tail


@dataclass(frozen=True, kw_only=True)
class LossConfig(RewardShaping):
    """The reward shaping, and which implementation computes it."""

    impl: Literal["reward_shaped", "linear", "megatron"] = "reward_shaped"
    """`linear` computes the same without the logits of all tokens, for one more product of the head's size; `megatron`
    is Megatron-Core's own vocabulary-parallel cross entropy, for comparison; it cannot shape."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Tokens whose logits `linear` holds at a time."""
    recompute_logits: bool = True
    """False: `linear` computes the gradients in the forward and no logits twice. The gradient of its weight then waits
    for the backward in fp32."""

    mask_padding: bool = False
    """Leave the columns that pad the vocabulary out of the softmax, in which Megatron has them."""

    def __post_init__(self) -> None:
        RewardShaping.__post_init__(self)
        require(
            not self.mask_padding or (self.impl != "megatron" and self.recompute_logits),
            "loss.mask_padding is true; expected loss.impl reward_shaped or linear, and recompute_logits",
        )
        require(self.chunk_tokens >= 1, f"loss.chunk_tokens is {self.chunk_tokens}; expected >= 1")
        require(
            self.recompute_logits or self.impl == "linear",
            f"loss.recompute_logits is false with loss.impl {self.impl}; expected true, or loss.impl linear",
        )
        shaped = self.beta or self.lambda_head or self.lambda_tail
        require(
            not (self.impl == "megatron" and shaped),
            "loss.impl is megatron, which computes plain cross entropy; expected beta, lambda_head and lambda_tail "
            "to be 0, or loss.impl reward_shaped",
        )

    @property
    def shaping(self) -> RewardShaping:
        """The part that the loss function takes."""
        return RewardShaping(self.beta, self.lambda_head, self.lambda_tail, self.top_k)
