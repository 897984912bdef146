"""Reinforcement on prompts: where they come from, how they are answered, how the policy learns from it."""

from dataclasses import dataclass, field

from megatron_ptrl.config.checks import require
from megatron_ptrl.config.judge import JudgeConfig
from megatron_ptrl.config.loss import LossConfig
from megatron_ptrl.config.policy import PolicyLossConfig
from megatron_ptrl.config.rollout_server import EngineConfig
from megatron_ptrl.config.run import RowsConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Which prompts, in which order."""

    files: list[str | float] = field(default_factory=list)
    """Prompt files (JSONL, as `ptrl segment` writes them), each optionally preceded by its share: `[0.5, asr.jsonl,
    0.5, msr.jsonl]`. Without shares every prompt of all files is seen equally often."""
    msr_weight: float = 1.0
    """The lambda of J = J_ASR + lambda J_MSR (arXiv:2509.19249, which gives no value): what the advantages of task msr
    are multiplied by."""

    def __post_init__(self) -> None:
        require(self.msr_weight >= 0, f"prompts.msr_weight is {self.msr_weight}; expected >= 0")


@dataclass(frozen=True, kw_only=True)
class PromptRowsConfig(RowsConfig):
    """How prompts become tokens, and how responses share rows with them."""

    template: str = "plain"
    """How turns are written: `plain`, or the chat template of a Hugging Face model, its tokenizer_config.json or
    .jinja file; that of the cold start. Then data.eod_token has to be the token that ends a response."""
    isolate_documents: bool = True
    """Responses that share a row do not see one another; there is no other way here."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(EngineConfig):
    """How prompts are answered."""

    prompts: int = 512
    """Prompts of a step, over all data-parallel ranks."""
    samples: int = 8
    """Responses to each prompt: a group."""
    max_tokens: int = 8192
    """Longest response. A prompt must leave room for it in data.seq_length, else it is put aside."""
    temperature: float = 1.0
    """Of the draw; the trainer's probabilities are those at 1."""
    top_p: float = 1.0
    """Draw from the most probable tokens with this much mass."""
    updates: int = 1
    """Optimizer steps on the responses of a step, each on its part of the prompts. 1 is strictly on-policy."""
    drop_equal_groups: bool = True
    """Leave groups whose rewards are all the same out of the loss and its divisor: their advantages are 0. With
    policy.kl_coef they go without its pull, too, which false gives them; a step of nothing but such groups leaves the
    weights as they are, however far from the reference."""
    resample: int = 0
    """How often in a step further prompts take the place of groups that were left out (DAPO's dynamic sampling)."""
    mask_truncated: bool = False
    """Leave responses that were cut off out of the loss; their rewards stay in their group's mean."""
    max_unjudged: float = 0.1
    """The run stops when a larger share of a step's responses could not be judged."""
    judge_patience: float = 600.0
    """Seconds to wait for judgements once the last response is written; what is missing then counts as unjudged."""
    dump: bool = True
    """Write every response with its reward to rollouts/step_*.jsonl."""
    replay: str | None = None
    """A folder of such files: their responses and rewards are used instead of new ones."""

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        for name in ("prompts", "samples", "max_tokens", "updates"):
            require(getattr(self, name) >= 1, f"rollout.{name} is {getattr(self, name)}; expected >= 1")
        require(self.temperature > 0, f"rollout.temperature is {self.temperature}; expected > 0")
        require(0 < self.top_p <= 1, f"rollout.top_p is {self.top_p}; expected above 0, at most 1")
        require(self.resample >= 0, f"rollout.resample is {self.resample}; expected >= 0")
        require(0 <= self.max_unjudged <= 1, f"rollout.max_unjudged is {self.max_unjudged}; expected 0 to 1")
        require(
            0 < self.judge_patience <= 1500,
            f"rollout.judge_patience is {self.judge_patience}; expected above 0, at most 1500 seconds: the process "
            "groups of the ranks that wait give up after 1800",
        )
        require(
            self.engine == "megatron" or self.server.deadline + self.judge_patience <= 1700,
            f"rollout.server.deadline {self.server.deadline:g} and rollout.judge_patience {self.judge_patience:g} are "
            "more than 1700 seconds together: the process groups of the ranks that wait give up after 1800",
        )
        require(
            self.updates <= self.prompts,
            f"rollout.updates {self.updates} is more than rollout.prompts {self.prompts}; expected one a prompt",
        )

    @property
    def as_drawn(self) -> bool:
        """Whether the engine draws from the distribution that the trainer computes."""
        return self.temperature == 1 and self.top_p == 1


@dataclass(frozen=True, kw_only=True)
class RLConfig(RunConfig):
    """Prompts + checkpoint -> a policy that answers them better (RLPT, arXiv:2509.19249; RLVR), in `run_dir`."""

    run_dir: str = "runs/rl"
    """Everything of the run: config.yaml, metrics.jsonl, log.txt, checkpoints/, rollouts/, rejects.jsonl, plots/."""
    data: PromptRowsConfig = field(default_factory=PromptRowsConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig(top_k=1, mask_padding=True))
    """How log-probabilities are computed, over the tokens without padding, as every engine does; nothing is shaped."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    policy: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    reference: str | None = None
    """Run directory or checkpoint that policy.kl_coef holds the policy to; null for checkpoint.load."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        rollout, policy, loss = self.rollout, self.policy, self.loss
        require(
            self.parallel.cp == 1,
            f"parallel.cp is {self.parallel.cp}; responses are not cut over ranks here: expected 1, use tp or pp",
        )
        require(
            self.data.isolate_documents,
            "data.isolate_documents is false; expected true, because several responses share a row",
        )
        require(
            not (loss.beta or loss.lambda_head or loss.lambda_tail) and loss.impl != "megatron",
            "loss: the policy's log-probabilities come from the plain cross entropy; expected beta, lambda_head and "
            "lambda_tail 0 and impl reward_shaped or linear",
        )
        require(
            loss.mask_padding,
            "loss.mask_padding is false; expected true: engines draw from the tokens without the padding",
        )
        require(loss.recompute_logits, "loss.recompute_logits is false; expected true: the loss follows the forward")
        require(
            not self.model.hidden_dropout and not self.model.attention_dropout,
            "model.hidden_dropout or attention_dropout is not 0; expected 0: the policy that is trained would not be "
            "the one that answered",
        )
        require(
            rollout.max_tokens < self.data.seq_length,
            f"rollout.max_tokens is {rollout.max_tokens}; expected less than data.seq_length {self.data.seq_length}, "
            "which a prompt shares with its response; lower the one or raise the other",
        )
        require(
            rollout.as_drawn or policy.importance_sampling == "off",
            f"policy.importance_sampling is {policy.importance_sampling} with rollout.temperature "
            f"{rollout.temperature:g} and top_p {rollout.top_p:g}, which the trainer's probabilities do not know; "
            "expected both to be 1, or importance_sampling off",
        )
