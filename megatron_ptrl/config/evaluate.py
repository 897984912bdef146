"""Measuring a checkpoint: on text, on problems, on next segments, on tasks of the evaluation harness."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ptrl.config.checks import require
from megatron_ptrl.config.judge import JudgeConfig
from megatron_ptrl.config.model import ParallelConfig
from megatron_ptrl.config.rollout_server import EngineConfig


@dataclass(frozen=True, kw_only=True)
class AnswersConfig(EngineConfig):
    """How prompts are answered. The defaults are those of arXiv:2509.19249 for mathematics."""

    samples: int = 64
    """Responses to each prompt: the n of avg@n and cons@n."""
    max_tokens: int | None = None
    """Longest response; a prompt must leave room for it in the window, else it is put aside. null for what the prompt
    leaves."""
    temperature: float = 0.6
    """Of the draw; 0 for the most probable token each time, with samples 1."""
    top_p: float = 0.95
    """Draw from the most probable tokens with this much mass."""
    max_unjudged: float = 0.1
    """The evaluation stops when a larger share of the responses of one round could not be judged."""
    judge_patience: float = 600.0
    """Seconds to wait for judgements once the last response is written; what is missing then counts as unjudged."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        require(self.samples >= 1, f"rollout.samples is {self.samples}; expected >= 1")
        most = self.max_tokens
        require(most is None or most >= 1, f"rollout.max_tokens is {most}; expected >= 1")
        require(self.temperature >= 0, f"rollout.temperature is {self.temperature}; expected >= 0")
        require(
            self.temperature > 0 or self.samples == 1,
            f"rollout.temperature is 0 with rollout.samples {self.samples}, which would all be the same; expected 1",
        )
        require(0 < self.top_p <= 1, f"rollout.top_p is {self.top_p}; expected above 0, at most 1")
        require(0 <= self.max_unjudged <= 1, f"rollout.max_unjudged is {self.max_unjudged}; expected 0 to 1")
        require(self.judge_patience > 0, f"rollout.judge_patience is {self.judge_patience}; expected > 0 seconds")


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """Tasks of lm-evaluation-harness; needs the extra `lm_eval`."""

    tasks: list[str] = field(default_factory=list)
    """Their names; those that the harness ships need its data sets."""
    include_path: str | None = None
    """Folder of task files (YAML) of one's own; then only these are known."""
    num_fewshot: int | None = None
    """Examples before each question; null for what the task says."""
    limit: int | None = None
    """Questions of each task, for a try; null for all."""
    max_gen_tokens: int = 256
    """Tokens of a response where the task says nothing."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Checkpoint -> perplexity and entropy, pass@k, avg@n, cons@n, next-segment accuracy, in one folder."""

    checkpoint: str = ""
    """A run directory, or one of its checkpoints."""
    output: str | None = None
    """Folder of results.json, results.md, samples.jsonl, rejects.jsonl; null for evaluations/step_N in the run
    directory, where `ptrl report --scaling` finds it."""
    data: list[str] = field(default_factory=list)
    """Prefixes of `.bin/.idx` pairs: perplexity and entropy."""
    prompts: list[str] = field(default_factory=list)
    """JSONL files of prompts as `ptrl segment` writes them (tasks asr, msr, rlvr), or of {"question", "answer"}, where
    a worked answer ends with `#### RESULT`."""
    problem_template: str = "{question}\n\nPut your final answer within \\boxed{}."
    """What is asked where a line has a question."""
    template: str | None = None
    """How conversations are written, as `data.template` of `ptrl sft`; null for that of the checkpoint's run."""
    k: list[int] = field(default_factory=lambda: [1, 8])
    """Of pass@k; one that is larger than rollout.samples is left out."""
    rollout: AnswersConfig = field(default_factory=AnswersConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    bootstrap: int = 1000
    """Resamplings of the problems behind a 95 % interval."""
    window: int | None = None
    """Tokens of a row, the longest context; null for the sequence length that the checkpoint was trained with.
    A longer one is not refused, as rotary positions have no end; memory goes with its square."""
    overlap: int | None = None
    """Tokens of context that a window of a longer document shares with the one before; null for half."""
    micro_batch: int = 8
    """Rows of one forward pass on one data-parallel rank."""
    chunk: int = 256
    """Rows of text, about, that a killed evaluation repeats on each data-parallel rank."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of weights and activations; null for that of the checkpoint's run."""
    tokenizer: str | None = None
    """Tokenizer file; null for the one beside the data, or that of the checkpoint's run."""
    seed: int = 1234
    """What responses and intervals are drawn with."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        require(self.window is None or self.window >= 2, f"window is {self.window}; expected >= 2")
        require(self.overlap is None or self.overlap >= 0, f"overlap is {self.overlap}; expected >= 0")
        for name in ("micro_batch", "chunk", "bootstrap"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected >= 1")
        require(self.seed >= 0, f"seed is {self.seed}; expected >= 0")
        require(bool(self.k) and min(self.k) >= 1, f"k is {self.k}; expected numbers >= 1")
        require(
            not self.prompts or max(self.k) <= self.rollout.samples or 1 in self.k,
            f"k is {self.k} with rollout.samples {self.rollout.samples}; expected at least one k that is not more",
        )
        require(
            "{question}" in self.problem_template,
            "problem_template has no {question}; expected the place where the question goes",
        )
        require(
            self.parallel.cp == 1,
            f"parallel.cp is {self.parallel.cp}; rows are not cut over ranks here: expected 1, use tp or pp",
        )
