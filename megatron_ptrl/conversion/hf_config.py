"""config.json of Llama, Qwen2 and Qwen3 -> the fields of our model. What it cannot say is refused by name.

The way back is `training.hf_export.hf_config`.
"""

import json
from pathlib import Path
from typing import Any

from megatron_ptrl.errors import InputError
from megatron_ptrl.training.hf_export import LLAMA3_SCALING

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# What these classes can have and our model cannot, and what they are without it.
_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

# Where config.json has none, in transformers; null is hidden_size / num_attention_heads there too.
_QWEN3_HEAD_DIM = 128


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder. Raises InputError for one that is missing or unreadable."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the folder of a Hugging Face model") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def model_fields_of(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """Fields of `ModelConfig` by name; `make_vocab_size_divisible_by`, which the tokenizer decides on, is not among
    them. Raises InputError, naming `where`, for a class other than `ARCHITECTURES` and settings that our model lacks.
    """
    name = (config.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        raise InputError(
            f"{where}: architecture {name} (model_type {config.get('model_type')}); expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    for key, neutral in _NEUTRAL.items():
        if config.get(key, neutral) != neutral:
            raise InputError(f"{where}: {key} is {config[key]}; expected {neutral}, our model has no other")
    sliding = [kind for kind in config.get("layer_types") or [] if kind != "full_attention"]
    if sliding:
        raise InputError(f"{where}: layer_types has {sliding[0]}; expected full_attention in every layer")
    base, factor = _rotary(config, where)
    hidden, heads = _size(config, "hidden_size", where), _size(config, "num_attention_heads", where)
    width = config.get("head_dim", _QWEN3_HEAD_DIM if name == "Qwen3ForCausalLM" else None) or hidden // heads
    if name == "Qwen2ForCausalLM" and width * heads != hidden:
        raise InputError(f"{where}: head_dim is {width}; expected hidden_size / num_attention_heads, as in Qwen2")
    return {
        "num_layers": _size(config, "num_hidden_layers", where),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "ffn_hidden_size": _size(config, "intermediate_size", where),
        "kv_channels": width if width * heads != hidden else None,
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "qk_layernorm": name == "Qwen3ForCausalLM",
        "add_bias_linear": _biases(config, name, where),
        "add_qkv_bias": name == "Qwen2ForCausalLM",
        "attention_dropout": config.get("attention_dropout") or 0.0,
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", False)),
        "rotary_base": base,
        "rope_scaling_factor": factor,
    }


def _size(config: dict[str, Any], key: str, where: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: {key} is {value}; expected a whole number above 0")
    return value


def _biases(config: dict[str, Any], name: str, where: Path) -> bool:
    attention, mlp = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
    if name == "LlamaForCausalLM" and attention == mlp:
        return attention
    if attention and name != "Qwen2ForCausalLM":
        raise InputError(
            f"{where}: attention_bias is true; expected false, or with it mlp_bias in a Llama: our model has biases in "
            "all linear layers or in none"
        )
    if mlp and name == "LlamaForCausalLM":
        raise InputError(f"{where}: mlp_bias is true without attention_bias; expected both or neither")
    return False


def _rotary(config: dict[str, Any], where: Path) -> tuple[int, float | None]:
    """(base, factor of Llama 3's scaling or None), from the form of transformers 5 or those before."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    if base != int(base):
        raise InputError(f"{where}: rope_theta is {base}; expected a whole number")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where}: partial_rotary_factor is {scaling['partial_rotary_factor']}; expected 1")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return int(base), None
    if kind != "llama3":
        raise InputError(f"{where}: rope_type is {kind}; expected default or llama3")
    for key, fixed in LLAMA3_SCALING.items():
        if scaling.get(key) != fixed:
            raise InputError(f"{where}: {key} is {scaling.get(key)}; expected {fixed:g}, which Megatron-Core takes")
    return int(base), float(scaling["factor"])
