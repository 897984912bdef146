"""What answers prompts: the weights in the processes that have them, or servers that are given them."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ptrl.config.checks import require


@dataclass(frozen=True, kw_only=True)
class RolloutServerConfig:
    """How servers are given weights and asked, and what to put up with from them."""

    weights: str | None = None
    """Folder into which the weights are written, by the same path for ranks and servers; null for weights/ in
    the run directory, or in the output of `ptrl evaluate`. The last two versions stay."""
    in_flight: int = 256
    """Requests at a time to each server, from each model-parallel group."""
    timeout: float = 900.0
    """Seconds for one response, or for a server to load weights."""
    deadline: float = 1000.0
    """Seconds for all responses of a step, or of a round of `ptrl evaluate`, and for all servers to load weights; then
    the run stops."""
    attempts: int = 4
    """Requests for a response before the run stops."""
    backoff: float = 1.0
    """Seconds before the second attempt, doubled for each further one up to 30."""
    probe_tokens: int = 32
    """Tokens of the first prompt, or of `problem_template` in `ptrl evaluate`, whose log-probabilities by each server
    are held against the trainer's, each time that weights were loaded."""
    probe_tolerance: float = 0.1
    """Mean distance of them in nats above which the run stops: the server computes another model."""
    api_key_env: str = "ROLLOUT_API_KEY"
    """Environment variable that holds the servers' key, if they want one. The key goes into no file, log or error."""

    def __post_init__(self) -> None:
        for name in ("in_flight", "attempts"):
            require(getattr(self, name) >= 1, f"rollout.server.{name} is {getattr(self, name)}; expected >= 1")
        for name in ("timeout", "deadline", "backoff", "probe_tolerance"):
            require(getattr(self, name) > 0, f"rollout.server.{name} is {getattr(self, name)}; expected > 0")
        require(self.probe_tokens >= 2, f"rollout.server.probe_tokens is {self.probe_tokens}; expected >= 2")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What draws the responses."""

    engine: Literal["megatron", "sglang", "vllm"] = "megatron"
    """`megatron`: the weights themselves, in the same processes. `sglang`, `vllm`: `servers`, which are given the
    weights, by `ptrl rl` before each step; their probabilities differ a little from the trainer's, for which
    policy.importance_sampling makes up there."""
    servers: list[str] = field(default_factory=list)
    """URLs of SGLang or vLLM servers, such as http://localhost:30000."""
    server: RolloutServerConfig = field(default_factory=RolloutServerConfig)
    batch: int = 64
    """Responses that a data-parallel rank writes at a time. Servers have server.in_flight each."""

    def __post_init__(self) -> None:
        require(self.batch >= 1, f"rollout.batch is {self.batch}; expected >= 1")
        require(
            bool(self.servers) == (self.engine != "megatron"),
            f"rollout.engine is {self.engine} with {len(self.servers)} rollout.servers; expected servers with sglang "
            "and vllm, and none with megatron",
        )

    @property
    def at_once(self) -> int:
        """Responses that a data-parallel rank has written at a time."""
        return self.batch if self.engine == "megatron" else self.server.in_flight * len(self.servers)
