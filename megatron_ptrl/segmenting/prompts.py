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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

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

_LINES = json.JSONEncoder(ensure_ascii=False, separators=("\n", ":"))

_Target = tuple[int, int | None]

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


@dataclass(frozen=True)
class Made:
    """What a document gives."""

    lines: dict[str, Iterator[bytes]]
    """By task: prompts as `records.Prompt.to_line` writes them, each with its line end; made when they are asked for,
    as they are many times as long as the document."""
    prompts: dict[str, int]
    """By task: how many these are."""
    skipped: list[Skipped]
    segments: dict[str, int]
    """How many there are, and how many of them are too short or too long for a target."""


class PromptMaker:
    """Makes the prompts of one document after the other."""

    def __init__(self, config: TaskConfig) -> None:
        self._config = config
        self._count_tokens = make_token_counts(config.tokenizer)
        self._lines = {
            "asr": _line_template("asr", load_template("asr", config.asr_prompt)),
            "msr": _line_template("msr", load_template("msr", config.msr_prompt)),
        }

    def make(self, document: str, text: str, places: list[int], seed: int, metadata: dict[str, Any]) -> Made:
        """The prompts of one document.

        document: its id      places: of the cut      seed: of the targets drawn, where not all are taken
        """
        config = self._config
        sizes = count_words(text, places)
        segments = {
            "segments": len(sizes),
            "too_short": sum(map(config.min_words.__gt__, sizes)),
            "too_long": sum(map(config.max_words.__lt__, sizes)),
        }
        made = Made({}, {}, [], segments)
        before: list[int] = []
        quoted: _Quoted | None = None
        for task in config.tasks:
            targets = self._targets(task, sizes, made.skipped)
            if targets:
                before = before or self._count_tokens(text, places)
                chosen = _drawn(targets, config.targets_per_document, f"{seed} {task}")
                shown = self._shown(task, chosen, before, made.skipped)
                quoted = quoted or _Quoted(document, text, places, metadata)
                made.prompts[task] = len(shown)
                made.lines[task] = self._lines_of(task, shown, quoted)
        return made

    def _targets(self, task: str, sizes: Sequence[int], skipped: list[Skipped]) -> list[_Target]:
        """(segment, the one that is shown behind it), from 0; None where none is. Adds why there are none."""
        least, most, count = self._config.min_words, self._config.max_words, len(sizes)
        if count < SEGMENTS_NEEDED[task]:
            detail = f"{count} segments; {task} needs {SEGMENTS_NEEDED[task]}"
            skipped.append(Skipped(task, "too_few_segments", detail))
            return []
        found: list[_Target] = []
        shown: int | None = None
        for i in range(count - 1, 0, -1):
            if least <= sizes[i] <= most and (task == "asr" or shown is not None):
                found.append((i, None if task == "asr" else shown))
            if sizes[i] >= least:
                shown = i
        if not found:
            detail = f"none of {count} segments has {least} to {most} words where it must"
            skipped.append(Skipped(task, "no_target", detail))
        return found[::-1]

    def _shown(
        self, task: str, targets: list[_Target], before: Sequence[int], skipped: list[Skipped]
    ) -> list[tuple[int, int, int | None]]:
        """(the first segment of the context, target, what is shown behind it); adds those without room for any."""
        most = self._config.context_tokens
        found = []
        for i, shown in targets:
            room = most if shown is None else most - (before[shown + 1] - before[shown])
            begin = bisect_left(before, before[i] - room) if room > 0 else i
            if begin < i:
                found.append((begin, i, shown))
            else:
                detail = f"segment {i + 1}: what is beside it has more than {most} tokens"
                skipped.append(Skipped(task, "context_too_long", detail))
        return found

    def _lines_of(self, task: str, shown: list[tuple[int, int, int | None]], quoted: "_Quoted") -> Iterator[bytes]:
        text, begins, ends = quoted.text, quoted.begins, quoted.ends
        line, values_of = self._lines[task]
        values = {"document": quoted.document, "metadata": quoted.metadata}
        for begin, i, next_step in shown:
            if next_step is None:
                behind = min(i + self._config.reference_segments, len(ends))
            else:
                behind = next_step
                values["next_step"] = text[begins[next_step] : ends[next_step]]
            values["context"] = values["prompt"] = text[begins[begin] : ends[i - 1]]
            values["number"] = b"%d" % (i + 1)
            values["target"] = text[begins[i] : ends[i]]
            values["reference"] = text[begins[i] : ends[behind - 1]]
            yield line % values_of(values)


class _Quoted:
    """A document as it stands in strings of JSON: escaped once, however many prompts show a segment."""

    def __init__(self, document: str, text: str, places: list[int], metadata: dict[str, Any]) -> None:
        self.document = _quote(document)
        others = b", " + to_line(metadata)[1:-1] if metadata else b""
        self.metadata = b', "segments": %d%s' % (len(places) - 1, others)
        # In turn what stands between segments and a segment without the white space around it.
        pieces: list[str] = []
        done = 0
        for begin, end in itertools.pairwise(places):
            segment = text[begin:end].strip()
            begin = text.index(segment, begin)
            pieces += text[done:begin], segment
            done = begin + len(segment)
        quoted = _quote_all(pieces)
        edges = list(itertools.accumulate(map(len, quoted)))
        self.text = b"".join(quoted)
        # Of each segment.
        self.begins, self.ends = edges[::2], edges[1::2]


def _quote(text: str) -> bytes:
    """`text` as in JSON, without the quotation marks."""
    (quoted,) = _quote_all([text])
    return quoted


def _quote_all(texts: list[str]) -> list[bytes]:
    """Each as `_quote` has it: all in one go, with line ends between them, which JSON has none of in a string."""
    try:
        return _LINES.encode(texts).encode("utf-8")[2:-2].split(b'"\n"')
    except UnicodeEncodeError:  # a lone surrogate
        return [json.dumps(text).encode("ascii")[1:-1] for text in texts]


def _line_template(task: str, prompt: str) -> tuple[bytes, Callable[[dict[str, bytes]], tuple[bytes, ...]]]:
    """(a line with `%b` for each value, what picks these in their order)."""
    hole, name = rf"{{({'|'.join(HOLES[task])})}}".encode(), task.encode()
    content = _quote(prompt)
    shown = [found.decode() for found in re.findall(hole, content)]
    parts = (
        *(b'{"id": "%b#%b/', name, b'", "task": "', name, b'", "messages": [{"role": "user", "content": "'),
        re.sub(hole, b"%b", content.replace(b"%", b"%%")),
        b'"}], "target": "%b", "reference": "%b", "metadata": {"document": "%b", "segment": %b%b}}\n',
    )
    values = "document", "number", *shown, "target", "reference", "document", "number", "metadata"
    return b"".join(parts), itemgetter(*values)


def _drawn(targets: list[_Target], most: int | None, seed: str) -> list[_Target]:
    if most is None or len(targets) <= most:
        return targets
    return sorted(random.Random(seed).sample(targets, most), key=lambda target: target[0])
