"""Documents with their thinking -> training data."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ptrl.config.checks import require

ALPHABETIC = ("de", "en", "es", "fr", "it", "nl", "pt")
SCRIPTS = ("arabic", "cyrillic", "devanagari", "greek", "han", "hangul", "hebrew", "kana", "latin", "thai")


@dataclass(frozen=True, kw_only=True)
class ThinkingFilterConfig:
    """Which thinking is good enough to train on. An empty one, or one with a tag inside, never is."""

    truncated: Literal["drop", "keep"] = "drop"
    """Thinking that was cut off: left out, or closed by the tag where it stops."""
    refusals: bool = True
    """Drop thinking that opens by declining the task."""
    max_compression: float = 8.0
    """Drop thinking whose UTF-8 bytes, all or the last 2,000 characters, zlib makes this many times smaller: it runs in
    a loop. 0 for no such filter. English prose is at 2 to 3, indented code at up to 6."""
    max_copied: float = 0.5
    """Drop thinking of which more than this share is found in the document word for word; 1 for no such filter."""
    languages: list[str] = field(default_factory=lambda: ["document", "en"])
    """Languages that thinking may be in: `document` for that of its document, de, en, es, fr, it, nl, pt, or a script:
    arabic, cyrillic, devanagari, greek, han, hangul, hebrew, kana, latin, thai; an empty list for any."""

    def __post_init__(self) -> None:
        require(
            self.max_compression == 0 or self.max_compression > 1,
            f"filters.max_compression is {self.max_compression}; expected > 1, or 0 for no such filter",
        )
        unknown = [name for name in self.languages if name not in ("document", *ALPHABETIC, *SCRIPTS)]
        require(
            not unknown,
            f"filters.languages has {', '.join(unknown)}; expected of document, {', '.join((*ALPHABETIC, *SCRIPTS))}",
        )
        require(0 < self.max_copied <= 1, f"filters.max_copied is {self.max_copied}; expected > 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class AssembleConfig:
    """Documents with their thinking -> `document, separator, <think>thinking</think>` as `.bin/.idx`."""

    input: list[str] = field(default_factory=list)
    """Files or folders of thinking as `ptrl think` writes it: .jsonl, also .gz or .zst."""
    output: str = ""
    """Prefix of the files to write: PREFIX.bin, .idx, .json, .tokenizer.json, and .rejects.jsonl when there are any."""
    separator: str = "\n\n"
    """Between the document and its thinking."""
    opening: str = "<think>"
    """Tag before the thinking; a document or thinking that has it inside is put aside."""
    closing: str = "</think>"
    """Tag behind the thinking; likewise."""
    document: Literal["whole", "cut", "windows"] = "whole"
    """How much of a document to store: all; its first `window_tokens`; or all, as documents of `window_tokens` each, of
    which the first, which the generator has seen, has the thinking behind it."""
    window_tokens: int = 2048
    """Tokens of the training tokenizer that `cut` and `windows` leave together."""
    filters: ThinkingFilterConfig = field(default_factory=ThinkingFilterConfig)
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json to use; null to train a byte-level BPE on the documents and their thinking."""
    vocab_size: int = 8192
    """Size of a newly trained vocabulary, special tokens included."""
    eod_token: str = "<|endoftext|>"
    """End-of-document token; it must exist in a given tokenizer."""
    append_eod: bool = True
    """Close every document with the end-of-document token, behind its thinking."""
    workers: int = 1
    """Processes that filter and tokenize; the output does not depend on it."""

    def __post_init__(self) -> None:
        require(bool(self.opening) and bool(self.closing), "opening or closing is empty; expected a tag in each")
        require(self.window_tokens >= 1, f"window_tokens is {self.window_tokens}; expected >= 1")
        require(self.workers >= 1, f"workers is {self.workers}; expected >= 1")
        require(self.vocab_size >= 257, f"vocab_size is {self.vocab_size}; expected >= 257 (256 bytes and the EOD)")
