"""One part of the corpus -> its prompts and rejects.

    read_part  ->  clean (near-duplicates, masks, rules, decontamination, score)  ->  Cut  ->  PromptMaker
                     |                                                                            |
                     +--> OUTPUT/parts/rejects-00000.jsonl            OUTPUT/parts/{asr,msr}-00000.jsonl

What a document gives depends on it and the settings alone, near-duplicates aside, which are found beforehand.
"""

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_ptrl.config import SegmentConfig
from megatron_ptrl.data.input_parts import Part, Position, Unreadable, read_part
from megatron_ptrl.records import Document, to_line
from megatron_ptrl.segmenting.decontaminate import shared_run
from megatron_ptrl.segmenting.files import KINDS, Files, load_array, save_array, write_whole
from megatron_ptrl.segmenting.mask import mask
from megatron_ptrl.segmenting.near_duplicates import DUPLICATE, signatures
from megatron_ptrl.segmenting.prompts import TAGS, PromptMaker
from megatron_ptrl.segmenting.quality import Score, score_part
from megatron_ptrl.segmenting.rules import broken_rule
from megatron_ptrl.segmenting.segments import make_cut
from megatron_ptrl.segmenting.words import WordHashes, words_of

# A prompt is some kilobytes long.
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Rejected:
    """Why a document, or what else is called by `id`, gives nothing."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Item:
    """A record of the corpus under its id."""

    position: Position
    id: str
    place: str
    """File, below what the user named, and line."""
    path: str
    """The file as the user named it."""
    record: Document | Rejected


def read_items(part: Part, config: SegmentConfig) -> Iterator[Item]:
    """Every record of the part; what is no document, or repeats an id of its file, is Rejected."""
    seen: set[str] = set()
    current = -1
    for position, record in read_part(part, config.text_field):
        if position[0] != current:
            current = position[0]
            seen.clear()
        file, line = part[current], record.line
        place = name = f"{file.label}:{line}"
        if isinstance(record, Unreadable):
            reason = "empty_document" if record.why == "empty document" else "unreadable"
            yield Item(position, name, place, file.path, Rejected(reason, record.why))
            continue
        given = record.fields.get(config.id_field)
        name = name if given is None or given == "" else str(given)
        repeats = name in seen
        seen.add(name)
        rejected = Rejected("duplicate_id", "an id from further up in the file")
        yield Item(position, name, place, file.path, rejected if repeats else record)


def write_signatures(config: SegmentConfig, part: Part, path: Path) -> None:
    """The near-duplicates' signatures of a part's documents."""
    hashes = WordHashes()
    documents = (
        (item.position, hashes(words_of(item.record.text)))
        for item in read_items(part, config)
        if isinstance(item.record, Document)
    )
    save_array(path, signatures(documents))


class SegmentPart:
    """Segments one part after the other."""

    def __init__(self, config: SegmentConfig, files: Files, parts: list[Part]) -> None:
        self._config, self._files, self._parts = config, files, parts
        self._cut = make_cut(config.split, files.punkt)
        self._maker = PromptMaker(config.task)
        self._hashes = WordHashes()
        self._runs = load_array(files.evaluation_runs, numpy.dtype("u8")) if config.clean.decontaminate else None
        self._duplicates = load_array(files.duplicates, DUPLICATE) if config.clean.near_duplicates else None

    def run(self, number: int) -> None:
        """Write the prompts, rejects and counts of part `number`, the counts last."""
        part, duplicates = self._parts[number], self._duplicates_of(number)
        scores = self._scores(number, part, duplicates) if self._config.quality.servers else None
        counts: Counter[str] = Counter()
        self._files.parts.mkdir(parents=True, exist_ok=True)
        suffix = f".{secrets.token_hex(4)}.tmp"
        paths = {kind: self._files.of_part(kind, number) for kind in KINDS}
        with ExitStack() as stack:
            streams = {
                kind: stack.enter_context(path.with_name(path.name + suffix).open("wb", _BUFFER))
                for kind, path in paths.items()
            }
            for item in read_items(part, self._config):
                counts["documents"] += 1
                made, rejects = self._made(item, duplicates, scores, counts)
                for task, lines in made.items():
                    streams[task].writelines(lines)
                streams["rejects"].writelines(rejects)
            for stream in streams.values():
                stream.flush()
                os.fsync(stream.fileno())
        for path in paths.values():
            os.replace(path.with_name(path.name + suffix), path)
        write_whole(self._files.counts(number), json.dumps(dict(sorted(counts.items()))).encode())

    def _made(
        self, item: Item, duplicates: dict[Position, str], scores: dict[Position, Score] | None, counts: Counter[str]
    ) -> tuple[dict[str, Iterator[bytes]], list[bytes]]:
        """(the lines of each task, those of the rejects)."""
        text = self._cleaned(item, duplicates)
        if scores is not None and isinstance(text, str):
            text = self._scored(text, scores[item.position])
        if isinstance(text, Rejected):
            counts[f"rejected.{text.reason}"] += 1
            return {}, [_reject_line(item, None, text)]
        assert isinstance(item.record, Document)
        counts["masked"] += text != item.record.text
        made = self._maker.make(item.id, text, self._cut(text), self._config.seed, {"where": item.place})
        for name, count in made.segments.items():
            counts[f"segments.{name}"] += count
        for task, count in made.prompts.items():
            counts[f"prompts.{task}"] += count
        for one in made.skipped:
            counts[f"skipped.{one.task}.{one.reason}"] += 1
        return made.lines, [_reject_line(item, one.task, Rejected(one.reason, one.detail)) for one in made.skipped]

    def _cleaned(self, item: Item, duplicates: dict[Position, str]) -> str | Rejected:
        """The text with its masks, or why it is left out."""
        clean = self._config.clean
        if isinstance(item.record, Rejected):
            return item.record
        if item.position in duplicates:
            return Rejected("near_duplicate", f"of {duplicates[item.position]}")
        text = item.record.text
        for tag in TAGS:
            if tag in text:
                return Rejected("tag_in_text", f"{tag} at character {text.index(tag)}")
        if clean.rules and (rule := broken_rule(text, clean)):
            return Rejected(rule, "")
        if self._runs is not None:
            words = words_of(text)
            found = shared_run(words, self._hashes(words), self._runs, clean.decontaminate_words)
            if found:
                return Rejected("contaminated", found)
        return mask(text) if clean.pii else text

    def _scored(self, text: str, score: Score) -> str | Rejected:
        if score.score is None:
            return Rejected("no_score", score.detail)
        if score.score < self._config.quality.min_score:
            return Rejected("low_score", f"{score.score:g}")
        return text

    def _scores(self, number: int, part: Part, duplicates: dict[Position, str]) -> dict[Position, Score]:
        documents = (
            (item.position, text)
            for item in read_items(part, self._config)
            if isinstance(text := self._cleaned(item, duplicates), str)
        )
        return score_part(documents, self._config.quality, self._config.task.tokenizer, self._files.scores(number))

    def _duplicates_of(self, number: int) -> dict[Position, str]:
        """Position -> what it nearly repeats."""
        if self._duplicates is None:
            return {}
        rows = self._duplicates[self._duplicates["part"] == number]
        return {
            (int(row["file"]), int(row["line"])): f"{self._parts[row['of_part']][row['of_file']].path}:{row['of_line']}"
            for row in rows
        }


def _reject_line(item: Item, task: str | None, rejected: Rejected) -> bytes:
    where = f"{item.path}:{item.position[1]}"
    line = {"id": item.id, "where": where, "task": task, "reason": rejected.reason, "detail": rejected.detail}
    return to_line(line) + b"\n"
