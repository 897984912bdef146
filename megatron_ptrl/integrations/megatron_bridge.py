"""The reward-shaped loss and ReMiT's weights in recipes of Megatron-Bridge (and of NeMo on top of it).

from megatron.bridge.training.pretrain import pretrain
from megatron_ptrl.integrations import megatron_bridge
pretrain(recipe, megatron_bridge.forward_step(RewardShaping(beta=-0.25)))
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from megatron_ptrl.config import RewardShaping
from megatron_ptrl.errors import InputError
from megatron_ptrl.integrations.flags import EPSILON, NOT_CAPTURED, captured_iteration


def forward_step(
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 (frozen)
    *,
    remit_sidecar: list[str] | None = None,
    remit_epsilon: float = EPSILON,
    inner: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The `forward_step_func` of Megatron-Bridge's `pretrain`: a recipe's own one, with this loss from now on.

    remit_sidecar: what `ptrl score` wrote for each prefix of the training data, in any order
    inner: the recipe's forward step, whose first argument is Bridge's GlobalState; by default that for GPT,
        `megatron.bridge.training.gpt_step.forward_step`

    Made before `pretrain` builds its data sets. The models of the process compute the shaped loss, whoever trains them,
    and the log line, TensorBoard and Weights & Biases get the averages that Megatron-LM's do.
    Raises InputError for a recipe with which the loss would not be exact, at its first step.
    """
    from megatron_ptrl.integrations import core_loss
    from megatron_ptrl.integrations.core_remit import SideCarWeighting

    step = inner or import_module("megatron.bridge.training.gpt_step").forward_step
    states: list[Any] = []

    def vocab_size() -> int:
        return states[0].tokenizer.vocab_size

    weighting = SideCarWeighting(remit_sidecar, remit_epsilon) if remit_sidecar else None
    core_loss.use(core_loss.Shaped(shaping, vocab_size, weighting))

    # Its signature is what Bridge looks at to decide that the step wants the state.
    @wraps(step)
    def shaped_step(state: Any, *args: Any, **kwargs: Any) -> Any:
        if not states:
            _check(state.cfg.model, weighting is not None)
            states.append(state)
        return step(state, *args, **kwargs)

    return shaped_step


def _check(model: Any, weighted: bool) -> None:
    """Raise InputError for settings of a recipe's model that hide the loss or its mask."""
    if getattr(model, "overlap_moe_expert_parallel_comm", False):
        raise InputError(
            "model.overlap_moe_expert_parallel_comm with megatron_ptrl: its schedule hides the loss mask that the "
            "averages in the log are taken with; leave it false"
        )
    if getattr(model, "cross_entropy_fusion_impl", None) == "linear":
        raise InputError(
            "model.cross_entropy_fusion_impl linear with megatron_ptrl: it computes no logits that could be shaped; "
            "use native"
        )
    if weighted and (captured := captured_iteration(model)):
        raise InputError(f"model.{captured[0]} {captured[1]} with remit_sidecar: {NOT_CAPTURED}")
