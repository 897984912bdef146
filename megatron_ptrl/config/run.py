"""What every training run has: how text becomes rows, the optimizer, the pace, what is kept and shown."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megatron_ptrl.config.checks import require
from megatron_ptrl.config.loss import LossConfig
from megatron_ptrl.config.model import ModelConfig, ParallelConfig


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """How text becomes rows of tokens."""

    tokenizer: str | None = None
    """Tokenizer file, a Hugging Face tokenizer.json."""
    eod_token: str | None = None
    """End-of-document token; null for `<|endoftext|>`."""
    seq_length: int = 256
    """Tokens of a packed sequence."""
    isolate_documents: bool = False
    """Restart positions at every document, keep attention inside it, and leave its successor's first token out of the
    loss, which nothing in it can foretell."""

    def __post_init__(self) -> None:
        require(self.seq_length >= 1, f"data.seq_length is {self.seq_length}; expected >= 1")


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
        require(self.lr > 0, f"optimizer.lr is {self.lr}; expected > 0")
        require(0 <= self.min_lr <= self.lr, f"optimizer.min_lr is {self.min_lr}; expected between 0 and lr {self.lr}")
        for name in ("warmup_steps", "weight_decay", "clip_grad"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name} is {value}; expected >= 0")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} is {value}; expected 0 to 1")
        require(self.adam_eps > 0, f"optimizer.adam_eps is {self.adam_eps}; expected > 0")
        require(
            self.decay_steps is None or self.decay_steps >= 1,
            f"optimizer.decay_steps is {self.decay_steps}; expected >= 1",
        )


@dataclass(frozen=True, kw_only=True)
class PaceConfig:
    """How long, how much at once, how precisely."""

    _LEAST_STEPS: ClassVar[int] = 1

    steps: int = 100
    """Optimizer steps of the whole run."""
    micro_batch: int = 4
    """Sequences of one forward pass on one data-parallel rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 main weights and gradients."""
    seed: int = 1234
    """Seed of the weights, the data order and dropout."""

    def __post_init__(self) -> None:
        for name, least in (("steps", self._LEAST_STEPS), ("micro_batch", 1)):
            require(getattr(self, name) >= least, f"train.{name} is {getattr(self, name)}; expected >= {least}")
        require(self.seed >= 0, f"train.seed is {self.seed}; expected >= 0")


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
        require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}; expected >= 1")
        for name in ("save_every", "keep_every"):
            require(getattr(self, name) >= 0, f"checkpoint.{name} is {getattr(self, name)}; expected >= 0")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and stored of a run."""

    every: int = 10
    """Steps between progress lines where the output is not a terminal; metrics.jsonl has every step.
    With remit.weighting token_weights.jsonl gets two rows of these steps, and of the last one."""
    tensorboard: bool = True
    """Write TensorBoard events into the run directory."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the `wandb` package and its key in the environment."""
    plots: bool = True
    """Draw plots/*.png at the end of the run."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every is {self.every}; expected >= 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run; its stage adds what the data are."""

    run_dir: str = "runs/run"
    """Everything of the run: config.yaml, metrics.jsonl, log.txt, checkpoints/, plots/, tensorboard/."""
    dry_run: bool = False
    """Print parameters, memory per rank, tokens, layout and schedule; train nothing."""
    dry_run_world_size: int | None = None
    """Ranks that the dry run assumes; null for those that were launched, at least one model-parallel group."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: RowsConfig = field(default_factory=RowsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: PaceConfig = field(default_factory=PaceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        ranks = self.dry_run_world_size
        require(ranks is None or ranks >= 1, f"dry_run_world_size is {ranks}; expected >= 1")

    @property
    def rows_per_step(self) -> int | None:
        """Rows of a step over all ranks; None where that differs from step to step."""
        return None
