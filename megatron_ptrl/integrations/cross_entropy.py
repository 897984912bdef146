"""Megatron's two vocabulary-parallel cross entropies by their own signatures, with a shaping that may be added.

from megatron_ptrl.integrations.cross_entropy import fused_vocab_parallel_cross_entropy
loss = fused_vocab_parallel_cross_entropy(logits, target, tp_group, shaping=RewardShaping(beta=-0.25))
"""

from torch import Tensor

from megatron_ptrl.config import RewardShaping
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.reward_shaped_ce import Group, reward_shaped_cross_entropy

IGNORE_INDEX = -100
"""The target that Megatron's fine-tuning data set gives to the tokens of a prompt, which its loss mask leaves out."""


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    tp_group: Group | None,
    *,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 (frozen)
    vocab_size: int | None = None,
) -> Tensor:
    """`megatron.core.fusions.fused_cross_entropy.fused_vocab_parallel_cross_entropy`, shaped.

    vocab_parallel_logits: [s, b, v/tp] bf16, fp16 or fp32, unchanged
    target: [s, b] int64 ids in the whole vocabulary
    shaping, vocab_size: as `reward_shaped_cross_entropy` takes them; by default plain cross entropy
    returns: [s, b] fp32

    Two things differ from Megatron's. The gradient has the logits' dtype, where Megatron's is always rounded to bf16.
    A target of -100 gives loss and gradient 0, where Megatron gives log sum exp(z) and trusts the loss mask to remove
    it; any other target outside of the vocabulary raises InputError on CPUs and gives NaN on GPUs.
    Cost: that of `reward_shaped_cross_entropy`, one collective in the forward.
    """
    return reward_shaped_cross_entropy(
        vocab_parallel_logits, target, shaping, tp_group, ignore_index=IGNORE_INDEX, vocab_size=vocab_size
    )


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    tp_group: Group | None = None,
    *,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 (frozen)
    vocab_size: int | None = None,
) -> Tensor:
    """`megatron.core.tensor_parallel.vocab_parallel_cross_entropy`, shaped; otherwise as the fused one above.

    tp_group: None is Megatron's own tensor-parallel group, as in the versions whose function has no such argument;
        where Megatron's groups are not set up, an unsharded vocabulary

    Raises InputError for a `label_smoothing` that is not 0: it would replace the distribution that the rewards are
    about (and under tensor parallelism Megatron's own smoothing gives each rank another loss).
    """
    if label_smoothing:
        raise InputError(f"label_smoothing is {label_smoothing}; expected 0, or Megatron's own function")
    return fused_vocab_parallel_cross_entropy(
        vocab_parallel_logits, target, tp_group or _megatrons_group(), shaping=shaping, vocab_size=vocab_size
    )


def _megatrons_group() -> Group | None:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group(check_initialized=False)
