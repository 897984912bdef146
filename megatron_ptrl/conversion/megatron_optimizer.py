"""Megatron-LM's arguments of the optimizer and the schedule <-> ours, and why a run of its cannot go on here."""

import math
from argparse import Namespace
from typing import Any, get_args, get_type_hints

from megatron_ptrl.config import PretrainConfig
from megatron_ptrl.config.run import OptimizerConfig
from megatron_ptrl.training.optimizer import ALIKE_IN_MEGATRON, check_schedule

# Where a checkpoint says how its parts are stored.
CONTENT = "content_metadata"
# What together is our data.isolate_documents.
ISOLATION = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
_DECAYS = {"constant": "constant", "cosine": "cosine", "WSD": "wsd"}
_WSD_DECAYS = get_args(get_type_hints(OptimizerConfig)["wsd_decay"])
# Arguments that change how a run learns and that ours does not have, and what they are without it.
_NEUTRAL: dict[str, Any] = {
    "decoupled_lr": None,
    "decoupled_weight_decay": True,
    "apply_wd_to_qk_layernorm": False,
    "grad_norm_skip_threshold": math.inf,
}


def optimizer_settings(told: dict[str, Any], batch: int) -> dict[str, Any]:
    """Fields of `OptimizerConfig` by name. Numbers that are not there stay at our defaults.

    told: Megatron-LM's arguments by name   batch: rows of a step, by which what is counted in samples becomes steps
    """
    names = {**{name: name for name in ALIKE_IN_MEGATRON}, "end_weight_decay": "weight_decay"}
    found = {ours: told[theirs] for theirs, ours in names.items() if told.get(theirs) is not None}
    found["schedule"] = _DECAYS.get(told.get("lr_decay_style", "cosine"), "cosine")
    decay = _steps(told, "lr_decay", batch)
    if found["schedule"] == "wsd":
        decay = _steps(told, "lr_wsd_decay", batch)
        if _wsd_decay(told) in _WSD_DECAYS:
            found["wsd_decay"] = _wsd_decay(told)
    if decay:
        found["decay_steps"] = decay
    found["warmup_steps"] = _warmup_steps(told, batch)
    return found


def schedule_args(run: PretrainConfig) -> dict[str, Any]:
    """Megatron-LM's arguments of the schedule, by name. Raises InputError where its parts do not fit into the run."""
    optimizer = run.optimizer
    decay_steps, wsd_decay_steps = check_schedule(run)
    return {
        "lr_decay_style": {ours: theirs for theirs, ours in _DECAYS.items()}[optimizer.schedule],
        "lr_decay_iters": decay_steps,
        "lr_wsd_decay_style": optimizer.wsd_decay,
        "lr_wsd_decay_iters": wsd_decay_steps,
        "lr_warmup_iters": optimizer.warmup_steps,
        "lr_warmup_init": 0.0,
        "start_weight_decay": optimizer.weight_decay,
        "end_weight_decay": optimizer.weight_decay,
        "weight_decay_incr_style": "constant",
    }


def isolation(told: dict[str, Any]) -> dict[str, bool]:
    """Which parts of our data.isolate_documents a run had, by their names in Megatron-LM."""
    parts = {name: bool(told.get(name)) for name in ISOLATION}
    # It is in the mask that the data bring along, if they bring one.
    parts["reset_attention_mask"] &= told.get("create_attention_mask_in_dataloader", True)
    return parts


def cannot_continue(args: Namespace, common: dict[str, Any]) -> str | None:
    """Why no run of ours can go on with the optimizer of a checkpoint; None where one can.

    common: what its common.pt holds
    """
    told = vars(args)
    sharding = (common.get(CONTENT) or {}).get("distrib_optim_sharding_type")
    if told.get("no_save_optim"):
        return "it was saved with --no-save-optim"
    if told.get("use_distributed_optimizer") and sharding != "fully_reshardable":
        return (
            f"its distributed optimizer is stored as {sharding}, in buckets that depend on its ranks; load it once in "
            "Megatron-LM and save it with --dist-ckpt-optim-fully-reshardable"
        )
    for name in ("optimizer", "opt_param_scheduler", "iteration"):
        if name not in common:
            return f"it has no {name}"
    if "consumed_train_samples" not in told:
        return "its args have no consumed_train_samples"
    if told.get("optimizer", "adam") != "adam":
        return f"its optimizer is {told['optimizer']}; expected adam"
    if told.get("use_precision_aware_optimizer"):
        return "its optimizer is --use-precision-aware-optimizer, which keeps its state in another form"
    for name in ("rampup_batch_size", "step_batch_size_schedule"):
        if told.get(name):
            return f"its batch grows (--{name.replace('_', '-')} {told[name]}), and ours stays the same"
    for name, neutral in _NEUTRAL.items():
        if told.get(name, neutral) != neutral:
            return f"its {name} is {told[name]}; expected {neutral}, which is what our optimizer has"
    return _other_schedule(told, common["iteration"]) or _other_rows(told)


def _other_schedule(told: dict[str, Any], iteration: int) -> str | None:
    batch, steps = told["global_batch_size"], told.get("train_iters")
    style = told.get("lr_decay_style", "cosine")
    if style not in _DECAYS:
        return f"its learning rate decays by {style}; expected one of {', '.join(_DECAYS)}"
    if style == "WSD":
        if _wsd_decay(told) not in _WSD_DECAYS:
            return f"its lr_wsd_decay_style is {_wsd_decay(told)}; expected one of {', '.join(_WSD_DECAYS)}"
        end = _steps(told, "lr_decay", batch) or steps
        if end != steps:
            return f"its WSD schedule ends after {end} iterations of {steps} (--lr-decay-iters), and ours after all"
    if told.get("lr_warmup_init") and iteration < _warmup_steps(told, batch):
        return f"its warm-up is not over and began at --lr-warmup-init {told['lr_warmup_init']}; ours begins at 0"
    start, end = told.get("start_weight_decay"), told.get("end_weight_decay")
    if start != end:
        return f"its weight decay goes from {start} to {end} (--weight-decay-incr-style), and ours stays the same"
    return None


def _other_rows(told: dict[str, Any]) -> str | None:
    parts = isolation(told)
    if len(set(parts.values())) == 1:
        return None
    sides = [
        " and ".join(f"--{name.replace('_', '-')}" for name in parts if parts[name] == has) for has in (True, False)
    ]
    return f"its documents share a row with {sides[0]} but without {sides[1]}; expected all three or none"


def _wsd_decay(told: dict[str, Any]) -> str:
    return told.get("lr_wsd_decay_style", "exponential")


def _warmup_steps(told: dict[str, Any], batch: int) -> int:
    fraction = told.get("lr_warmup_fraction")
    if fraction:
        return round(fraction * (_steps(told, "lr_decay", batch) or told.get("train_iters") or 0))
    return _steps(told, "lr_warmup", batch)


def _steps(told: dict[str, Any], name: str, batch: int) -> int:
    """Of a part of the schedule that is counted in iterations or in samples; 0 where it is in neither."""
    return told.get(f"{name}_iters") or (told.get(f"{name}_samples") or 0) // batch
