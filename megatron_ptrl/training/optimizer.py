"""Config -> Megatron-Core's AdamW and learning-rate schedule, and the repair that torch's Adam needs to resume."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ptrl.config import RunConfig
from megatron_ptrl.errors import InputError

_OF_THE_RUN = ("lr", "max_lr", "min_lr", "start_wd", "end_wd", "wd_mult", "weight_decay", "betas", "eps")
# Numbers that have one name here, in Megatron-Core's configuration of an optimizer and in Megatron-LM's arguments.
ALIKE_IN_MEGATRON = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
_STYLES = {"constant": "constant", "cosine": "cosine", "wsd": "WSD"}


def build_optimizer(config: RunConfig, chunks: list[Any]) -> MegatronOptimizer:
    """AdamW over the model chunks; fused where apex or Transformer Engine is there, else torch's."""
    bf16 = config.train.precision == "bf16"
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        **{name: getattr(config.optimizer, name) for name in ALIKE_IN_MEGATRON},
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    built = get_megatron_optimizer(settings, chunks, config_overrides=_spare_norms_and_biases(settings))
    _store_padding(built)
    return built


def _store_padding(optimizer: MegatronOptimizer) -> None:
    """Let checkpoints hold the padding between gradient buckets, too.

    Megatron-Core 0.16 packs the buckets without it and then cuts the parameters out by their places with it, so that
    every parameter behind a padded bucket would be saved shifted (dp 3, an embedding tied over pipeline stages).
    """
    for part in _parts(optimizer):
        for buffer in getattr(part, "buffers", []):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def _spare_norms_and_biases(settings: MegatronOptimizerConfig) -> Any:
    from megatron.core import optimizer as megatron_optimizer

    overrides = getattr(megatron_optimizer, "get_standard_config_overrides", None)
    return overrides(settings) if overrides else None


def check_schedule(config: RunConfig) -> tuple[int, int | None]:
    """(steps until the rate stays at its minimum, steps of the last part of wsd).

    Raises InputError where the parts do not fit into the run.
    """
    optimizer, steps = config.optimizer, config.train.steps
    decay_steps = steps
    wsd_decay_steps = None
    if optimizer.schedule == "cosine":
        decay_steps = optimizer.decay_steps if optimizer.decay_steps is not None else steps
    elif optimizer.schedule == "wsd":
        wsd_decay_steps = optimizer.decay_steps if optimizer.decay_steps is not None else max(1, steps // 10)
    if optimizer.warmup_steps >= decay_steps:
        raise InputError(
            f"optimizer.warmup_steps {optimizer.warmup_steps} leaves nothing of the {decay_steps} steps of the schedule"
        )
    if wsd_decay_steps and wsd_decay_steps + optimizer.warmup_steps > steps:
        raise InputError(
            f"optimizer.warmup_steps {optimizer.warmup_steps} and decay_steps {wsd_decay_steps} are more than the "
            f"train.steps {steps}; shorten one of them"
        )
    return decay_steps, wsd_decay_steps


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """The learning-rate schedule, counted in samples as Megatron-LM does, in steps where their samples vary."""
    decay_steps, wsd_decay_steps = check_schedule(config)
    samples = config.rows_per_step or 1
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=config.optimizer.warmup_steps * samples,
        lr_decay_steps=decay_steps * samples,
        lr_decay_style=_STYLES[config.optimizer.schedule],
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=config.train.steps * samples,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_decay_steps * samples if wsd_decay_steps else None,
        lr_wsd_decay_style=config.optimizer.wsd_decay,
    )


def fill_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam the zeros it would make in its first step: Megatron reads them before it loads into them."""
    for inner in _torch_adams(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if parameter not in inner.state:
                    zeros = torch.zeros_like(parameter)
                    inner.state[parameter] = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, exact also where torch's Adam sits in the distributed optimizer.

    Rates, betas and the like stay those of this run's config; Megatron-Core would take the checkpoint's.

    There Megatron-Core 0.16 hands every parameter the same step tensor, which Adam then counts up once per
    parameter, and looks for that step among the sharded tensors. Apex and Transformer Engine count per group.
    """
    parts = _parts(optimizer)
    own = [{name: group[name] for name in _OF_THE_RUN if name in group} for group in optimizer.param_groups]
    # A chain of optimizers (experts have their own) is stored by number.
    states = [loaded] if len(parts) == 1 else list(loaded.values())
    adams = {id(inner) for inner in _torch_adams(optimizer)}
    for part, state in zip(parts, states, strict=True):
        whole_steps(state)
        param_state = state.pop("param_state", None)
        if param_state is None or id(part.optimizer) not in adams:
            if param_state is not None:
                state["param_state"] = param_state
            part.load_state_dict(state)
            continue
        step = float(state["optimizer"]["param_groups"][0]["step"])
        with torch.no_grad():
            part.load_state_dict(state)
            for moments in part.optimizer.state.values():
                del moments["step"]
            part.load_parameter_state_from_fully_reshardable(param_state)
        for moments in part.optimizer.state.values():
            moments["step"] = torch.tensor(step)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def whole_steps(state: dict[str, Any]) -> None:
    """Make the steps of an optimizer's groups whole numbers, in place, in however many parts.

    With torch's Adam in the distributed optimizer Megatron-Core stores fractions, which the kernels of Apex and
    Transformer Engine do not take.
    """
    for group in state.get("param_groups", []):
        if "step" in group:
            group["step"] = int(group["step"])
    for inner in state.values():
        if isinstance(inner, dict):
            whole_steps(inner)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[Any]:
    for part in _parts(optimizer):
        if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            yield part.optimizer
