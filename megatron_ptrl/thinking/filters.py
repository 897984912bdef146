"""Thinking -> whether to train on it, and if not, for which of a fixed list of reasons.

Each filter takes tens of microseconds on a page of text, as the tokenizer is to be what the time goes into.
"""

import re
import zlib

from megatron_ptrl.config.assemble import AssembleConfig
from megatron_ptrl.records import Thought
from megatron_ptrl.thinking.language import is_allowed, language_of

REASONS = (
    "not_a_thought",  # the line is not what `ptrl think` writes
    "empty_document",
    "empty_thinking",
    "bad_text",  # half of a surrogate pair, which no UTF-8 can hold
    "tag_in_document",
    "tag_in_thinking",
    "truncated",  # the generator ran out of tokens before it closed the thinking
    "refusal",
    "repetition",
    "copy_of_document",
    "wrong_language",
    "eod_in_text",  # an ordinary word of the vocabulary has the id that marks ends of documents
    "no_tokens",
)
"""Every reason that the assembly rejects for, in the order in which they are looked for."""

# What a model says first when it will not do it. Only the opening counts: thinking may well discuss refusals.
REFUSAL_CHARACTERS = 200
_UNABLE = r"(?:can't|cannot|can not|(?:am|'m) (?:unable|not able) to|won't be able to|must decline to)"
_CANNOT = rf"(?:won't|will not|{_UNABLE})"
_REFUSAL = re.compile(
    rf"\b(?:sorry|apologi[sz]e|unfortunately)\b[,.]? (?:but )?(?:as an? \w+(?: \w+)?,? )?I ?{_CANNOT}"
    # "I cannot help but wonder" is none.
    rf"|\bI ?{_CANNOT} (?:help|assist)(?: you)?(?: with\b|[.,!]|$)"
    rf"|\bI ?{_CANNOT} (?:comply|engage|fulfil|do that\b)"
    # Nor is what cannot be said yet, or cannot be said without a step before it, or what need not be said.
    rf"|\bI ?{_UNABLE} (?:provide|continue|create|generate|discuss|answer|process)\b"
    r"(?![^.]{0,80}\b(?:without|until|unless|yet|before|directly|at once|by itself|alone)\b)"
    r"|\bI (?:must|have to) (?:respectfully )?decline\b"
    r"|\bI(?:'m| am) not comfortable (?:\w+ing|with (?:this|that|such|your|\w+ing))\b"
    r"|\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b(?! (?:researcher|engineer|expert|scientist))"
    r"[^.]{0,40}\bI (?:can't|cannot|do not|don't|am)"
    r"|(?:抱歉|对不起)[,，]?\s*(?:但)?我(?:无法|不能)|我(?:无法|不能)(?:提供|回答|协助|满足)",
    re.IGNORECASE,
)

# A loop at the end of long thinking is lost in the whole of it, so the end is looked at by itself.
TAIL_CHARACTERS = 2000
# Below this the compressor's own header and tables count as much as the text.
MIN_LOOP_BYTES = 200

# Pieces of the thinking that are looked up in the document: longer than a term or a title that one may well repeat.
PROBE_CHARACTERS = 48
MAX_PROBES = 32


def reason_against(thought: Thought, config: AssembleConfig) -> tuple[str, str] | None:
    """(reason, detail) for leaving the document out of the training set, the reason one of REASONS; None to keep it."""
    filters, thinking = config.filters, thought.thinking
    if not thought.text.strip():
        return "empty_document", ""
    if not thinking.strip():
        return "empty_thinking", f"finish_reason {thought.finish_reason}"
    for text, name in ((thought.text, "the document"), (thinking, "the thinking")):
        if not _is_utf8(text):
            return "bad_text", f"half of a surrogate pair in {name}"
        for tag in (config.opening, config.closing):
            if tag in text:
                return f"tag_in_{name.removeprefix('the ')}", f"{tag} at character {text.index(tag)}"
    if thought.finish_reason != "stop" and filters.truncated == "drop":
        return "truncated", f"finish_reason {thought.finish_reason}"
    if filters.refusals and (found := _REFUSAL.search(thinking[:REFUSAL_CHARACTERS].replace("\u2019", "'"))):
        return "refusal", found[0]
    if filters.max_compression and (most := largest_compression(thinking)) > filters.max_compression:
        return "repetition", f"compresses {most:.1f} times"
    if filters.max_copied < 1 and (share := copied_share(thinking, thought.text)) > filters.max_copied:
        return "copy_of_document", f"{share:.0%} of it is in the document"
    language = language_of(thinking) if filters.languages else None
    if not is_allowed(language, filters.languages, thought.text):
        return "wrong_language", str(language)
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def largest_compression(text: str) -> float:
    """How many times smaller zlib makes the UTF-8 bytes of `text`, or of its end; the larger. 0 for a short text."""
    parts = [text.encode("utf-8")]
    if len(parts[0]) < MIN_LOOP_BYTES:
        return 0.0
    if len(text) > TAIL_CHARACTERS:
        parts.append(text[-TAIL_CHARACTERS:].encode("utf-8"))
    return max(len(part) / len(zlib.compress(part, 1)) for part in parts)


def copied_share(thinking: str, document: str) -> float:
    """Share of up to 32 pieces of 48 characters, evenly spread over `thinking`, that are in `document` word for word.

    White space of any kind and length is one blank. Thinking shorter than a piece is one piece.
    """
    thinking, document = " ".join(thinking.split()), " ".join(document.split())
    count = min(max(len(thinking) // PROBE_CHARACTERS, 1), MAX_PROBES)
    step = len(thinking) / count
    pieces = [thinking[int(i * step) : int(i * step) + PROBE_CHARACTERS] for i in range(count)]
    return sum(piece in document for piece in pieces) / count
