"""Pre-training: which documents, how they are held out, the sample at the end."""

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_ptrl.config.checks import require
from megatron_ptrl.config.remit import RemitConfig
from megatron_ptrl.config.run import PaceConfig, RowsConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowsConfig):
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
    cache: str | None = None
    """Folder for the sample index; null for `data_cache` in the run directory."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PaceConfig):
    """How long, how much at once, how precisely."""

    global_batch: int = 16
    """Sequences of one step, over all data-parallel ranks and microbatches."""
    eval_every: int = 0
    """Steps between evaluations on the held-out data; 0 for only at the end."""
    eval_samples: int = 256
    """Held-out sequences of one evaluation, at most what one pass over them gives."""

    def __post_init__(self) -> None:
        PaceConfig.__post_init__(self)
        require(self.global_batch >= 1, f"train.global_batch is {self.global_batch}; expected >= 1")
        for name in ("eval_every", "eval_samples"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; expected >= 0")


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
            require(getattr(self, name) >= 0, f"sample.{name} is {getattr(self, name)}; expected >= 0")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """`.bin/.idx` -> checkpoints, metrics and plots in `run_dir`."""

    ordered_by_steps: ClassVar[bool] = True

    run_dir: str = "runs/pretrain"
    """Everything of the run: config.yaml, metrics.jsonl, log.txt, checkpoints/, plots/, tensorboard/, data_cache/."""
    data: DataConfig = field(default_factory=DataConfig)
    remit: RemitConfig = field(default_factory=RemitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        require(
            self.remit.weighting == "none" or self.loss.impl != "megatron",
            f"remit.weighting is {self.remit.weighting} with loss.impl megatron, which gives no log-probabilities; "
            "set loss.impl to reward_shaped or linear",
        )
        require(
            self.remit.weighting == "none" or self.loss.recompute_logits,
            f"remit.weighting is {self.remit.weighting} with loss.recompute_logits false, but the weights follow from "
            "the forward; set loss.recompute_logits to true",
        )

    @property
    def rows_per_step(self) -> int:
        return self.train.global_batch
