"""Layer specs: Transformer Engine's when it is installed, else Megatron-Core's own with torch attention and norm.

The local layers run on GPU and CPU alike. Every layer draws its initial weights from a seed of its own, so that a
model starts from the same weights under any pipeline split.
"""

import contextlib
import typing
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor

from megatron_ptrl.config import RunConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.training.kv_cache import CachedSelfAttention

if not hasattr(moe_utils, "te_general_gemm"):
    # Megatron-Core 0.16 asks for the name in its router and, without Transformer Engine, never defines it.
    moe_utils.te_general_gemm = None


# Settings of TransformerConfig that only other attentions and norms than the local ones read.
_WITHOUT_TRANSFORMER_ENGINE = {
    "window_size": None,
    "window_attn_skip_freq": None,
    "softmax_type": "vanilla",
    "layernorm_zero_centered_gamma": False,
    "fp8": None,
    "fp4": None,
}


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used: the package imports, and there is a GPU to run them."""
    return HAVE_TE and torch.cuda.is_available()


def check_supported(config: RunConfig) -> None:
    """InputError where the layers that this machine has cannot do what the config asks."""
    if getattr(config.model, "multi_latent_attention", False):
        raise InputError("model.multi_latent_attention needs another model than this GPT; leave it false")
    if has_transformer_engine():
        if config.parallel.cp > 1 and config.data.isolate_documents:
            raise InputError(
                f"parallel.cp {config.parallel.cp} with data.isolate_documents: Transformer Engine takes no mask "
                "there; use one of the two"
            )
        grouped = getattr(config.model, "moe_grouped_gemm", False) and config.model.use_cpu_initialization
        if grouped and config.parallel.ep > 1:
            raise InputError(
                "model.moe_grouped_gemm with parallel.ep > 1 gives the experts of all ranks the same weights to begin "
                "with; set model.use_cpu_initialization false"
            )
        return
    for name, neutral in _WITHOUT_TRANSFORMER_ENGINE.items():
        value = getattr(config.model, name, neutral)
        if value != neutral:
            raise InputError(
                f"model.{name} is {value}, which the layers without Transformer Engine do not have; "
                "pip install megatron-ptrl[te], or leave it"
            )
    if config.model.normalization != "RMSNorm":
        raise InputError(
            f"model.normalization is {config.model.normalization}; the layers without Transformer Engine have RMSNorm "
            "only; pip install megatron-ptrl[te], or set RMSNorm"
        )


class ScaledDotProductAttention(torch.nn.Module):
    """Core attention by torch, with grouped queries, a KV cache, a per-row mask and context parallelism.

    query: (s, b, heads, d)   key, value: (s_total, b, groups, d), s_total > s when the keys include a cache
    attention_mask: bool, broadcastable to (b, heads, s, s_total), True where attention is forbidden; None is causal
    returns: (s, b, heads * d)

    Context parallel ranks hold the chunks r and 2 cp - 1 - r of a sequence and gather the keys and values of all; the
    mask then has this rank's rows and all columns in the order of the text. Cost: two all-gathers of s b groups d
    forward, two reduce-scatters backward, and the keys of the whole sequence in memory; no ring.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = config.softmax_scale if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        if self.cp_group is not None:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        s, s_total = query.shape[0], key.shape[0]
        allowed = None if attention_mask is None else ~attention_mask
        if self.cp_group is not None:
            here, everywhere = _positions(s, self.cp_group, query.device)
            causal = everywhere <= here[:, None]
            allowed = causal if allowed is None else allowed[..., everywhere]
        elif allowed is None and s < s_total:
            # torch aligns is_causal at the top left; the last query must see the last key.
            allowed = torch.ones(s, s_total, dtype=torch.bool, device=query.device).tril(s_total - s)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # (b, heads, s, d)
        dropout = self.dropout if self.training else 0.0
        with _dropout_stream(dropout):
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=allowed is None,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context.permute(2, 0, 1, 3).reshape(s, context.shape[0], -1)


def _positions(s: int, cp_group: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where in the text this rank's queries are, and the gathered keys of all ranks in their order: (s,), (s cp,)."""
    cp, half = cp_group.size(), torch.arange(s // 2, device=device)
    chunks = torch.tensor([[rank, 2 * cp - 1 - rank] for rank in range(cp)], device=device)
    everywhere = (chunks[..., None] * (s // 2) + half).view(cp, s)
    return everywhere[cp_group.rank()], everywhere.view(-1)


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


class SeededExperts(SequentialMLP):
    """Draws the weights of all experts in turn and keeps those of this rank: the same ones however they are spread.

    Without that every expert-parallel rank would give its experts the weights of the first rank's.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, *rest: Any, **options: Any) -> None:
        rank = parallel_state.get_expert_model_parallel_rank()
        after = parallel_state.get_expert_model_parallel_world_size() - rank - 1
        _draw_experts(rank * num_local_experts, config)
        super().__init__(num_local_experts, config, *rest, **options)
        _draw_experts(after * num_local_experts, config)


def _draw_experts(count: int, config: TransformerConfig) -> None:
    """Move the generator on by the weights of `count` experts."""
    if not config.use_cpu_initialization:
        return
    ffn = typing.cast(int, config.moe_ffn_hidden_size)
    up = 2 * ffn if config.gated_linear_unit else ffn
    for _ in range(count):
        for shape in ((up, config.hidden_size), (config.hidden_size, ffn)):
            torch.empty(shape, dtype=torch.float32, device="cpu").normal_()


def decoder_spec(config: TransformerConfig, *, use_te: bool, isolate_documents: bool, vp_stage: int | None) -> Any:
    """Spec of the layers that this pipeline stage and chunk build."""
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
    experts = getattr(layer.submodules.mlp.submodules, "experts", None)
    if experts is not None and experts.module is SequentialMLP:
        experts.module = SeededExperts
    attention = layer.submodules.self_attention
    if attention.module is SelfAttention:
        attention.module = CachedSelfAttention
    if isolate_documents:
        attention.params = {**attention.params, "attn_mask_type": AttnMaskType.arbitrary}
    if use_te:
        return
    attention.submodules.core_attention = ScaledDotProductAttention
    for holder in (layer.submodules, attention.submodules):
        for name, module in vars(holder).items():
            if name.endswith("layernorm") and module is not IdentityOp:
                setattr(holder, name, RMSNorm)
