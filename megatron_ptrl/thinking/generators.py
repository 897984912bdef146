"""The seam to the outside model: a `Request` goes in, a `Reply` comes back, wherever the model lives.

    Request  ->  Generator.generate  ->  Reply
                        |
                        +--> GenerationError: why there is none, and whether asking again may help

A generator does its own retrying, as only it knows how many servers it has; what it raises is final for the document,
unless it is a `GeneratorUnusable`, which ends the run with everything done so far kept.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_ptrl.config import GeneratorConfig
from megatron_ptrl.errors import InputError


@dataclass(frozen=True, slots=True)
class Request:
    """One conversation to be continued. The same request gets the same reply from the same model."""

    id: str
    messages: list[dict[str, str]]
    """As OpenAI's chat API has them: {"role": ..., "content": ...}."""
    max_tokens: int
    temperature: float
    top_p: float
    stop: list[str]
    """The reply ends before the first of these."""
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model wrote."""

    text: str
    """The message, tags and all."""
    finish_reason: str
    """"stop", "length", or what else the server says."""
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str
    thinking: str | None = None
    """The reasoning, where the server told it apart from the text."""


class GenerationError(Exception):
    """No reply to this request. `reason` is one of records.GENERATE_REASONS; `retryable`: another try may help."""

    def __init__(self, reason: str, detail: str, retryable: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retryable = retryable


class GeneratorUnusable(InputError):
    """No request can succeed: a wrong key, no such model, every server gone. The run stops and can be continued."""


class Generator(Protocol):
    """A model that continues conversations, many at a time."""

    name: str

    async def generate(self, request: Request) -> Reply:
        """The reply. Raises GenerationError when there is none, GeneratorUnusable when there will be none at all."""

    async def close(self) -> None:
        """Let go of connections and processes."""


def check_generator(config: GeneratorConfig) -> None:
    """Raise InputError for settings that name no generator, before anything is written for it."""
    if config.generator == "openai":
        if not config.servers:
            raise InputError(
                "servers is empty; expected URLs such as http://localhost:8000/v1, or generator embedded with a run of "
                "`ptrl pretrain` as checkpoint"
            )
    elif config.generator == "embedded":
        if not config.checkpoint:
            raise InputError("generator is embedded and checkpoint is empty; expected a run of `ptrl pretrain`")
        if not Path(config.checkpoint).is_dir():
            raise InputError(f"checkpoint {config.checkpoint}: no such folder; expected a run of `ptrl pretrain`")
    else:
        raise InputError(f"generator is {config.generator!r}; expected openai or embedded")


def make_generator(config: GeneratorConfig) -> tuple[Generator, int]:
    """The generator that the settings name, and how many requests at a time keep it busy.

    Raises InputError as `check_generator` does, and where a package is missing.
    """
    check_generator(config)
    if config.generator == "openai":
        try:
            from megatron_ptrl.thinking.servers import Servers
        except ModuleNotFoundError as error:
            raise InputError(f"servers need {error.name}; pip install megatron-ptrl[tpt]") from error

        return Servers(config.servers, config.server), config.server.in_flight * len(config.servers)
    from megatron_ptrl.thinking.embedded import open_embedded

    # Twice as many requests as rows, so that a batch finds others of its length.
    return open_embedded(config.checkpoint, batch=config.batch), 2 * config.batch
