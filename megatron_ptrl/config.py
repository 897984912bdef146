"""One frozen dataclass per concern; the flags, the YAML keys and `--print_config` come from the fields.

Sizes are in tokens or samples, times in seconds, loss terms in nats. A field named like one of Megatron-Core's
`TransformerConfig` means the same thing.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_ptrl.errors import InputError

DEFAULT_TOP_K = 100
DEFAULT_CHUNK_TOKENS = 1024


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class RewardShaping:
    """Rewards of next-token prediction as a one-step policy (arXiv:2512.22955). The defaults are cross entropy."""

    beta: float = 0.0
    """Exponent of the positive reward, > -1. Below 0 the distribution sharpens, above 0 it flattens."""
    lambda_head: float = 0.0
    """The paper's lambda-tilde: reward of the other tokens among the `top_k` most probable; > 0 keeps them alive."""
    lambda_tail: float = 0.0
    """The paper's lambda-hat: reward of the tokens outside the `top_k`. Below 0 pushes them down."""
    top_k: int = DEFAULT_TOP_K
    """How many of the most probable tokens form the head; ties with the last one are all in."""

    def __post_init__(self) -> None:
        for name in ("beta", "lambda_head", "lambda_tail"):
            value = getattr(self, name)
            _require(math.isfinite(value), f"{name} is {value}; expected a finite number")
        _require(
            self.beta > -1,
            f"beta is {self.beta}; expected > -1, because at -1 and below the reward of a token the model is already "
            "sure of does not tend to 1 (the paper's settings are -0.25, 0 and 0.5)",
        )
        _require(isinstance(self.top_k, int) and self.top_k >= 1, f"top_k is {self.top_k}; expected an integer >= 1")

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError for a `top_k` above the vocabulary; an untouched default is capped where no reward needs it."""
        fits = self.top_k <= vocab_size or (self.top_k == DEFAULT_TOP_K and not self.ranks_matter)
        _require(fits, f"top_k is {self.top_k}; expected at most the {vocab_size} tokens of the vocabulary")

    @property
    def ranks_matter(self) -> bool:
        """Whether the loss needs the top-k: not when head and tail have the same reward."""
        return self.lambda_head != self.lambda_tail


@dataclass(frozen=True, kw_only=True)
class LossConfig(RewardShaping):
    """The reward shaping, and which implementation computes it."""

    impl: Literal["reward_shaped", "linear", "megatron"] = "reward_shaped"
    """`linear` computes the same without the logits of all tokens, for one more product of the head's size; `megatron`
    is Megatron-Core's own vocabulary-parallel cross entropy, for comparison; it cannot shape."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    """Tokens whose logits `linear` holds at a time."""
    recompute_logits: bool = True
    """False: `linear` computes gradients in the forward, no logits twice; its weight's waits for the backward, fp32."""

    def __post_init__(self) -> None:
        RewardShaping.__post_init__(self)
        _require(self.chunk_tokens >= 1, f"loss.chunk_tokens is {self.chunk_tokens}; expected >= 1")
        _require(
            self.recompute_logits or self.impl == "linear",
            f"loss.recompute_logits is false with loss.impl {self.impl}; expected true, or loss.impl linear",
        )
        shaped = self.beta or self.lambda_head or self.lambda_tail
        _require(
            not (self.impl == "megatron" and shaped),
            "loss.impl is megatron, which computes plain cross entropy; expected beta, lambda_head and lambda_tail "
            "to be 0, or loss.impl reward_shaped",
        )

    @property
    def shaping(self) -> RewardShaping:
        """The part that the loss function takes."""
        return RewardShaping(self.beta, self.lambda_head, self.lambda_tail, self.top_k)


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
            _require(value is None or value >= 1, f"model.{name} is {value}; expected >= 1")
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"model.{name} is {value}; expected 0 to 1")
        _require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size {self.hidden_size} does not divide by model.num_attention_heads "
            f"{self.num_attention_heads}; set model.kv_channels or change one of them",
        )
        width = self.kv_channels or self.hidden_size // self.num_attention_heads
        _require(width % 2 == 0, f"a head is {width} wide; expected an even model.kv_channels, for rotary positions")


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
            _require(value is None or value >= 1, f"parallel.{name} is {value}; expected >= 1")
        _require(
            not self.overlap_param_gather or (self.distributed_optimizer and self.overlap_grad_reduce),
            "parallel.overlap_param_gather is true; expected distributed_optimizer and overlap_grad_reduce with it",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, in which order."""

    train: list[str | float] = field(default_factory=list)
    """Prefixes of `.bin/.idx` pairs, each optionally preceded by its weight: `[0.7, web, 0.3, code]`."""
    valid: list[str | float] | None = None
    """The same for held-out data; null to hold out a part of `train` by `split`."""
    split: str = "95,5"
    """Shares of the documents for training and validation, in file order, used when `valid` is null."""
    tokenizer: str | None = None
    """Tokenizer file; null for the one that was written beside the first training prefix."""
    eod_token: str | None = None
    """End-of-document token; null for the one in the first prefix's metadata, `<|endoftext|>` where it has none."""
    seq_length: int = 256
    """Tokens of a packed sequence."""
    isolate_documents: bool = False
    """Restart positions at every document, keep attention inside it, and leave its successor's first token out of the
    loss, which nothing in it can foretell."""
    cache: str | None = None
    """Folder for the sample index; null for `data_cache` in the run directory."""

    def __post_init__(self) -> None:
        _require(self.seq_length >= 1, f"data.seq_length is {self.seq_length}; expected >= 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW through Megatron-Core, and its learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd` is warm-up, stable, decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """Steps over which the rate decays: cosine counts from step 0, wsd counts back from its end; null for all of
    train.steps (cosine) or a tenth of them (wsd)."""
    wsd_decay: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Shape of the last part of `wsd`."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases are spared."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest norm of the gradient over all ranks; 0 for no clipping."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optimizer.lr is {self.lr}; expected > 0")
        _require(0 <= self.min_lr <= self.lr, f"optimizer.min_lr is {self.min_lr}; expected between 0 and lr {self.lr}")
        for name in ("warmup_steps", "weight_decay", "clip_grad"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} is {value}; expected >= 0")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}; expected 0 to 1")
        _require(self.adam_eps > 0, f"optimizer.adam_eps is {self.adam_eps}; expected > 0")
        steps = self.decay_steps
        _require(steps is None or steps >= 1, f"optimizer.decay_steps is {steps}; expected >= 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, how precisely."""

    steps: int = 100
    """Optimizer steps of the whole run."""
    global_batch: int = 16
    """Sequences of one step, over all data-parallel ranks and microbatches."""
    micro_batch: int = 4
    """Sequences of one forward pass on one data-parallel rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 main weights and gradients."""
    seed: int = 1234
    """Seed of the weights, the data order and dropout."""
    eval_every: int = 0
    """Steps between evaluations on the held-out data; 0 for only at the end."""
    eval_samples: int = 256
    """Held-out sequences of one evaluation, at most what one pass over them gives."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch"):
            _require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; expected >= 1")
        for name in ("eval_every", "eval_samples", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; expected >= 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, what to start from."""

    save_every: int = 0
    """Steps between checkpoints; 0 for only at the end and on SIGTERM or SIGUSR1."""
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Checkpoints at multiples of this step stay for ever; 0 for none."""
    load: str | None = None
    """Start a new run from the weights of this run directory or checkpoint; the run's own checkpoint goes first."""

    def __post_init__(self) -> None:
        _require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}; expected >= 1")
        for name in ("save_every", "keep_every"):
            _require(getattr(self, name) >= 0, f"checkpoint.{name} is {getattr(self, name)}; expected >= 0")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and stored of a run."""

    every: int = 10
    """Steps between progress lines where the output is not a terminal; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the `wandb` package and its key in the environment."""
    plots: bool = True
    """Draw plots/*.png at the end of the run."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"log.every is {self.every}; expected >= 1")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The short text generated from the checkpoint at the end of a run."""

    tokens: int = 0
    """How many tokens to generate; 0 for none."""
    prompt: str = ""
    """Text to continue; empty for the end-of-document token alone."""
    temperature: float = 0.8
    """0 takes the most probable token each time."""

    def __post_init__(self) -> None:
        for name in ("tokens", "temperature"):
            _require(getattr(self, name) >= 0, f"sample.{name} is {getattr(self, name)}; expected >= 0")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """`.bin/.idx` -> checkpoints, metrics and plots in `run_dir`."""

    run_dir: str = "runs/pretrain"
    """Everything of the run: config.yaml, metrics.jsonl, checkpoints/, plots/, tensorboard/, log.txt."""
    dry_run: bool = False
    """Print parameters, memory per rank, tokens, layout and schedule; train nothing."""
    dry_run_world_size: int | None = None
    """Ranks that the dry run assumes; null for those that were launched, at least one model-parallel group."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        ranks = self.dry_run_world_size
        _require(ranks is None or ranks >= 1, f"dry_run_world_size is {ranks}; expected >= 1")


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Raw text -> tokenizer, `.bin/.idx`."""

    input: list[str] = field(default_factory=list)
    """Files or folders: .txt (one document a file), .jsonl or .json (one a line), any of them .gz or .zst, .parquet."""
    output: str = ""
    """Prefix of the files to write: PREFIX.bin, PREFIX.idx, PREFIX.json, PREFIX.tokenizer.json."""
    text_field: str = "text"
    """Field of a JSONL line or Parquet column that holds the document."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json to use; null to train a byte-level BPE on the input."""
    vocab_size: int = 8192
    """Size of a newly trained vocabulary, special tokens included."""
    eod_token: str = "<|endoftext|>"
    """End-of-document token; it must exist in a given tokenizer."""
    append_eod: bool = True
    """Close every document with the end-of-document token."""
    workers: int = 1
    """Processes that tokenize, 1 for this one with the tokenizer's own threads; the output does not depend on it."""
    strict: bool = False
    """Stop at the first bad document instead of writing it to PREFIX.rejects.jsonl."""

    def __post_init__(self) -> None:
        _require(self.workers >= 1, f"workers is {self.workers}; expected >= 1")
        _require(self.vocab_size >= 257, f"vocab_size is {self.vocab_size}; expected >= 257 (256 bytes and the EOD)")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Run directories -> plots and one table, the runs side by side."""

    runs: list[str] = field(default_factory=list)
    """Run directories, each with its metrics.jsonl."""
    output: str | None = None
    """Folder for the plots and the table; null for plots/ in the run directory, when there is just one."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What is installed and built, what is missing, what that costs."""

    json: bool = False
    """Print one JSON object a line, for a script to read."""
