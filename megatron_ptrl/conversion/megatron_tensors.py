"""The tensors of a dense GPT in Megatron's sharded checkpoints: those of our model, which another's need not be."""

from pathlib import Path
from typing import Any

from megatron_ptrl.config import ModelConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import mcore

# Beside the weights, of the same checkpoint.
_OPTIMIZER = "optimizer."


def tensors_of(model: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of the whole model, the layers on top of one another along the first dimension.

    rows: of the embedding, with the padding   A norm before a linear layer is in it, as Transformer Engine has it.
    """
    h, f = model.hidden_size, mcore.ffn_size(model)
    heads = model.num_attention_heads
    d, groups = model.kv_channels or h // heads, model.num_query_groups or heads
    qkv, up = (heads + 2 * groups) * d, 2 * f if model.gated_linear_unit else f
    inside = {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_qkv.weight": (qkv, h),
        "self_attention.linear_proj.weight": (h, heads * d),
        "mlp.linear_fc1.layer_norm_weight": (h,),
        "mlp.linear_fc1.weight": (up, h),
        "mlp.linear_fc2.weight": (h, f),
    }
    if model.qk_layernorm:
        inside |= {f"self_attention.{each}_layernorm.weight": (d,) for each in "qk"}
    biased = ["self_attention.linear_qkv"] if model.add_bias_linear or model.add_qkv_bias else []
    if model.add_bias_linear:
        biased += ["self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    inside |= {f"{name}.bias": inside[f"{name}.weight"][:1] for name in biased}
    outside: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (rows, h),
        "decoder.final_layernorm.weight": (h,),
    }
    if not model.share_embeddings_and_output_weights:
        outside["output_layer.weight"] = (rows, h)
    every = outside | {f"decoder.layers.{name}": (model.num_layers, *shape) for name, shape in inside.items()}
    if model.normalization == "LayerNorm":
        norms = {name: shape for name, shape in every.items() if "norm" in name}
        every |= {name.removesuffix("weight") + "bias": shape for name, shape in norms.items()}
    return every


def check_tensors(
    model: ModelConfig, rows: int, stored: dict[str, tuple[tuple[int, ...], Any]], path: Path, *, by: str
) -> None:
    """Raises InputError unless the checkpoint at `path` holds exactly the tensors of `model`, beside an optimizer's.

    stored: name -> (shape, type)   by: what of the checkpoint describes the model
    """
    expected = tensors_of(model, rows)
    for name, shape in expected.items():
        if name not in stored:
            raise InputError(f"{path} has no {name}, which the model of its {by} needs")
        if stored[name][0] != shape:
            raise InputError(f"{path}: {name} has shape {stored[name][0]}; expected {shape} by its {by}")
    for name in stored:
        if name not in expected and not name.startswith(_OPTIMIZER):
            raise InputError(f"{path} has {name}, which the model of its {by} does not have")
