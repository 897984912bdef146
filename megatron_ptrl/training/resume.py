"""Which checkpoint a run begins with, whether it belongs to this run, and what has changed since it was saved."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ptrl.config import ModelConfig, RunConfig
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint
from megatron_ptrl.training.checkpoint import Progress
from megatron_ptrl.training.frozen import check_padding

# What the network computes from its weights, whether or not their shapes tell. Other fields of the model (dropout,
# recomputation, fusions, the pipeline split) may change from run to run, and the log says so.
DEFINE_THE_MODEL = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
    *("normalization", "layernorm_epsilon", "qk_layernorm", "gated_linear_unit", "add_bias_linear", "add_qkv_bias"),
    *("activation_func", "share_embeddings_and_output_weights", "rotary_base", "make_vocab_size_divisible_by"),
    *("rope_scaling_factor", "rotary_interleaved", "no_rope_freq", "mrope_section", "softmax_scale", "softmax_type"),
    *("window_size", "window_attn_skip_freq", "qk_l2_norm", "attention_output_gate", "multi_latent_attention"),
    *("experimental_attention_variant", "linear_attention_freq", "layernorm_zero_centered_gamma"),
    *("apply_residual_connection_post_layernorm", "glu_linear_offset", "activation_func_clamp_value"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_layer_freq", "moe_latent_size", "moe_apply_probs_on_input"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_topk", "moe_router_num_groups"),
    *("moe_router_group_topk", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
    *("moe_router_score_function", "moe_router_enable_expert_bias", "mtp_num_layers"),
)
_ONLY_AT_THE_START = ("use_cpu_initialization", "init_method_std")
_MUST_STAY = {
    "train.global_batch": "the position in the data and the schedule are counted in it",
    "parallel.distributed_optimizer": "Megatron-Core cannot convert the two forms",
}
_SECTIONS = ("data", "loss", "optimizer", "train", "remit", "prompts", "rollout", "policy", "judge")
# Side-cars are compared by what they hold, not by where they lie.
_NO_EFFECT = ("cache", "micro_batch", "offload_reference", "top_tokens", "sidecar")
_ORDER_SAMPLES = (
    "data.train",
    "data.valid",
    "data.split",
    "data.seq_length",
    "train.seed",
    "prompts.files",
)


def restore(
    config: RunConfig, tokenizer: Tokenizer, chunks: list[Any], optimizer: Any, scheduler: Any
) -> tuple[Progress, list[str]]:
    """Load the newest whole checkpoint of the run, else the weights that `checkpoint.load` names, else nothing.

    Returns how far the run has come and notes for its log. Collective over all ranks.
    Raises InputError for a checkpoint of another model, tokenizer or batch, and where checkpoints exist but none is
    whole: starting over would overwrite the run.
    """
    directory = Path(config.run_dir) / "checkpoints"
    found = checkpoint.find_on_rank_0(directory)
    notes = [f"not loaded: {reason}" for reason in found.passed_over]
    if found.path is not None:
        check_same_model(found.path, config, tokenizer)
        if checkpoint.read_manifest(found.path).get("weights_only"):
            raise InputError(
                f"{found.path} has weights alone, so no run can continue from it; start one with --checkpoint.load "
                f"{config.run_dir} and another run_dir"
            )
        changed = _check_settings(found.path, config)
        progress, whole = checkpoint.load(found.path, chunks, optimizer, scheduler)
        notes += [f"continuing from {found.path} (step {progress.step})", *changed]
        if not whole:
            notes.append("another layout or program saved it: the random state of dropout starts anew")
        return progress, notes
    if found.named:
        raise InputError(
            f"{directory} has no whole checkpoint to continue from{_because(notes)}; restore one, or move the "
            "directory away to start over"
        )
    if config.checkpoint.load is None:
        return Progress(), notes
    path, passed_over = find_source(config.checkpoint.load, "checkpoint.load")
    check_same_model(path, config, tokenizer)
    checkpoint.load_weights(path, chunks, optimizer)
    return Progress(), [*notes, *passed_over, f"starting from the weights of {path}"]


def find_source(
    load: str, field: str, find: Callable[[Path], checkpoint.Found] = checkpoint.find_on_rank_0
) -> tuple[Path, list[str]]:
    """(the newest whole checkpoint of a run directory or folder of checkpoints, or the one itself; notes for the log).

    find: the default is collective over all ranks; `checkpoint.newest_whole` looks without them
    Raises InputError, naming the `field` that `load` came from, where there is none.
    """
    directory = Path(load)
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    found = find(directory)
    notes = [f"not loaded: {reason}" for reason in found.passed_over]
    if found.path is None and not Path(load).exists():
        raise InputError(f"{field} is {load}, and there is no such folder; expected a run directory")
    if found.path is None:
        raise InputError(f"{field} is {load} and there is no whole checkpoint in it{_because(notes)}")
    return found.path, notes


def describe(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest of a checkpoint says of the run: model, vocabulary, tokenizer, settings by dotted name."""
    return {
        "model": model_fields(config.model),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.sha256,
        "settings": _settings(config),
    }


def model_fields(model: ModelConfig) -> dict[str, Any]:
    """Our own fields, and those of Megatron-Core that differ from their defaults, as JSON and YAML hold them."""
    own = {field.name for field in dataclasses.fields(ModelConfig)}
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name in own or getattr(model, field.name) != field.default
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    """What a step's result follows from, besides the model."""
    named = {"parallel.distributed_optimizer": config.parallel.distributed_optimizer}
    for section in (name for name in _SECTIONS if hasattr(config, name)):
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            if not name.startswith("eval_") and name not in _NO_EFFECT:
                named[f"{section}.{name}"] = value
    return named


def check_same_model(path: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """InputError unless the checkpoint at `path` holds the model of this run, trained with its tokenizer.

    Padding of the vocabulary is part of the model, unless the loss leaves it out.
    """
    manifest, mine = checkpoint.read_manifest(path), describe(config, tokenizer)
    changed = _changed_model(manifest, config)
    if manifest["vocab_size"] != mine["vocab_size"]:
        changed["vocab_size"] = manifest["vocab_size"], mine["vocab_size"]
    for name in (*DEFINE_THE_MODEL, "vocab_size"):
        if name in changed:
            value, here = changed[name]
            raise InputError(
                f"{path} holds a model with {name} {value}, this run has {here}; use the checkpoint's value or "
                "another run_dir"
            )
    if manifest["tokenizer"] != mine["tokenizer"]:
        raise InputError(
            f"{path} was trained with another tokenizer (sha256 {manifest['tokenizer'][:12]}) than {tokenizer.path} "
            f"({mine['tokenizer'][:12]}); tokenize the data with that one, by --tokenizer"
        )
    # Megatron-Core fills columns that the checkpoint lacks with zeros and goes on.
    if not config.loss.mask_padding:
        check_padding(path, manifest, config, "checkpoint")


def _changed_model(manifest: dict[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """(value of the checkpoint, value of this run) of each field of the model that differs."""
    defaults = {field.name: field.default for field in dataclasses.fields(config.model)}
    # As JSON holds them: a pair is a list there.
    saved, here = manifest["model"], json.loads(json.dumps(model_fields(config.model)))
    values = {name: (saved.get(name, defaults.get(name)), here.get(name, defaults.get(name))) for name in saved | here}
    return {name: (before, now) for name, (before, now) in values.items() if before != now}


def _check_settings(path: Path, config: RunConfig) -> list[str]:
    """A note for each setting that changed since the checkpoint."""
    manifest, now = checkpoint.read_manifest(path), _settings(config)
    saved = manifest["settings"]
    changed = {name: (saved[name], value) for name, value in now.items() if name in saved and saved[name] != value}
    of_model = _changed_model(manifest, config)
    changed |= {f"model.{name}": pair for name, pair in of_model.items() if name not in _ONLY_AT_THE_START}
    for name, reason in _MUST_STAY.items():
        if name in changed:
            before, value = (str(x).lower() for x in changed[name])
            raise InputError(
                f"{path} was saved with {name} {before}, this run has {value}, and {reason}; use the checkpoint's value"
            )
    notes = [f"{name} was {before}, from here on it is {value}" for name, (before, value) in changed.items()]
    steps_order = ("train.steps",) if config.ordered_by_steps else ()
    if any(name in changed for name in (*_ORDER_SAMPLES, *steps_order)):
        notes.append("so the samples come in another order, and some may be seen twice")
    return notes


def _because(notes: list[str]) -> str:
    return ": " + "; ".join(notes) if notes else ""
