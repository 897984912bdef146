"""Megatron-LM's arguments, as its checkpoints hold them -> our settings. What our model is not is refused by name."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_ptrl.conversion.megatron_optimizer import isolation, optimizer_settings
from megatron_ptrl.errors import InputError

# Arguments that change the model and that ours does not have, and what they are without it; absent in old versions.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
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
            **_of_megatron_core(told),
        },
        "data": {"seq_length": args.seq_length, **_split(told), **_isolated(told)},
        "train": {
            "precision": "bf16" if told.get("bf16") else "fp32",
            "global_batch": args.global_batch_size,
            "micro_batch": told.get("micro_batch_size") or 1,
            "steps": told.get("train_iters") or 1,
            "seed": told.get("seed", 1234),
        },
        "optimizer": optimizer_settings(told, args.global_batch_size),
        "parallel": {
            "tp": told.get("tensor_model_parallel_size", 1),
            "pp": told.get("pipeline_model_parallel_size", 1),
            "sequence_parallel": bool(told.get("sequence_parallel")),
            "distributed_optimizer": bool(told.get("use_distributed_optimizer")),
        },
    }


def _of_megatron_core(told: dict[str, Any]) -> dict[str, bool]:
    """Fields that our model has from `TransformerConfig`, where they are not as by default."""
    # Fused with its bias, Megatron-Core's GELU is the approximation by tanh; alone it is the one by erf.
    has_tanh = not told.get("swiglu") and told.get("add_bias_linear", True) and told.get("bias_gelu_fusion", True)
    fields = {"bias_activation_fusion": has_tanh, "rotary_interleaved": told.get("rotary_interleaved")}
    return {name: True for name, value in fields.items() if value}


def _isolated(told: dict[str, Any]) -> dict[str, bool]:
    return {"isolate_documents": True} if all(isolation(told).values()) else {}


def _split(told: dict[str, Any]) -> dict[str, str]:
    """Which documents were trained on decides their order, too. Megatron-LM takes any separators between the shares."""
    if any(told.get(name) for name in ("data_path", "data_args_path")) and told.get("split"):
        return {"split": ",".join(re.findall(r"[.0-9]+", told["split"]))}
    if any(told.get(name) for name in ("train_data_path", "per_split_data_args_path")):
        return {"split": "1"}
    return {}
