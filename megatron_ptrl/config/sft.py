"""Supervised fine-tuning: which conversations, how often, how they are written for the model."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megatron_ptrl.config.checks import require
from megatron_ptrl.config.pretrain import TrainConfig
from megatron_ptrl.config.run import RowsConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class ChatDataConfig(RowsConfig):
    """Which conversations, and how they become rows of tokens."""

    train: list[str] = field(default_factory=list)
    """JSONL files, and folders of them: messages, prompt and response, or instruction, input and output."""
    valid: list[str] | None = None
    """The same for held-out conversations; null for none."""
    template: str = "plain"
    """How turns are written: `plain`, or the chat template of a Hugging Face model, its tokenizer_config.json or
    .jinja file. Then data.eod_token has to be the token that the template ends a response with."""
    turns: Literal["together", "apart"] = "together"
    """`together`: all responses of a conversation are trained on in one row. `apart`: each in its own, behind what the
    template writes before it at that moment; for templates that drop the thinking of earlier turns, as Qwen3's does."""
    too_long: Literal["reject", "cut"] = "reject"
    """What becomes of a conversation that does not fit into a row: put aside, or its end cut off; both are counted."""
    isolate_documents: bool = True
    """Conversations that share a row do not see one another; there is no other way here."""
    cache: str | None = None
    """Folder for the tokenized conversations; null for `data_cache` in the run directory."""

    def __post_init__(self) -> None:
        RowsConfig.__post_init__(self)
        require(
            self.isolate_documents,
            "data.isolate_documents is false; expected true, because several conversations share a row",
        )


@dataclass(frozen=True, kw_only=True)
class SFTTrainConfig(TrainConfig):
    """How long, how much at once, how precisely."""

    _LEAST_STEPS: ClassVar[int] = 0

    epochs: int = 3
    """How often each conversation is seen, unless steps says otherwise."""
    steps: int = 0
    """Optimizer steps of the whole run; 0 for as many as the epochs have rows for. The rows that the last step lacks
    are empty."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require(self.epochs >= 1, f"train.epochs is {self.epochs}; expected >= 1")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Conversations (JSONL) -> a model that answers: cold start of RLPT (arXiv:2509.19249), in `run_dir`."""

    run_dir: str = "runs/sft"
    """Everything of the run: config.yaml, metrics.jsonl, log.txt, checkpoints/, plots/, data_cache/ with rejects."""
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    train: SFTTrainConfig = field(default_factory=SFTTrainConfig)

    @property
    def rows_per_step(self) -> int:
        return self.train.global_batch
