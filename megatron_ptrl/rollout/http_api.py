"""What a kind of server has to know: how it is asked for responses and log-probabilities, how it takes weights."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_ptrl.rollout.engine import Request

Ask = Callable[[str, dict[str, Any] | None], Awaitable[Any]]
"""(path, body) -> the JSON of one server's reply; POST with a body, GET without."""

UNTOUCHED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
"""Sampling parameters, by names that SGLang and vLLM share, that leave the model's distribution as it is."""


class Malformed(Exception):
    """A reply without what was asked for."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A response as a server tells it."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    version: str | None
    """Of the weights that wrote it, where replies say that."""


class Api(Protocol):
    """A kind of server."""

    name: str
    generate_path: str

    def generation(self, request: Request, temperature: float, top_p: float, eod: int) -> dict[str, Any]:
        """Body of the request for one response."""

    def read(self, body: Any) -> Reply:
        """A response. Raises Malformed."""

    def scoring(self, ids: list[int]) -> dict[str, Any]:
        """Body of the request, to the same path, for the log-probabilities of a text."""

    def read_scores(self, body: Any, ids: list[int]) -> list[float]:
        """Those of all tokens but the first, in nats. Raises Malformed."""

    async def load(self, ask: Ask, folder: str, version: str) -> None:
        """Take the weights of `folder`, drop what was cached with others, name their version. Raises Malformed."""

    async def version(self, ask: Ask) -> str | None:
        """Of the weights that the server has."""
