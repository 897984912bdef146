"""Servers that answer prompts with the weights that are trained."""

from dataclasses import dataclass

from megatron_ptrl.config.checks import require


@dataclass(frozen=True, kw_only=True)
class RolloutServerConfig:
    """How servers are given weights and asked, and what to put up with from them."""

    weights: str | None = None
    """Folder into which the weights are written, by the same path for ranks and servers; null for run_dir/weights. The
    last two versions stay."""
    in_flight: int = 256
    """Requests at a time to each server, from each model-parallel group."""
    timeout: float = 900.0
    """Seconds for one response, or for a server to load weights."""
    deadline: float = 1000.0
    """Seconds for all responses of a step, and for all servers to load weights; then the run stops."""
    attempts: int = 4
    """Requests for a response before the run stops."""
    backoff: float = 1.0
    """Seconds before the second attempt, doubled for each further one up to 30."""
    probe_tokens: int = 32
    """Tokens of the first prompt whose log-probabilities by each server are held against the trainer's, each time that
    weights were loaded."""
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
