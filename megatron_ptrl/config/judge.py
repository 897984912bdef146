"""What a rollout's reward follows from."""

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from megatron_ptrl.config.checks import require
from megatron_ptrl.config.think import ServerConfig


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Rules that a prediction must pass before it is judged, because judges can be talked round.

    Many language models score ":" or "Let's solve this step by step." as a correct answer (arXiv:2507.08794), and a
    prefix reward is exposed most: a single word can be a valid prefix. Lengths are in words; a character of a script
    that has no spaces between words counts as one.
    """

    min_words: int = 4
    """A prediction needs this many, or as many as the target has if that is less."""
    min_share: float = 0.5
    """A prediction needs this share of the target's words."""
    max_share: float = 4.0
    """It may have this multiple of the reference's words at most: more is no prefix of it, and costs the judge."""
    copied_share: float = 0.9
    """It is copied when this share of its words stands in the prompt as one run that the reference lacks; 0 is off."""

    def __post_init__(self) -> None:
        require(self.min_words >= 1, f"gate.min_words is {self.min_words}; expected >= 1")
        require(0 <= self.min_share <= 1, f"gate.min_share is {self.min_share}; expected 0 to 1")
        require(self.max_share >= 1, f"gate.max_share is {self.max_share}; expected >= 1")
        require(0 <= self.copied_share <= 1, f"gate.copied_share is {self.copied_share}; expected 0 to 1")


@dataclass(frozen=True, kw_only=True)
class LexicalConfig:
    """The embedded judge, for smoke runs: it compares characters and understands nothing."""

    threshold: float = 85.0
    """Likeness in percent (`rapidfuzz.fuzz.ratio`) from which a prediction counts as right."""
    numbers_agree: bool = True
    """The numbers must be the same: "12 apples" and "13 apples" are 89 % alike."""

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 100, f"lexical.threshold is {self.threshold}; expected above 0, at most 100")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Problems with checkable answers (task rlvr)."""

    answer: list[Literal["boxed", "tags", "last_number"]] = field(default_factory=lambda: ["boxed"])
    """Where the answer is looked for, in this order: in the last \\boxed{}, between the prediction tags, or the last
    number of the response."""
    math: bool = True
    """Compare by math-verify what neither the text nor the number settles. False leaves it at these two."""
    timeout: float = 5.0
    """Seconds of CPU time for one comparison, after which there is no reward."""
    workers: int = 2
    """Processes that compare."""
    memory_gb: float = 4.0
    """Address space of each: a power tower must not take the machine's memory."""
    max_characters: int = 512
    """A longer answer is wrong, unseen."""

    def __post_init__(self) -> None:
        require(bool(self.answer), "verify.answer is empty; expected some of boxed, tags, last_number")
        for name in ("timeout", "workers", "memory_gb", "max_characters"):
            require(getattr(self, name) > 0, f"verify.{name} is {getattr(self, name)}; expected > 0")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Judges of predictions: tasks asr and msr by `kind`, task rlvr by `verify`."""

    kind: Literal["lexical", "openai"] = "lexical"
    """"openai" asks servers; "lexical" is for smoke runs."""
    reward: Literal["prefix", "strict"] = "prefix"
    """"prefix": the prediction means the same as the beginning of what comes next. "strict": as the target, whole."""
    servers: list[str] = field(default_factory=list)
    """URLs of OpenAI-compatible servers, such as http://localhost:8000/v1."""
    server: ServerConfig = field(
        default_factory=lambda: ServerConfig(timeout=60.0, attempts=4, backoff=0.25, patience=180.0)
    )
    """What to put up with from them. After `patience` seconds without any reply the run stops."""
    template: str | None = None
    """Text file with {reference} and {predicted}; null for the paper's, or its strict counterpart."""
    max_tokens: int = 16
    """Tokens of the judge's reply. A judge that thinks needs thousands."""
    thinking: bool = False
    """The reply may reason first: its last "Score:" counts, and nothing before </think>."""
    parse_attempts: int = 2
    """Replies without a score before the judgement is given up."""
    deadline: float = 300.0
    """Seconds for one judgement, retries included, after which there is no reward. Well below the time-out of the
    process groups, whose other ranks wait meanwhile."""
    cache: str | None = None
    """File that keeps judgements for later runs, of any number of processes; null for none."""
    gate: GateConfig = field(default_factory=GateConfig)
    lexical: LexicalConfig = field(default_factory=LexicalConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)

    def __post_init__(self) -> None:
        require(self.kind != "openai" or bool(self.servers), "judge.kind is openai; set judge.servers")
        require(self.max_tokens >= 1, f"judge.max_tokens is {self.max_tokens}; expected >= 1")
        require(self.parse_attempts >= 1, f"judge.parse_attempts is {self.parse_attempts}; expected >= 1")
        require(self.deadline > 0, f"judge.deadline is {self.deadline}; expected > 0 seconds")
        require(
            self.kind != "openai" or self.server.patience < self.deadline,
            f"judge.server.patience {self.server.patience:g} s is not below judge.deadline {self.deadline:g} s; a "
            "judge that is down could never be told from a slow one",
        )
        for url in self.servers:
            parts = urlsplit(url)
            bare = url.partition("?")[0].rpartition("@")[2]
            require(parts.scheme in ("http", "https") and bool(parts.hostname), f"judge.servers: {bare} is no URL")
            require(
                "@" not in parts.netloc and not parts.query,
                f"judge.servers: {bare} carries credentials or a query; put the key into {self.server.api_key_env}",
            )
