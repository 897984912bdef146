"""The nouns that travel between the stages."""

import json
from dataclasses import dataclass, field
from typing import Any

from megatron_ptrl.errors import InputError

# Why a document has no thinking, as the `reason` of a rejects line says it.
GENERATE_REASONS = (
    "unreadable",  # no JSON, no text field, invalid UTF-8, a lone surrogate
    "empty_document",
    "duplicate_id",  # the same id twice in a file; the first one is kept
    "missing_field",  # the prompt's template names a field that the record lacks
    "bad_request",  # the server will not have it, for instance as too long
    "server_error",  # every attempt failed
    "timeout",  # every attempt failed, the last one for want of a reply
    "malformed_reply",  # every attempt failed, the last one with a reply that is not the API's
    "no_thinking",  # a reply without a sign of where its thinking is
)


TASKS = ("asr", "msr", "rlvr")
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str, allow_nan=False)


def to_line(record: dict[str, Any]) -> bytes:
    """`record` as a line of a JSONL file, without its end; what JSON lacks (dates, bytes) becomes text, NaN null."""
    try:
        return _ENCODER.encode(record).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can write
        return json.dumps(record, default=str).encode("ascii")
    except ValueError:  # NaN or an infinity, which Python writes and most others refuse to read
        return to_line(json.loads(json.dumps(record, default=str), parse_constant=lambda name: None))


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus, and where it came from."""

    text: str
    source: str
    """File it was read from, as given or found."""
    line: int
    """Line of a JSONL file or row of a Parquet file, from 1; 1 for a file that is one document."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The record's other fields, where they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """A document and the thinking a model wrote about it, kept apart: one line of OUTPUT/thoughts/*.jsonl."""

    id: str
    text: str
    """The document, whole."""
    metadata: dict[str, Any]
    """The record's other fields."""
    thinking: str
    """Without tags."""
    model: str
    prompt: str
    """Name and digest of the template."""
    finish_reason: str
    """"stop", "length" for thinking that was cut off, or what else the server says."""
    prompt_tokens: int | None
    thinking_tokens: int | None
    """By the generator's count, tags included; null where it does not say."""
    seed: int

    def to_line(self) -> bytes:
        """JSON, without a line end."""
        # asdict would copy the metadata, which takes longer than all the rest.
        return to_line({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def from_json(cls, line: str | bytes, where: str) -> "Thought":
        """The thought of one line. Raises InputError, naming `where`, for a line that is none."""
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise InputError(f"{where}: {error}; expected a line as `ptrl think` writes it") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A task for a policy, with what its answer is judged by: one line of a prompts file."""

    id: str
    """Of `ptrl segment`: document#task/segment, which is as unique as the documents' ids."""
    task: str
    """"asr" (predict the next segment), "msr" (fill in a masked one) or "rlvr" (a problem with a checkable answer)."""
    messages: list[dict[str, str]]
    """Chat messages, role and content."""
    target: str
    """The segment itself, or the problem's answer: what the strict reward compares with."""
    reference: str
    """The target and what follows it, up to what the prompt shows: what the prefix reward compares with."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """JSON, without a line end."""
        return to_line({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def from_json(cls, line: str | bytes, where: str) -> "Prompt":
        """The prompt of one line. Raises InputError, naming `where`, for a line that is none."""
        try:
            prompt = cls(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise InputError(f"{where}: {error}; expected a line as `ptrl segment` writes it") from error
        if wrong := prompt._defect():
            raise InputError(f"{where}: {wrong}")
        return prompt

    def _defect(self) -> str | None:
        """What is wrong with the values that a file gave."""
        if self.task not in TASKS:
            return f"task is {self.task!r}; expected {', '.join(TASKS)}"
        for name in ("target",) if self.task == "rlvr" else ("target", "reference"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                return f"{name} is {json.dumps(text)[:60]}; expected the text that the answer is judged by"
        good = isinstance(self.messages, list) and bool(self.messages)
        if not good or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in self.messages
        ):
            return "messages: expected a list of objects with role and content"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What a policy wrote to a prompt."""

    prompt_id: str
    index: int
    """Which of the prompt's rollouts, from 0."""
    prompt_ids: list[int]
    token_ids: list[int]
    """The response, the end-of-document token that ended it included."""
    logprobs: list[float]
    """Of each token of the response, in nats, by the engine that drew it, under the distribution it drew from."""
    text: str
    """The response decoded, without the end-of-document token."""
    finish_reason: str
    """"stop", or "length" for a response that was cut off."""
    weight_version: int
    """Optimizer steps that the weights had seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a rollout is worth."""

    reward: float | None
    """None where it could not be judged: such a sample takes part in nothing."""
    reason: str
    """"judged", the rule of the gate that failed, or why there is no judgement."""
    prediction: str
    """What stood between the tags, or the answer that was found; empty for none."""
    seconds: float
    """Of the judge."""
