"""Layer specs: Transformer Engine's when it is installed, else Megatron-Core's own with torch attention and norm.

The local layers run on GPU and CPU alike. Every layer draws its initial weights from a seed of its own, so that a
model starts from the same weights under any pipeline split.
"""

import contextlib
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor

from megatron_ptrl.errors import InputError

if not hasattr(moe_utils, "te_general_gemm"):
    # Megatron-Core 0.16 asks for the name in its router and, without Transformer Engine, never defines it.
    moe_utils.te_general_gemm = None


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used: the package is there, and so is a GPU to run them."""
    return find_spec("transformer_engine") is not None and torch.version.cuda is not None


class ScaledDotProductAttention(torch.nn.Module):
    """Core attention by torch, with grouped queries, a KV cache and a per-row mask.

    query: (s, b, heads, d)   key, value: (s_total, b, groups, d), s_total > s when the keys include a cache
    attention_mask: bool, broadcastable to (b, heads, s, s_total), True where attention is forbidden; None is causal
    returns: (s, b, heads * d)
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = config.softmax_scale if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # (b, heads, s, d)
        s, s_total = query.shape[2], key.shape[2]
        causal = attention_mask is None and s == s_total
        if attention_mask is not None:
            allowed = ~attention_mask
        elif not causal:
            # torch aligns is_causal at the top left; the last query must see the last key.
            allowed = torch.ones(s, s_total, dtype=torch.bool, device=query.device).tril(s_total - s)
        else:
            allowed = None
        dropout = self.dropout if self.training else 0.0
        with _dropout_stream(dropout):
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context.permute(2, 0, 1, 3).reshape(s, context.shape[0], -1)


def _dropout_stream(dropout: float) -> Any:
    # Tensor-parallel ranks hold different heads, which must not share a dropout mask.
    return get_cuda_rng_tracker().fork() if dropout > 0 else contextlib.nullcontext()


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm; the mark on its weight makes Megatron sum its gradient over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SeededTransformerLayer(TransformerLayer):
    """Draws its weights from (seed, layer number), whichever stage builds it."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int = 1,
        vp_stage: int | None = None,
        **rest: Any,
    ) -> None:
        number = layer_number + get_transformer_layer_offset(config, vp_stage)
        torch.manual_seed(config.weight_seed * 1_000_003 + number)  # type: ignore[attr-defined]
        super().__init__(config, submodules, layer_number=layer_number, vp_stage=vp_stage, **rest)


def decoder_spec(config: TransformerConfig, *, use_te: bool, isolate_documents: bool, vp_stage: int | None) -> Any:
    """Spec of the layers that this pipeline stage and chunk build.

    Raises InputError for a norm that the local layers do not have.
    """
    if not use_te and config.normalization != "RMSNorm":
        raise InputError(
            f"model.normalization is {config.normalization}; the layers without Transformer Engine have RMSNorm only"
        )
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization=config.normalization, vp_stage=vp_stage
    )
    for layer in {id(layer): layer for layer in block.layer_specs}.values():
        _adapt_layer(layer, use_te=use_te, isolate_documents=isolate_documents)
    if not use_te:
        block.layer_norm = RMSNorm
    return block


def mtp_spec(config: TransformerConfig, block: Any, *, use_te: bool, vp_stage: int | None) -> Any:
    """Spec of the multi-token-prediction heads on this stage, or None."""
    if not config.mtp_num_layers:
        return None
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=use_te, vp_stage=vp_stage)
    if mtp is not None and not use_te:
        for layer in mtp.layer_specs:
            layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = RMSNorm
    return mtp


def _adapt_layer(layer: ModuleSpec, *, use_te: bool, isolate_documents: bool) -> None:
    layer.module = SeededTransformerLayer
    attention = layer.submodules.self_attention
    if isolate_documents:
        attention.params = {**attention.params, "attn_mask_type": AttnMaskType.arbitrary}
    if use_te:
        return
    attention.submodules.core_attention = ScaledDotProductAttention
    for holder in (layer.submodules, attention.submodules):
        for name, module in vars(holder).items():
            if name.endswith("layernorm") and module is not IdentityOp:
                setattr(holder, name, RMSNorm)
