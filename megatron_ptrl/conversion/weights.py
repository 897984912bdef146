"""The weights of a Llama- or Qwen-style model: what each is called, and how large it is, in both worlds.

One `Weight` of `hf_names`, in one layer, is one `Piece`: a place in Megatron's sharded checkpoint, and the tensors that
Hugging Face keeps instead. In the checkpoint the layers lie on top of one another in one tensor a weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ptrl.config import ModelConfig
from megatron_ptrl.conversion.torch_dist import Part
from megatron_ptrl.training import mcore
from megatron_ptrl.training.hf_names import IN_LAYER, OUTSIDE, Sizes, Weight, from_hf, part_names, to_hf

_LAYERS = "decoder.layers."
# Kept by name although empty: the linear layers, and norms of Transformer Engine, ask for theirs when a checkpoint is
# loaded. The norms that it fuses into a linear layer have none.
_EMPTY_IN_LAYER = (
    "self_attention.core_attention",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_EMPTY_OF_QK_NORM = ("self_attention.q_layernorm", "self_attention.k_layernorm")


@dataclass(frozen=True, slots=True)
class Piece:
    """One weight of the whole model."""

    weight: Weight
    layer: int | None
    """Counted from 0; None outside of the layers."""
    hf: dict[str, tuple[int, ...]]
    """Hugging Face's tensors and their shapes, in the order of `weight.parts`."""
    shape: tuple[int, ...]
    """Megatron's, on one tensor-parallel rank."""

    @property
    def key(self) -> str:
        """Megatron's name in a sharded checkpoint, without the layer."""
        within = self.weight.fused or self.weight.name
        return within if self.layer is None else _LAYERS + within

    def part(self, layers: int, dtype: torch.dtype) -> Part:
        """Its place in a checkpoint of so many layers."""
        if self.layer is None:
            return Part(self.key, self.shape, (0,) * len(self.shape), self.shape, dtype)
        offsets = (self.layer, *(0 for _ in self.shape))
        return Part(self.key, (layers, *self.shape), offsets, (1, *self.shape), dtype)


def sizes_of(model: ModelConfig, vocab_size: int) -> Sizes:
    """vocab_size: rows of Hugging Face's embedding."""
    groups = model.num_query_groups or model.num_attention_heads
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    return Sizes(model.num_attention_heads, groups, width, vocab_size)


def pieces(model: ModelConfig, sizes: Sizes, padded_vocab: int) -> list[Piece]:
    """All weights of a model, those outside of the layers first.

    sizes: what Hugging Face has   padded_vocab: rows of Megatron's embedding
    """
    shapes = _shapes(model, sizes)
    outside = [weight for weight in OUTSIDE if weight.parts[0] in shapes]
    inside = [weight for weight in IN_LAYER if weight.parts[0] in shapes]
    found = []
    for layer, weights in [(None, outside), *((layer, inside) for layer in range(model.num_layers))]:
        for weight in weights:
            parts = [shapes[part] for part in weight.parts]
            meta = [torch.empty(shape, device="meta") for shape in parts]
            shape = tuple(from_hf(weight, meta, sizes, 1, padded_vocab=padded_vocab)[0].shape)
            found.append(Piece(weight, layer, dict(zip(part_names(weight, layer), parts, strict=True)), shape))
    return found


def to_megatron(piece: Piece, parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """Hugging Face's tensors -> the piece, as `Piece.part` has it in the checkpoint."""
    (whole,) = from_hf(piece.weight, parts, sizes, 1, padded_vocab=piece.shape[0])
    return whole if piece.layer is None else whole[None]


def to_hugging_face(piece: Piece, stored: Tensor, sizes: Sizes) -> list[Tensor]:
    """The way back."""
    return to_hf(piece.weight, [stored if piece.layer is None else stored[0]], sizes)


def empty_objects(model: ModelConfig) -> list[tuple[str, None]]:
    """What a checkpoint holds by name beside its weights, for models of Megatron-Core's own layers and of Transformer
    Engine's.
    """
    layers = model.num_layers
    modules = (*_EMPTY_IN_LAYER, *(_EMPTY_OF_QK_NORM if model.qk_layernorm else ()))
    names = [f"{_LAYERS}{module}._extra_state/shard_{layer}_{layers}" for module in modules for layer in range(layers)]
    return [(name, None) for name in ["decoder.final_layernorm._extra_state/shard_0_1", *names]]


def _shapes(model: ModelConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Of the tensors that this model has, by Hugging Face's name without the layer."""
    h, f, d = model.hidden_size, mcore.ffn_size(model), sizes.head_width
    q, kv = sizes.heads * d, sizes.groups * d
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes.vocab_size, h),
        "model.norm.weight": (h,),
        "input_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
        "post_attention_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (f, h),
        "mlp.up_proj.weight": (f, h),
        "mlp.down_proj.weight": (h, f),
    }
    if not model.share_embeddings_and_output_weights:
        shapes["lm_head.weight"] = (sizes.vocab_size, h)
    if model.qk_layernorm:
        shapes |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    biased = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") if model.add_qkv_bias else ()
    if model.add_bias_linear:
        biased = (*biased, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        biased = (*biased, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return shapes | {f"{part}.bias": shapes[f"{part}.weight"][:1] for part in biased}
