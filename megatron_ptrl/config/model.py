"""What the model is, and how the ranks share it."""

from dataclasses import dataclass
from typing import Literal

from megatron_ptrl.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama- or Qwen-style GPT. Any other field of Megatron-Core's `TransformerConfig` can be set by its name."""

    num_layers: int = 4
    """Transformer layers in the whole model."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_attention_heads: int = 8
    """Query heads."""
    num_query_groups: int | None = 4
    """Key/value heads (grouped-query attention); null for one per query head."""
    ffn_hidden_size: int | None = None
    """Width of the SwiGLU; null for 8/3 of hidden_size, rounded up to a multiple of 64."""
    kv_channels: int | None = None
    """Width of a head; null for hidden_size / num_attention_heads."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of norm. The layers without Transformer Engine know RMSNorm only."""
    layernorm_epsilon: float = 1e-6
    """Added to the mean square in the norm."""
    qk_layernorm: bool = True
    """Normalise queries and keys per head, as Qwen3 does."""
    gated_linear_unit: bool = True
    """SwiGLU instead of one up projection."""
    add_bias_linear: bool = False
    """Biases in the linear layers."""
    add_qkv_bias: bool = False
    """A bias in the query/key/value projection only, as Qwen2 has."""
    hidden_dropout: float = 0.0
    """Dropout of the residual branches and of the embedding."""
    attention_dropout: float = 0.0
    """Dropout of the attention probabilities."""
    init_method_std: float = 0.02
    """Deviation of the initial weights."""
    share_embeddings_and_output_weights: bool = True
    """One matrix for the embedding and the head (tied), or two."""
    rotary_base: int = 10000
    """Base of the rotary position embedding."""
    rope_scaling_factor: float | None = None
    """Factor of Llama 3's scaling of rotary positions beyond 8192 tokens (8 in Llama 3.1, 32 in 3.2); null for none."""
    make_vocab_size_divisible_by: int = 64
    """The vocabulary is padded to a multiple of this and of the tensor-parallel size."""
    activation_func: Literal["silu", "gelu", "relu"] = "silu"
    """Activation of the MLP."""
    use_cpu_initialization: bool = True
    """Draw the initial weights on the CPU, the same under every layout; false is faster for many billions."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "num_attention_heads", "make_vocab_size_divisible_by")
        for name in (*sizes, "num_query_groups", "ffn_hidden_size", "kv_channels"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name} is {value}; expected >= 1")
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"model.{name} is {value}; expected 0 to 1")
        factor = self.rope_scaling_factor
        require(factor is None or factor >= 1, f"model.rope_scaling_factor is {factor}; expected >= 1")
        require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size {self.hidden_size} does not divide by model.num_attention_heads "
            f"{self.num_attention_heads}; set model.kv_channels or change one of them",
        )
        width = self.kv_channels or self.hidden_size // self.num_attention_heads
        require(width % 2 == 0, f"a head is {width} wide; expected an even model.kv_channels, for rotary positions")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the model and the batch. What is left of the world size is data parallel."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size."""
    vpp: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); null for one."""
    cp: int = 1
    """Context-parallel size."""
    ep: int = 1
    """Expert-parallel size (mixture of experts)."""
    etp: int | None = None
    """Tensor-parallel size of the experts; null for tp."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel regions along the sequence; needs tp > 1."""
    distributed_optimizer: bool = True
    """Shard the optimizer's state and the fp32 weights over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward runs (GPU)."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward runs (GPU, distributed optimizer)."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "ep", "etp", "vpp"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"parallel.{name} is {value}; expected >= 1")
        require(
            not self.overlap_param_gather or (self.distributed_optimizer and self.overlap_grad_reduce),
            "parallel.overlap_param_gather is true; expected distributed_optimizer and overlap_grad_reduce with it",
        )
