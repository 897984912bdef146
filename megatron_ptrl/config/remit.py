"""Weights of tokens by what a reference model prefers."""

from dataclasses import dataclass
from typing import Literal

from megatron_ptrl.config.checks import require


@dataclass(frozen=True, kw_only=True)
class RemitConfig:
    """ReMiT (arXiv:2602.03075) or RHO-1 (arXiv:2404.07965). With `weighting` none the other fields are not read."""

    weighting: Literal["none", "remit", "rho1"] = "none"
    """`remit` weights every token near 1, `rho1` keeps some tokens and drops the others. The weights apply to the main
    loss, not to those of multi-token-prediction heads or expert balancing."""
    sidecar: list[str] | None = None
    """Prefixes that `ptrl score` wrote, one for each prefix of data.train in its order. A token's probability in it
    has its own document as context; without data.isolate_documents the model's context is the packed row."""
    reference: str | None = None
    """Run directory or checkpoint of a model with the same tokenizer, of any size, that goes over every batch first:
    about a third of a step more for one of equal size, and no side-car."""
    epsilon: float = 0.2
    """`remit`: weights lie in [1 - epsilon, 1 + epsilon]; 0 makes all of them 1."""
    center: Literal["row", "document"] = "row"
    """Over what the mean gap is taken (`remit`) or the share is kept (`rho1`): a packed row, or each document in it."""
    keep: float = 0.8
    """`rho1`: share of the tokens that train."""
    offload_reference: bool = False
    """Keep the weights of `reference` in the CPU's memory between its passes."""
    top_tokens: int = 10
    """How many tokens of the highest and of the lowest weight go to token_weights.jsonl with each logged row."""

    def __post_init__(self) -> None:
        require(
            0 <= self.epsilon < 1,
            f"remit.epsilon is {self.epsilon}; expected 0 or more, below 1 (the paper's is 0.2)",
        )
        require(0 < self.keep <= 1, f"remit.keep is {self.keep}; expected a share above 0, at most 1")
        require(self.top_tokens >= 0, f"remit.top_tokens is {self.top_tokens}; expected >= 0")
        if self.weighting == "none":
            return
        require(
            bool(self.sidecar) or self.reference is not None,
            f"remit.weighting is {self.weighting} and nothing says what the reference prefers; set remit.sidecar to "
            "what `ptrl score` wrote, or remit.reference to a run directory or checkpoint",
        )
        require(
            not self.sidecar or self.reference is None,
            "remit.sidecar and remit.reference are both set, and either would do; drop one of them",
        )

    @property
    def unused(self) -> str | None:
        """The field that is set to no effect, because nothing is weighted."""
        named = {"remit.sidecar": self.sidecar, "remit.reference": self.reference}
        return next((name for name, value in named.items() if value and self.weighting == "none"), None)

    @property
    def online(self) -> bool:
        """Whether a reference model goes over every batch."""
        return self.weighting != "none" and self.reference is not None
