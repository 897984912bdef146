"""The seam to what continues prompts: the training weights themselves, or servers that hold a copy of them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_ptrl.errors import InputError


@dataclass(frozen=True, slots=True)
class Request:
    """One response that is wanted."""

    prompt_ids: list[int]
    max_tokens: int
    seed: int
    """What the response is drawn with, whatever batch, rank or layout draws it."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One response."""

    token_ids: list[int]
    """Without the prompt, the end-of-document token that ended it included."""
    logprobs: list[float]
    """Of each of them, in nats, under the distribution that it was drawn from, which has no columns that pad the
    vocabulary."""
    finish_reason: str
    """"stop", or "length" for one that was cut off."""


class RolloutEngine(Protocol):
    """Continues prompts, many at a time. All ranks of a model-parallel group call each method alike."""

    name: str
    weight_version: int

    def generate(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        top_p: float,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """The responses in the order of the requests, alike on every rank of the model-parallel group.

        on_done: called with a request's place and its response as soon as it is complete
        """

    def sync(self, version: int, export: Callable[[Path], None]) -> None:
        """Go on with the weights of `version`; `export` writes them to a folder, where that is needed."""

    def close(self) -> None:
        """Let go of memory, connections and processes."""


def check_request(number: int, request: Request, window: int, vocab_size: int) -> None:
    """InputError for a request that cannot be answered.

    number: its place   window: tokens of prompt and response together   vocab_size: of the tokenizer
    """
    prompt = request.prompt_ids
    if not 0 < len(prompt) < window:
        raise InputError(
            f"request {number}: its prompt has {len(prompt)} tokens; expected 1 to {window - 1}, which leaves room for "
            f"a response in the {window} of data.seq_length"
        )
    if request.max_tokens < 1:
        raise InputError(f"request {number}: max_tokens is {request.max_tokens}; expected >= 1")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise InputError(
            f"request {number}: its prompt has token ids from {min(prompt)} to {max(prompt)}; expected 0 to "
            f"{vocab_size - 1}: was it made with another tokenizer?"
        )


def rollout_seed(run_seed: int, prompt_index: int, rollout_index: int) -> int:
    """63 bits that follow from the run, the prompt's place in the whole run and the rollout's in its group."""
    digest = hashlib.blake2b(f"{run_seed}/{prompt_index}/{rollout_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
