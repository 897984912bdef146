"""A document and its segments -> prompts.

    asr     s_1 ... s_{i-1}                         target s_i, reference s_i ... s_{i+3}
    msr     s_1 ... s_{i-1}, <MASK>, s_{i+1}        target s_i, reference s_i

A segment that is too short is no target and is not what msr shows: it stays in the context, between the target and
what is shown, and in the references. What is too long for a prompt loses its beginning, at a segment's edge.
"""

import itertools
import json
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ptrl.config import TaskConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import to_line
from megatron_ptrl.segmenting.words import count_words
from megatron_ptrl.thinking.prompts import BYTES_PER_TOKEN

FOLDER = Path(__file__).parent / "prompts"
HOLES = {"asr": ("context",), "msr": ("prompt", "next_step"), "quality": ("context",)}
# A text that has them would end a prediction of itself, or hide where the mask is.
TAGS = ("<|startofprediction|>", "<|endofprediction|>", "<MASK>")
# Fewer segments than these give a task nothing to predict from.
SEGMENTS_NEEDED = {"asr": 2, "msr": 3}

_ENCODE = json.JSONEncoder(ensure_ascii=False).encode

TokenCounts = Callable[[str, list[int]], list[int]]
"""(text, places of a cut) -> how many tokens there are before each place."""


def load_template(task: str, name: str) -> str:
    """The paper's prompt, or that of a file. Raises InputError for a file without the task's holes."""
    path = FOLDER / f"{task}.txt" if name == "default" else Path(name)
    wanted = ", ".join(f"{{{hole}}}" for hole in HOLES[task])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{task} prompt {name}: {error}; expected default, or a text file with {wanted}") from error
    missing = [hole for hole in HOLES[task] if f"{{{hole}}}" not in text]
    if missing:
        raise InputError(f"{task} prompt {path} has no {{{missing[0]}}}; expected {wanted}")
    return text.removesuffix("\n")


def fill(template: str, **values: str) -> str:
    """The template with its holes filled; braces in a value stay what they are."""
    return re.sub("|".join(f"{{{name}}}" for name in values), lambda hole: values[hole[0][1:-1]], template)


def make_token_counts(tokenizer: str | None) -> TokenCounts:
    """By the vocabulary of a tokenizer.json, which sees the document whole; without one a token is 4 bytes.

    Raises InputError for a file that is no tokenizer.
    """
    if tokenizer is None:
        return _count_bytes
    import tokenizers

    try:
        vocabulary = tokenizers.Tokenizer.from_file(tokenizer)
    except Exception as error:  # the Rust library raises Exception itself
        raise InputError(f"task.tokenizer {tokenizer}: {error}; expected a Hugging Face tokenizer.json") from error
    vocabulary.no_truncation()
    vocabulary.no_padding()

    def count(text: str, places: list[int]) -> list[int]:
        starts = [start for start, _ in vocabulary.encode(text, add_special_tokens=False).offsets]
        return [bisect_left(starts, place) for place in places]

    return count


def _count_bytes(text: str, places: list[int]) -> list[int]:
    if text.isascii():
        return [-(-place // BYTES_PER_TOKEN) for place in places]
    size, counts = 0, [0]
    for begin, end in itertools.pairwise(places):
        size += len(text[begin:end].encode("utf-8", "surrogatepass"))
        counts.append(-(-size // BYTES_PER_TOKEN))
    return counts


@dataclass(frozen=True)
class Skipped:
    """A target without a prompt, or a task without one."""

    task: str
    reason: str
    detail: str


class Line(NamedTuple):
    """A prompt as `records.Prompt.to_line` writes it."""

    task: str
    line: bytes


class PromptMaker:
    """Makes the prompts of one document after the other."""

    def __init__(self, config: TaskConfig) -> None:
        self._config = config
        self._count_tokens = make_token_counts(config.tokenizer)
        self._templates = {
            "asr": _quoted_template("asr", config.asr_prompt),
            "msr": _quoted_template("msr", config.msr_prompt),
        }

    def make(
        self, document: str, text: str, places: list[int], seed: int, metadata: dict[str, Any]
    ) -> tuple[Iterator[Line | Skipped], Counter[str]]:
        """(prompts and what there is none for, counts of the segments and of those that are no targets).

        document: its id      places: of the cut      seed: of the targets drawn, where not all are taken
        """
        config = self._config
        sizes = count_words(text, places)
        counts = Counter(segments=len(sizes), too_short=sum(size < config.min_words for size in sizes))
        counts["too_long"] = sum(size > config.max_words for size in sizes)
        return self._made(document, text, places, sizes, seed, metadata), counts

    def _made(
        self, document: str, text: str, places: list[int], sizes: list[int], seed: int, metadata: dict[str, Any]
    ) -> Iterator[Line | Skipped]:
        config, count = self._config, len(sizes)
        before: list[int] = []
        quoted: _Quoted | None = None
        for task in config.tasks:
            if count < SEGMENTS_NEEDED[task]:
                yield Skipped(task, "too_few_segments", f"{count} segments; {task} needs {SEGMENTS_NEEDED[task]}")
                continue
            targets = self._targets(task, sizes)
            if not targets:
                detail = f"none of {count} segments has {config.min_words} to {config.max_words} words where it must"
                yield Skipped(task, "no_target", detail)
                continue
            before = before or self._count_tokens(text, places)
            quoted = quoted or _Quoted(document, text, places, metadata)
            for i, shown in _drawn(targets, config.targets_per_document, f"{seed} {task}"):
                begin = self._begin(before, i, shown)
                if begin == i:
                    detail = f"segment {i + 1}: what is beside it has more than {config.context_tokens} tokens"
                    yield Skipped(task, "context_too_long", detail)
                    continue
                yield Line(task, self._line(task, quoted, begin, i, shown))

    def _targets(self, task: str, sizes: Sequence[int]) -> list[tuple[int, int | None]]:
        """(segment, the one that is shown behind it), from 0; None where none is."""
        least, most = self._config.min_words, self._config.max_words
        found: list[tuple[int, int | None]] = []
        shown: int | None = None
        for i in range(len(sizes) - 1, 0, -1):
            if least <= sizes[i] <= most and (task == "asr" or shown is not None):
                found.append((i, None if task == "asr" else shown))
            if sizes[i] >= least:
                shown = i
        return found[::-1]

    def _begin(self, before: Sequence[int], i: int, shown: int | None) -> int:
        """The first segment of the context of segment `i`; `i` itself where there is room for none."""
        room = self._config.context_tokens - (0 if shown is None else before[shown + 1] - before[shown])
        return min(bisect_left(before, before[i] - room), i) if room > 0 else i

    def _line(self, task: str, quoted: "_Quoted", begin: int, i: int, shown: int | None) -> bytes:
        context, target = quoted.slice_of(begin, i), quoted.slice_of(i, i + 1)
        if shown is None:
            values = {"context": context}
            reference = quoted.slice_of(i, i + self._config.reference_segments)
        else:
            values = {"prompt": context, "next_step": quoted.slice_of(shown, shown + 1)}
            reference = quoted.slice_of(i, shown)
        number, name = b"%d" % (i + 1), task.encode()
        return b"".join(
            (
                *(b'{"id": "', quoted.document, b"#", number, b"/", name, b'", "task": "', name),
                b'", "messages": [{"role": "user", "content": "',
                *(values[part] if isinstance(part, str) else part for part in self._templates[task]),
                *(b'"}], "target": "', target, b'", "reference": "', reference),
                *(b'", "metadata": {"document": "', quoted.document, b'", "segment": ', number, quoted.metadata),
            )
        )


class _Quoted:
    """A document as it stands in strings of JSON: escaped once, however many prompts show a segment."""

    def __init__(self, document: str, text: str, places: list[int], metadata: dict[str, Any]) -> None:
        self.document = _quote(document)
        others = b", " + to_line(metadata)[1:-1] if metadata else b""
        self.metadata = b', "segments": %d%s}}' % (len(places) - 1, others)
        # Of each segment, without the white space around it.
        self._begins: list[int] = []
        self._ends: list[int] = []
        pieces: list[bytes] = []
        size = 0
        for begin, end in itertools.pairwise(places):
            segment = text[begin:end]
            before, inner, behind = map(_quote, segment.partition(segment.strip()))
            self._begins.append(size + len(before))
            self._ends.append(self._begins[-1] + len(inner))
            size = self._ends[-1] + len(behind)
            pieces += before, inner, behind
        self._text = b"".join(pieces)

    def slice_of(self, first: int, behind: int) -> bytes:
        """The text from segment `first` to before segment `behind`, stripped."""
        return self._text[self._begins[first] : self._ends[min(behind, len(self._ends)) - 1]]


def _quote(text: str) -> bytes:
    """`text` as in JSON, without the quotation marks."""
    if text in ("", " "):  # between most segments
        return text.encode()
    quoted = _ENCODE(text)[1:-1]
    try:
        return quoted.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(text).encode("ascii")[1:-1]


def _quoted_template(task: str, name: str) -> list[bytes | str]:
    """What stands between the holes, and in turn with it their names."""
    parts = re.split(rf"{{({'|'.join(HOLES[task])})}}", load_template(task, name))
    return [part if i % 2 else _quote(part) for i, part in enumerate(parts)]


def _drawn(targets: list[tuple[int, int | None]], most: int | None, seed: str) -> list[tuple[int, int | None]]:
    if most is None or len(targets) <= most:
        return targets
    return sorted(random.Random(seed).sample(targets, most), key=lambda target: target[0])
