"""Config -> Megatron-Core's process groups and model. The one place that knows its moving parts.

RunConfig --check_layout--> Layout --initialize--> process groups --build_model--> model chunks (DDP)
"""

import dataclasses
import math
import os
import typing
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_ptrl.config import LossConfig, ModelConfig, RunConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.losses.linear_head import linear_reward_shaped_cross_entropy_with_stats
from megatron_ptrl.losses.linear_head_sum import linear_reward_shaped_cross_entropy_sum_with_stats
from megatron_ptrl.losses.padding import bar_padding_
from megatron_ptrl.losses.reward_shaped_ce import TokenStats, reward_shaped_cross_entropy_with_stats
from megatron_ptrl.training import layers

_OWN_MODEL_FIELDS = {
    "share_embeddings_and_output_weights",
    "rotary_base",
    "rope_scaling_factor",
    "make_vocab_size_divisible_by",
}
_SET_ELSEWHERE = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "bf16",
    "fp16",
    "calculate_per_token_loss",
    "cross_entropy_loss_fusion",
    "cross_entropy_fusion_impl",
}
_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@dataclasses.dataclass
class SeededTransformerConfig(TransformerConfig):
    """TransformerConfig that also carries the seed from which every layer draws its weights."""

    weight_seed: int = 0


def transformer_fields() -> list[tuple[dataclasses.Field, Any]]:
    """Fields of TransformerConfig that YAML can hold and that nothing else in our config sets, with their types."""
    hints = typing.get_type_hints(TransformerConfig)
    found = []
    for field in dataclasses.fields(TransformerConfig):
        hint = hints[field.name]
        if field.name in _SET_ELSEWHERE or field.default is dataclasses.MISSING:
            continue
        if "Callable" in str(hint) or "dtype" in str(hint):
            continue
        # A union with one of Megatron-Core's classes is given in its plain form, which YAML parses.
        found.append((field, Any if "megatron" in str(hint) else hint))
    return found


class HeadInput(typing.NamedTuple):
    """What the logits would be computed from, in their place."""

    hidden: Tensor
    """(s, b, h), or (s/tp, b, h) under sequence parallelism."""
    weight: Tensor
    """(v/tp, h)"""


class RewardShapedGPTModel(GPTModel):
    """GPTModel whose language-model loss, and that of its multi-token-prediction heads, is the reward-shaped one.

    `token_stats` holds the by-products (s, b) of the last loss, for the logs; None with Megatron's own loss.

    With `loss.impl` linear and labels the output layer hands on a `HeadInput`. It is still called as a module, because
    Megatron's data parallelism hangs hooks on it that wait for its weight.

    With `loss.recompute_logits` false, a forward that records gradients and has a `loss_mask` returns the loss's sum
    over it, a scalar: whose gradient is known before the backward, as that of a loss per token is not.
    """

    def __init__(self, *args: Any, loss: LossConfig, num_tokens_in_vocabulary: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.num_tokens_in_vocabulary = num_tokens_in_vocabulary
        self.token_stats: TokenStats | None = None
        self._labels: Tensor | None = None
        self._loss_mask: Tensor | None = None
        if self.post_process and loss.impl == "linear":
            self._compute_logits = self.output_layer.forward
            self.output_layer.forward = self._head

    def forward(
        self, *args: Any, labels: Tensor | None = None, loss_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """As GPTModel: logits without labels, else the loss (b, s), or its sum over `loss_mask` (b, s)."""
        self._labels, self._loss_mask = labels, loss_mask
        return super().forward(*args, labels=labels, loss_mask=loss_mask, **kwargs)

    def _head(self, hidden: Tensor, weight: Tensor | None = None, **kwargs: Any) -> tuple[Tensor | HeadInput, None]:
        if self._labels is None:
            return self._compute_logits(hidden, weight=weight, **kwargs)
        return HeadInput(hidden, self.output_layer.weight if weight is None else weight), None

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor | HeadInput) -> Tensor:
        """labels (b, s) int64, logits (s, b, v/tp) or what they would come from -> loss (b, s) fp32, or its sum."""
        if self.loss.impl == "megatron":
            return super().compute_language_model_loss(labels, logits)
        target = labels.transpose(0, 1).contiguous()
        if not isinstance(logits, HeadInput):
            if self.loss.mask_padding:
                bar_padding_(logits, self._real_columns(logits.shape[-1]))
            loss, self.token_stats = reward_shaped_cross_entropy_with_stats(
                logits,
                target,
                self.loss.shaping,
                self.tp_group,
                # Nothing reads the logits after the backward of the loss, so the gradient may take their place.
                inplace_backward=torch.is_grad_enabled(),
                vocab_size=self.num_tokens_in_vocabulary,
            )
            return loss.transpose(0, 1).contiguous()
        arguments: dict[str, Any] = {
            "shaping": self.loss.shaping,
            "tp_group": self.tp_group,
            "sequence_parallel": self.output_layer.sequence_parallel,
            "vocab_size": self.num_tokens_in_vocabulary,
            "chunk_tokens": self.loss.chunk_tokens,
            "gradient_accumulation_fusion": self.config.gradient_accumulation_fusion,
        }
        # Prediction heads come with labels of their own making, and are weighted outside of this model.
        sums = not self.loss.recompute_logits and torch.is_grad_enabled() and labels is self._labels
        if sums and self._loss_mask is not None:
            token_weight = self._loss_mask.transpose(0, 1)
            total, _, self.token_stats = linear_reward_shaped_cross_entropy_sum_with_stats(
                *logits, target, token_weight, **arguments
            )
            return total
        loss, self.token_stats = linear_reward_shaped_cross_entropy_with_stats(
            *logits, target, **arguments, mask_padding=self.loss.mask_padding
        )
        return loss.transpose(0, 1).contiguous()

    def _real_columns(self, columns: int) -> int:
        """How many of this shard's columns are tokens."""
        return min(max(self.num_tokens_in_vocabulary - self.tp_group.rank() * columns, 0), columns)


def padded_vocab_size(vocab_size: int, model: ModelConfig, tp: int) -> int:
    """Smallest multiple of `make_vocab_size_divisible_by` and of tp that holds the vocabulary."""
    multiple = math.lcm(model.make_vocab_size_divisible_by, tp)
    return -(-vocab_size // multiple) * multiple


def ffn_size(model: ModelConfig) -> int:
    """Width of the MLP: as configured, else 8/3 of the hidden size rounded up to a multiple of 64."""
    return model.ffn_hidden_size or -(-model.hidden_size * 8 // 3 // 64) * 64


def transformer_config(config: RunConfig) -> SeededTransformerConfig:
    """Megatron-Core's config for this run. Raises InputError with Megatron-Core's reason where it refuses it."""
    model, parallel = config.model, config.parallel
    own = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig)}
    passed_on = {
        field.name: getattr(model, field.name)
        for field, _ in transformer_fields()
        if field.name not in own and getattr(model, field.name, field.default) != field.default
    }
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    settings = {
        **{name: value for name, value in own.items() if name not in _OWN_MODEL_FIELDS},
        **passed_on,
        "activation_func": _ACTIVATIONS[model.activation_func],
        "ffn_hidden_size": ffn_size(model),
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "sequence_parallel": parallel.sequence_parallel,
        "bf16": config.train.precision == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "calculate_per_token_loss": True,
        "weight_seed": config.train.seed,
    }
    if parallel.vpp:
        # With two stages both neighbours are the same rank, and batched sends would be taken for one another.
        settings = {**settings, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    if not layers.has_transformer_engine():
        # These default to fused kernels that only Transformer Engine or apex bring.
        settings = {"gradient_accumulation_fusion": False, "transformer_impl": "local", **settings}
    try:
        return SeededTransformerConfig(**settings)
    except (ValueError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"model: Megatron-Core refuses this configuration: {error}") from error


def join_ranks(*, timeout_minutes: int = 30) -> None:
    """Start torch.distributed, unless it runs: NCCL with CUDA, else gloo."""
    if not dist.is_initialized():
        rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        rendezvous: dict[str, Any] = {}
        if "MASTER_ADDR" not in os.environ:
            rendezvous["store"] = dist.HashStore()
        dist.init_process_group(
            backend="nccl" if torch.cuda.is_available() else "gloo",
            rank=rank,
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            timeout=timedelta(minutes=timeout_minutes),
            **rendezvous,
        )


def initialize(config: RunConfig, *, timeout_minutes: int = 30) -> None:
    """Start torch.distributed and Megatron's process groups; seed everything."""
    join_ranks(timeout_minutes=timeout_minutes)
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        parallel.vpp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        distributed_timeout_minutes=timeout_minutes,
    )
    seed(config)


def seed(config: RunConfig) -> None:
    """Seed dropout: alike on the ranks of a tensor-parallel group where Megatron wants it, apart across the others."""
    offset = 100 * parallel_state.get_pipeline_model_parallel_rank()
    offset += 10_000 * parallel_state.get_data_parallel_rank()
    torch.manual_seed(config.train.seed + offset)
    tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed + offset, force_reset_rng=True)


def shutdown() -> None:
    """Leave the process groups."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build_model(config: RunConfig, vocab_size: int) -> list[DistributedDataParallel]:
    """The model chunks of this rank, wrapped for mixed precision and data parallelism, on the rank's device.

    vocab_size: real tokens; the embedding is padded by `padded_vocab_size`.
    """
    transformer = transformer_config(config)
    return _distribute(config, transformer, _build_chunks(config, transformer, vocab_size))


def build_frozen_model(config: RunConfig, vocab_size: int) -> list[torch.nn.Module]:
    """As `build_model`, only to be run forward: in eval mode, without the buffers and hooks of data parallelism.

    Its random weights are meant to be replaced by a checkpoint's. Leaves the random state changed.
    """
    return [chunk.eval() for chunk in _build_chunks(config, transformer_config(config), vocab_size)]


def _build_chunks(config: RunConfig, transformer: SeededTransformerConfig, vocab_size: int) -> list[torch.nn.Module]:
    use_te = layers.has_transformer_engine()
    bare: list[torch.nn.Module] = []
    for stage in range(config.parallel.vpp or 1):
        vp_stage = stage if config.parallel.vpp else None
        block = layers.decoder_spec(
            transformer, use_te=use_te, isolate_documents=config.data.isolate_documents, vp_stage=vp_stage
        )
        torch.manual_seed(config.train.seed)
        model = RewardShapedGPTModel(
            transformer,
            block,
            vocab_size=padded_vocab_size(vocab_size, config.model, config.parallel.tp),
            max_sequence_length=config.data.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=config.model.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=config.model.rotary_base,
            rope_scaling=config.model.rope_scaling_factor is not None,
            rope_scaling_factor=config.model.rope_scaling_factor or 1.0,
            mtp_block_spec=layers.mtp_spec(transformer, block, use_te=use_te, vp_stage=vp_stage),
            vp_stage=vp_stage,
            loss=config.loss,
            num_tokens_in_vocabulary=vocab_size,
        )
        if torch.cuda.is_available():
            model.cuda(torch.cuda.current_device())
        bare.append(Float16Module(transformer, model) if transformer.bf16 else model)
    return bare


def _distribute(
    config: RunConfig, transformer: TransformerConfig, bare: list[torch.nn.Module]
) -> list[DistributedDataParallel]:
    parallel = config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    chunks = [
        DistributedDataParallel(transformer, settings, model, disable_bucketing=i > 0) for i, model in enumerate(bare)
    ]
    for chunk in chunks:
        chunk.broadcast_params()
    transformer.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        transformer.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
        transformer.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in chunks])
    if parallel.overlap_param_gather:
        transformer.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])
    seed(config)
    return chunks


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def gather_weights(chunks: list[DistributedDataParallel]) -> None:
    """Fetch the other ranks' share of the last update, which with overlap_param_gather the next forward would fetch."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrap(chunk: torch.nn.Module) -> RewardShapedGPTModel:
    """The GPT model inside the data-parallel and mixed-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return typing.cast(RewardShapedGPTModel, chunk)


def model_config(chunks: list[DistributedDataParallel]) -> TransformerConfig:
    """The config that the schedule reads, shared by all chunks."""
    return get_model_config(chunks[0])
