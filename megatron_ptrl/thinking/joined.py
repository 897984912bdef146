"""Lines of thinking -> token ids of training documents, and the reasons against the others.

    line  ->  Thought  ->  reason_against  ->  document, separator, <think>thinking</think>  ->  ids, EOD
                                 |
                                 +--> Rejected

The worker processes of `assemble_stage` import this module, so it stays free of torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from megatron_ptrl.config.assemble import AssembleConfig
from megatron_ptrl.data.tokenizer import Tokenizer, start_worker
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Thought
from megatron_ptrl.thinking.filters import reason_against


@dataclass(frozen=True, slots=True)
class Rejected:
    """A thought that is not trained on."""

    index: int
    """Its place among the lines."""
    id: str | None
    """None where the line is not JSON with an id."""
    reason: str
    """One of filters.REASONS."""
    detail: str


@dataclass(frozen=True, slots=True)
class Joined:
    """What became of some lines."""

    ids: numpy.ndarray
    """[tokens] of all documents end to end, in the tokenizer's type."""
    lengths: numpy.ndarray
    """[documents] int64; more documents than thoughts where those are split."""
    thoughts: int
    """Lines that were kept."""
    text_bytes: int
    """UTF-8 bytes of the texts behind `ids`."""
    rejected: list[Rejected]


def join(lines: Sequence[bytes], tokenizer: Tokenizer, config: AssembleConfig) -> Joined:
    """Filter, join and tokenize the thoughts of `lines`, in their order."""
    texts: list[str] = []
    owners: list[tuple[int, str]] = []
    rejected = []
    for index, line in enumerate(lines):
        thought = read_thought(line, index, config)
        if isinstance(thought, Rejected):
            rejected.append(thought)
            continue
        pieces = texts_of(thought, tokenizer, config)
        texts += pieces
        owners += [(index, thought.id)] * len(pieces)
    ids, lengths = tokenizer.encode_batch(texts)
    unusable = _unusable(ids, lengths, tokenizer.eod, owners)
    rejected += unusable.values()
    kept, text_bytes = [], 0
    eod = numpy.array([tokenizer.eod] if config.append_eod else [], dtype=tokenizer.dtype)
    ends = numpy.cumsum(lengths)
    for text, (index, _), begin, end in zip(texts, owners, ends - lengths, ends, strict=True):
        if index not in unusable:
            kept.append(numpy.concatenate((ids[begin:end], eod)))
            text_bytes += len(text.encode("utf-8"))
    return Joined(
        ids=numpy.concatenate(kept) if kept else ids[:0],
        lengths=numpy.array([document.size for document in kept], dtype=numpy.int64),
        thoughts=len(lines) - len(rejected),
        text_bytes=text_bytes,
        rejected=sorted(rejected, key=lambda item: item.index),
    )


def read_thought(line: bytes, index: int, config: AssembleConfig) -> Thought | Rejected:
    """The thought of a line, unless something is against training on it."""
    try:
        thought = Thought.from_json(line, "thought")
    except (InputError, RecursionError) as error:
        return Rejected(index, _id_of(line), "not_a_thought", str(error))
    for name in ("id", "text", "thinking", "finish_reason"):
        if not isinstance(getattr(thought, name), str):
            return Rejected(index, _id_of(line), "not_a_thought", f"{name} is not a string")
    found = reason_against(thought, config)
    return Rejected(index, thought.id, *found) if found else thought


def _id_of(line: bytes) -> str | None:
    try:
        found = json.loads(line)["id"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def texts_of(thought: Thought, tokenizer: Tokenizer | None, config: AssembleConfig) -> list[str]:
    """The training documents of a thought. Without a tokenizer yet, one that is whole."""
    behind = f"{config.separator}{config.opening}{thought.thinking}{config.closing}"
    if tokenizer is None or config.document == "whole":
        return [thought.text + behind]
    end = tokenizer.end_of_tokens(thought.text, config.window_tokens)
    texts = [thought.text[:end] + behind]
    while config.document == "windows" and end < len(thought.text):
        begin, end = end, tokenizer.end_of_tokens(thought.text, config.window_tokens, end)
        texts.append(thought.text[begin:end])
    return texts


def _unusable(
    ids: numpy.ndarray, lengths: numpy.ndarray, eod: int, owners: list[tuple[int, str]]
) -> dict[int, Rejected]:
    """By its line, every thought of which one document has no tokens or an EOD inside."""
    ends = numpy.cumsum(lengths)
    found = [(int(document), "no_tokens") for document in numpy.flatnonzero(lengths == 0)]
    within = numpy.searchsorted(ends, numpy.flatnonzero(ids == eod), side="right")
    found += [(int(document), "eod_in_text") for document in numpy.unique(within)]
    return {owners[document][0]: Rejected(*owners[document], reason, "") for document, reason in found}


_tokenizer: Tokenizer
_config: AssembleConfig


def start_joining(path: str, eod_token: str, config: AssembleConfig) -> None:
    """Initialise a process that joins."""
    global _tokenizer, _config
    _tokenizer, _config = start_worker(path, eod_token), config


def join_in_worker(lines: Sequence[bytes]) -> Joined:
    """`join` in a process started by `start_joining`."""
    return join(lines, _tokenizer, _config)
