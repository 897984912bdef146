"""Scoring data with a reference, and choosing documents by two scores."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ptrl.config.checks import require
from megatron_ptrl.config.model import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Checkpoint + `.bin/.idx` -> the log-probability of every token, as a side-car of the data."""

    checkpoint: str = ""
    """The reference: a run directory of `ptrl pretrain`, or one of its checkpoints."""
    data: str = ""
    """Prefix of the `.bin/.idx` pair to score."""
    output: str | None = None
    """Prefix of the side-car; null for the data's with `.logprob` behind it."""
    storage: Literal["bf16", "fp32"] = "bf16"
    """Bytes of a log-probability: 2, rounded by up to 0.4 %, or 4."""
    window: int | None = None
    """Tokens of a packed row, the longest context; null for the sequence length that the reference was trained with.
    A longer one is not refused, as rotary positions have no end; memory goes with its square."""
    overlap: int | None = None
    """Tokens of context that a window of a document longer than one shares with the one before; null for half."""
    micro_batch: int = 8
    """Rows of one forward pass on one data-parallel rank."""
    chunk: int = 256
    """Rows of one file of results, about: what a killed run repeats on each data-parallel rank."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of weights and activations; null for that of the reference's run."""
    tokenizer: str | None = None
    """Tokenizer file of the data; null for the one beside them."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        require(self.window is None or self.window >= 2, f"window is {self.window}; expected >= 2")
        require(self.overlap is None or self.overlap >= 0, f"overlap is {self.overlap}; expected >= 0")
        for name in ("micro_batch", "chunk"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected >= 1")
        require(
            self.parallel.cp == 1,
            f"parallel.cp is {self.parallel.cp}; scoring does not cut rows over ranks: expected 1, use tp or pp",
        )


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """The documents that a reference prefers most to a base model (MiniPLM's difference sampling)."""

    data: str = ""
    """Prefix of the `.bin/.idx` pair to choose from."""
    reference: str = ""
    """Side-car of the data by the reference."""
    base: str = ""
    """Side-car of the same data by the base model."""
    keep: float = 0.8
    """Share of the documents to keep."""
    output: str = ""
    """Prefix of the files to write."""

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, f"keep is {self.keep}; expected above 0, up to 1")
