"""Templates -> the messages that ask for thinking.

    {{CONTEXT}}         the document, cut to the prompt's share of tokens
    {{FOCUS_CONTEXT}}   the same with <<<READING HERE>>> before one of its words, chosen by the seed
    {{field:NAME}}      another field of the record, as text, cut likewise; any name without braces

A template is a text file and becomes one user message. The three that come with the package have the meaning of
arXiv:2509.20186 (section 2 and appendix A.3) in words of their own.
"""

import hashlib
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking.generators import GenerationError
from megatron_ptrl.thinking.language import LETTERS

FOLDER = Path(__file__).parent / "prompts"
BUILT_IN = ("default", "random_focus", "back_thinking")
MARKER = "<<<READING HERE>>>"
# Without a tokenizer: about what byte-level vocabularies reach on English prose.
BYTES_PER_TOKEN = 4
# No vocabulary has this many characters in a token on average, so what is behind them cannot be in the cut.
CHARACTERS_PER_TOKEN = 32

_PLACEHOLDER = re.compile(r"\{\{(\w+)(?::([^{}]+))?\}\}")
# Meant as one, and none: it would go to the model as it is.
_NEARLY = re.compile(r"\{+\s*(?:CONTEXT|FOCUS_CONTEXT|field\s*:[^{}]*)\s*\}+", re.IGNORECASE)

_UNSPACED = LETTERS["han"] + LETTERS["kana"]
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")

Cut = Callable[[str], str]


@dataclass(frozen=True)
class Template:
    """A prompt with its holes."""

    name: str
    """The file's, with the first digits of its SHA-256."""
    text: str

    def messages(self, text: str, fields: Mapping[str, Any], cut: Cut, seed: int) -> list[dict[str, str]]:
        """The holes filled. Raises GenerationError (missing_field) for a record without a field that is named."""

        def value(hole: re.Match[str]) -> str:
            kind, field = hole.groups()
            if kind == "CONTEXT":
                return cut(text)
            if kind == "FOCUS_CONTEXT":
                return mark(cut(text), seed)
            if fields.get(field) is None:
                raise GenerationError("missing_field", f"the prompt {self.name} needs a field {field!r}")
            text_of_field = str(fields[field])
            if not _is_utf8(text_of_field):
                raise GenerationError("unreadable", f"lone surrogate in the field {field!r}, which the prompt shows")
            return cut(text_of_field)

        return [{"role": "user", "content": _PLACEHOLDER.sub(value, self.text)}]


def load_template(name: str) -> Template:
    """One of `BUILT_IN`, or a file. Raises InputError for a file that is none, or holes that nothing fills."""
    path = FOLDER / f"{name}.txt" if name in BUILT_IN else Path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt {name}: {error}; expected one of {', '.join(BUILT_IN)}, or a text file") from error
    holes = [hole.groups() for hole in _PLACEHOLDER.finditer(text)]
    unknown = [kind for kind, field in holes if (kind, bool(field)) not in (*_PLAIN, ("field", True))]
    unknown += [nearly[0] for nearly in _NEARLY.finditer(_PLACEHOLDER.sub("", text))]
    if unknown or not holes:
        raise InputError(
            f"prompt {path}: {f'unknown placeholder {unknown[0]}' if unknown else 'no placeholder'}; expected "
            "{{CONTEXT}}, {{FOCUS_CONTEXT}} or {{field:NAME}}"
        )
    return Template(f"{path.stem}@{hashlib.sha256(text.encode()).hexdigest()[:8]}", text)


_PLAIN = (("CONTEXT", False), ("FOCUS_CONTEXT", False))


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def mark(text: str, seed: int) -> str:
    """`text` with the marker before one of its words; in Chinese and Japanese, which has no blanks, of its letters."""
    words = [word.start() for word in _WORD.finditer(text)]
    at = random.Random(seed).choice(words) if words else 0
    return f"{text[:at]}{MARKER} {text[at:]}"


def make_cut(tokens: int, tokenizer: str | None) -> Cut:
    """A function that keeps at most the first `tokens` tokens of a text, in whole characters.

    By the vocabulary of a tokenizer.json; without one a token counts as 4 bytes.
    Raises InputError for a file that is no tokenizer.
    """
    if tokenizer is None:
        return lambda text: _cut_bytes(text, tokens * BYTES_PER_TOKEN)
    import tokenizers

    try:
        vocabulary = tokenizers.Tokenizer.from_file(tokenizer)
    except Exception as error:  # the Rust library raises Exception itself
        raise InputError(f"tokenizer {tokenizer}: {error}; expected a Hugging Face tokenizer.json") from error
    vocabulary.no_truncation()
    vocabulary.no_padding()

    def cut(text: str) -> str:
        text = text[: tokens * CHARACTERS_PER_TOKEN]
        offsets = vocabulary.encode(text, add_special_tokens=False).offsets
        return text if len(offsets) <= tokens else text[: offsets[tokens][0]]

    return cut


def _cut_bytes(text: str, size: int) -> str:
    content = text[:size].encode("utf-8")
    return text if len(content) <= size and len(text) <= size else content[:size].decode("utf-8", "ignore")
