"""Megatron-LM's arguments, as its checkpoints hold them, <-> our settings. What our model is not is refused by name."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ptrl.config import PretrainConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import mcore

# Arguments that change the model and that ours does not have, and what they are without it; absent in old versions.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None,),
    "num_experts": (None,),
    "multi_latent_attention": (False,),
    "window_size": (None,),
    "apply_layernorm_1p": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "mtp_num_layers": (None, 0),
    "use_mup": (False,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "apply_residual_connection_post_layernorm": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "qk_l2_norm": (False,),
    "no_rope_freq": (None,),
    "hybrid_layer_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "fp16": (False,),
}
# Where a checkpoint says how its parts are stored.
CONTENT = "content_metadata"
_DECAYS = {"constant": "constant", "cosine": "cosine", "WSD": "wsd"}


def settings_of(args: Namespace, where: Path) -> dict[str, dict[str, Any]]:
    """Sections of `PretrainConfig` by name: model, data, train, optimizer, parallel, without the tokenizer.

    Raises InputError, naming `where`, for a model that ours is not.
    """
    told = vars(args)
    for name, neutral in _NEUTRAL.items():
        if told.get(name, neutral[0]) not in neutral:
            raise InputError(f"{where}: {name} is {told[name]}; expected {neutral[0]}, which is what our model has")
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "global_batch_size"):
        if not isinstance(told.get(name), int):
            raise InputError(f"{where}: its args have {name} {told.get(name)}; expected a whole number")
    swiglu = bool(told.get("swiglu"))
    grouped = told.get("num_query_groups") if told.get("group_query_attention") else None
    return {
        "model": {
            "num_layers": args.num_layers,
            "hidden_size": args.hidden_size,
            "num_attention_heads": args.num_attention_heads,
            "num_query_groups": grouped,
            "ffn_hidden_size": told.get("ffn_hidden_size") or 4 * args.hidden_size,
            "kv_channels": told.get("kv_channels"),
            "normalization": told.get("normalization", "LayerNorm"),
            "layernorm_epsilon": told.get("norm_epsilon", 1e-5),
            "qk_layernorm": bool(told.get("qk_layernorm")),
            "gated_linear_unit": swiglu,
            "activation_func": "silu" if swiglu else "gelu",
            "add_bias_linear": bool(told.get("add_bias_linear", True)),
            "add_qkv_bias": bool(told.get("add_qkv_bias")),
            "hidden_dropout": told.get("hidden_dropout", 0.1),
            "attention_dropout": told.get("attention_dropout", 0.1),
            "init_method_std": told.get("init_method_std", 0.02),
            "share_embeddings_and_output_weights": not told.get("untie_embeddings_and_output_weights"),
            "rotary_base": int(told.get("rotary_base", 10000)),
            "rope_scaling_factor": told.get("rope_scaling_factor", 8.0) if told.get("use_rope_scaling") else None,
        },
        "data": {"seq_length": args.seq_length, **_split(told)},
        "train": {
            "precision": "bf16" if told.get("bf16") else "fp32",
            "global_batch": args.global_batch_size,
            "micro_batch": told.get("micro_batch_size") or 1,
            "steps": told.get("train_iters") or 1,
            "seed": told.get("seed", 1234),
        },
        "optimizer": _optimizer(told, args.global_batch_size),
        "parallel": {
            "tp": told.get("tensor_model_parallel_size", 1),
            "pp": told.get("pipeline_model_parallel_size", 1),
            "sequence_parallel": bool(told.get("sequence_parallel")),
            "distributed_optimizer": bool(told.get("use_distributed_optimizer")),
        },
    }


def _split(told: dict[str, Any]) -> dict[str, str]:
    """Which documents were trained on decides their order, too. Megatron-LM takes any separators between the shares."""
    if any(told.get(name) for name in ("data_path", "data_args_path")) and told.get("split"):
        return {"split": ",".join(re.findall(r"[.0-9]+", told["split"]))}
    if any(told.get(name) for name in ("train_data_path", "per_split_data_args_path")):
        return {"split": "1"}
    return {}


def _optimizer(told: dict[str, Any], batch: int) -> dict[str, Any]:
    """Numbers that are not there stay at our defaults; what is counted in samples becomes steps."""
    names = {
        "lr": "lr",
        "min_lr": "min_lr",
        "weight_decay": "weight_decay",
        "adam_beta1": "adam_beta1",
        "adam_beta2": "adam_beta2",
        "adam_eps": "adam_eps",
        "clip_grad": "clip_grad",
    }
    found = {ours: told[theirs] for ours, theirs in names.items() if told.get(theirs) is not None}
    found["schedule"] = _DECAYS.get(told.get("lr_decay_style", "cosine"), "cosine")
    decay = told.get("lr_decay_iters") or (told.get("lr_decay_samples") or 0) // batch
    if found["schedule"] == "wsd":
        decay = told.get("lr_wsd_decay_iters") or (told.get("lr_wsd_decay_samples") or 0) // batch
    if decay:
        found["decay_steps"] = decay
    warmup = told.get("lr_warmup_iters") or (told.get("lr_warmup_samples") or 0) // batch
    if told.get("lr_warmup_fraction"):
        warmup = int(told["lr_warmup_fraction"] * (decay or told.get("train_iters") or 0))
    found["warmup_steps"] = warmup
    return found


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
    if told.get("rampup_batch_size"):
        return f"its batch grows (--rampup-batch-size {told['rampup_batch_size']}), and ours stays the same"
    if told.get("lr_decay_style", "cosine") not in _DECAYS:
        return f"its learning rate decays by {told['lr_decay_style']}; expected one of {', '.join(_DECAYS)}"
    return None


def args_of(run: PretrainConfig, vocab_size: int, layout: dict[str, int], progress: dict[str, int]) -> Namespace:
    """What Megatron-LM compares its own arguments with, and takes over with --use-checkpoint-args.

    vocab_size: real tokens   layout, progress: as a manifest of ours has them
    """
    model, optimizer, batch = run.model, run.optimizer, run.train.global_batch
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=mcore.ffn_size(model),
        num_attention_heads=model.num_attention_heads,
        group_query_attention=groups != model.num_attention_heads,
        num_query_groups=groups,
        kv_channels=width,
        normalization=model.normalization,
        norm_epsilon=model.layernorm_epsilon,
        qk_layernorm=model.qk_layernorm,
        swiglu=model.gated_linear_unit,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        untie_embeddings_and_output_weights=not model.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        # Compared with the flag's default, which changes nothing for a model with rope.
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=model.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 8.0,
        squared_relu=False,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        max_position_embeddings=run.data.seq_length,
        seq_length=run.data.seq_length,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        padded_vocab_size=mcore.padded_vocab_size(vocab_size, model, layout["tp"]),
        bf16=run.train.precision == "bf16",
        fp16=False,
        seed=run.train.seed,
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        context_parallel_size=layout["cp"],
        world_size=layout["world_size"],
        data_parallel_size=layout["world_size"] // (layout["tp"] * layout["pp"] * layout["cp"]),
        sequence_parallel=run.parallel.sequence_parallel,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        global_batch_size=batch,
        micro_batch_size=run.train.micro_batch,
        train_iters=run.train.steps,
        iteration=progress["step"],
        consumed_train_samples=progress["consumed_samples"],
        consumed_valid_samples=0,
        skipped_train_samples=0,
        data_parallel_random_init=False,
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        # Our random state has another form; without this Megatron-LM would ask for its own.
        no_save_rng=True,
    )


def flags_beyond_args(run: PretrainConfig) -> str:
    """What Megatron-LM needs to be told of the model because its --use-checkpoint-args does not take it over."""
    model = run.model
    flags = [f"--norm-epsilon {model.layernorm_epsilon}"]
    if model.qk_layernorm:
        flags.append("--qk-layernorm")
    if model.rope_scaling_factor is not None:
        flags.append(f"--use-rope-scaling --rope-scaling-factor {model.rope_scaling_factor}")
    return " ".join(flags)
