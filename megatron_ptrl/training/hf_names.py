"""One table: Megatron-Core's weights, cut over tensor-parallel ranks, and Hugging Face's for Llama and Qwen.

    to_hf: a weight's shards in the order of the ranks -> the tensors that Hugging Face keeps instead of it
    from_hf: the way back

Kinds of a weight, by how it is cut and packed:
    whole    the same on every rank
    columns  cut along its second dimension
    words    a row for each token, cut along the rows, padded at the end
    groups   cut along the rows; for each key/value head its queries, its key, its value
    halves   cut along the rows; each rank has its part of the gate, then its part of the up projection
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sizes:
    """What packing and padding hang on."""

    heads: int
    groups: int
    head_width: int
    vocab_size: int
    """Real tokens."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One line of the table."""

    name: str
    """Megatron's; within its layer for a weight of a layer."""
    parts: tuple[str, ...]
    """Hugging Face's."""
    kind: str
    fused: str | None = None
    """Its name where Transformer Engine keeps it in the linear layer that follows it."""


OUTSIDE = (
    Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "words"),
    Weight("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"),
    Weight("output_layer.weight", ("lm_head.weight",), "words"),
)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
IN_LAYER = (
    Weight(
        "input_layernorm.weight", ("input_layernorm.weight",), "whole", "self_attention.linear_qkv.layer_norm_weight"
    ),
    Weight("self_attention.linear_qkv.weight", tuple(f"{part}.weight" for part in _QKV), "groups"),
    Weight("self_attention.linear_qkv.bias", tuple(f"{part}.bias" for part in _QKV), "groups"),
    Weight("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), "whole"),
    Weight("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), "whole"),
    Weight("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "columns"),
    Weight("self_attention.linear_proj.bias", ("self_attn.o_proj.bias",), "whole"),
    Weight(
        "pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "whole", "mlp.linear_fc1.layer_norm_weight"
    ),
    Weight("mlp.linear_fc1.weight", tuple(f"{part}.weight" for part in _GATE_UP), "halves"),
    Weight("mlp.linear_fc1.bias", tuple(f"{part}.bias" for part in _GATE_UP), "halves"),
    Weight("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "columns"),
    Weight("mlp.linear_fc2.bias", ("mlp.down_proj.bias",), "whole"),
)
_BY_NAME = {weight.name: weight for weight in OUTSIDE + IN_LAYER} | {
    weight.fused: weight for weight in IN_LAYER if weight.fused
}
_LAYER = "decoder.layers."


def find(name: str) -> tuple[Weight, int | None] | None:
    """The line of a parameter of Megatron's, and the layer that its name has; None for one without a counterpart."""
    layer, within = None, name
    if name.startswith(_LAYER):
        number, _, within = name[len(_LAYER) :].partition(".")
        layer = int(number)
    weight = _BY_NAME.get(within)
    return None if weight is None or (weight in IN_LAYER) != (layer is not None) else (weight, layer)


def part_names(weight: Weight, layer: int | None) -> list[str]:
    """Hugging Face's names of a weight of layer `layer`, counted over the whole model from 0."""
    return [part if layer is None else f"model.layers.{layer}.{part}" for part in weight.parts]


def to_hf(weight: Weight, shards: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    """shards: those of all tensor-parallel ranks in their order, or one for a `whole` weight -> a tensor for each part.

    Works on meta tensors too, for the shapes alone.
    """
    if weight.kind == "whole":
        return [shards[0]]
    if weight.kind == "halves":
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]
    together = torch.cat(list(shards), 1 if weight.kind == "columns" else 0)
    if weight.kind == "columns":
        return [together]
    if weight.kind == "words":
        return [together[: sizes.vocab_size]]
    rest = together.shape[1:]
    queries = sizes.heads // sizes.groups
    packed = together.view(sizes.groups, queries + 2, sizes.head_width, *rest)
    return [part.reshape(-1, *rest) for part in packed.split([queries, 1, 1], dim=1)]


def from_hf(weight: Weight, parts: Sequence[Tensor], sizes: Sizes, tp: int, *, padded_vocab: int) -> list[Tensor]:
    """The shards of `tp` ranks, in their order, from what `to_hf` gives; the padding of the vocabulary is 0."""
    if weight.kind == "whole":
        return [parts[0]] * tp
    if weight.kind == "columns":
        return list(parts[0].chunk(tp, 1))
    if weight.kind == "halves":
        return [torch.cat(pair) for pair in zip(*(part.chunk(tp) for part in parts), strict=True)]
    if weight.kind == "words":
        padding = parts[0].new_zeros(padded_vocab - parts[0].shape[0], *parts[0].shape[1:])
        return list(torch.cat([parts[0], padding]).chunk(tp))
    rest = parts[0].shape[1:]
    packed = torch.cat([part.view(sizes.groups, -1, sizes.head_width, *rest) for part in parts], 1)
    return list(packed.reshape(-1, *rest).chunk(tp))
