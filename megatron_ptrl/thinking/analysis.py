"""OUTPUT of `ptrl think` -> how long the thinking is, for which documents, and what became of it.

    thoughts/*.jsonl     --sample-->  Measured  -+->  lengths, groups by label     -+->  summary.md, *.png
    rejects/*.jsonl, train.rejects.jsonl  -------+->  counts by reason             -+

Tokens are those of the training tokenizer, train.tokenizer.json; the generator counts its own. The groups are those of
arXiv:2509.20186, figure 3: domain, how much reasoning a document asks for, whom it is written for. They are told by the
metadata, or by a generator that is asked (labels.py).
"""

import hashlib
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ptrl.config import ThinkReportConfig
from megatron_ptrl.data.corpus import find_files
from megatron_ptrl.data.indexed import read_meta
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Thought
from megatron_ptrl.thinking.assemble_stage import read_lines
from megatron_ptrl.thinking.labels import LABELS, Answers, ask_generator
from megatron_ptrl.thinking.plots import draw

GROUPS = tuple(LABELS)
BATCH = 256

Ask = Callable[[Iterable[Thought]], Answers]
"""Is shown the documents whose metadata lacks some of GROUPS; returns labels for as many of them as it likes."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A document that is trained on."""

    document_tokens: int
    thinking_tokens: int
    """Without separator and tags."""
    groups: dict[str, str]
    """Those of GROUPS that are known."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of one output directory."""

    thoughts: int
    """Documents that got thinking."""
    rejected: dict[str, Counter[str]]
    """By stage, then by reason."""
    measured: list[Measured] = field(default_factory=list)
    """A sample of those that are trained on."""
    asked: Counter[str] = field(default_factory=Counter)
    """What became of asking for labels, as Answers.outcomes."""


def run(config: ThinkReportConfig) -> None:
    """Write and print the table of every directory, draw its plots. Raises InputError as `analyse` does."""
    if not config.runs:
        raise InputError("no directory was given; expected one or more: ptrl think_report DIR...")
    if config.output is not None and len(config.runs) > 1:
        raise InputError(f"{len(config.runs)} directories and one output folder; leave --output out, or give one")
    for name in config.runs:
        output = Path(config.output or Path(name) / "plots")
        found = analyse(Path(name), config, partial(ask_generator, path=output / "labels.jsonl", config=config.ask))
        output.mkdir(parents=True, exist_ok=True)
        groups = {group: by_group(found.measured, group) for group in GROUPS}
        plots = draw(found, groups, output)
        text = table(found, groups)
        (output / "summary.md").write_text(text + "\n", encoding="utf-8")
        print(text)
        print(f"\n{len(plots)} plots and summary.md are in {output}")


def analyse(folder: Path, config: ThinkReportConfig, ask: Ask | None = None) -> Analysis:
    """Count what became of every document, measure a sample of those that are trained on.

    The sample is a function of the lines, so that it stays the same; about `config.sample` of them, all if there are no
    more. Cost: reads everything twice, a third time where `ask` looks at the sample; parses and tokenizes the sample.
    Raises InputError where there are no thoughts or the assembly has not been made.
    """
    if not (folder / "thoughts").is_dir():
        raise InputError(f"{folder}: no folder thoughts in it; expected the output of `ptrl think`")
    prefix = str(folder / "train")
    meta = read_meta(prefix)
    if meta is None:
        raise InputError(f"{prefix}.json: no such file; assemble the training set first: ptrl assemble")
    tokenizer = Tokenizer(prefix + ".tokenizer.json", meta.eod_token)
    files = find_files([str(folder / "thoughts")])
    thoughts = sum(1 for _ in read_lines(files))
    rejected, dropped = _read_rejects(folder)
    share = config.sample / max(thoughts, 1)

    def sample() -> Iterator[Thought]:
        for line in read_lines(files):
            if _fraction(line.content) < share and (Path(line.file).name, line.number) not in dropped:
                yield Thought.from_json(line.content, f"{line.file}:{line.number}")

    lacking = (thought for thought in sample() if len(groups_of(thought, config)) < len(GROUPS))
    answers = ask(lacking) if ask else Answers({}, Counter())
    return Analysis(thoughts, rejected, list(_measure(sample(), tokenizer, config, answers)), answers.outcomes)


def _fraction(content: bytes) -> float:
    """Of a line, evenly spread over 0 to 1."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64


def _read_rejects(folder: Path) -> tuple[dict[str, Counter[str]], set[tuple[str, int]]]:
    """Reasons by stage, and the lines of thoughts/ that the assembly left out."""
    counts: dict[str, Counter[str]] = {"generate": Counter(), "assemble": Counter()}
    dropped = set()
    files = [*sorted((folder / "rejects").glob("*.jsonl")), folder / "train.rejects.jsonl"]
    for line in read_lines([file for file in files if file.exists()]):
        try:
            record = json.loads(line.content)
            stage, reason = record["stage"], record["reason"]
            counts.setdefault(stage, Counter())[reason] += 1
            if stage == "assemble":
                dropped.add((Path(record["file"]).name, record["line"]))
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise InputError(f"{line.file}:{line.number}: no line of rejects ({error!r})") from error
    return counts, dropped


def _measure(
    sample: Iterator[Thought], tokenizer: Tokenizer, config: ThinkReportConfig, answers: Answers
) -> Iterator[Measured]:
    while batch := list(itertools.islice(sample, BATCH)):
        _, lengths = tokenizer.encode_batch([text for thought in batch for text in (thought.text, thought.thinking)])
        for thought, (document, thinking) in zip(batch, lengths.reshape(-1, 2).tolist(), strict=True):
            yield Measured(document, thinking, {**answers.of(thought), **groups_of(thought, config)})


def groups_of(thought: Thought, config: ThinkReportConfig) -> dict[str, str]:
    """Those of GROUPS that the metadata has, as text."""
    found = {}
    for group in GROUPS:
        value: Any = thought.metadata
        for name in getattr(config, f"{group}_field").split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str | int | float):
            found[group] = str(value)
    return found


def by_group(measured: Iterable[Measured], group: str) -> dict[str, list[int]]:
    """Thinking tokens by the values of `group`, the longest mean first; empty when nobody knows it."""
    found: dict[str, list[int]] = {}
    for item in measured:
        if group in item.groups:
            found.setdefault(item.groups[group], []).append(item.thinking_tokens)
    return dict(sorted(found.items(), key=lambda pair: (-statistics.fmean(pair[1]), pair[0])))


def table(found: Analysis, groups: Mapping[str, dict[str, list[int]]]) -> str:
    """Markdown: what became of the documents, lengths, and thinking by group, the groups from `by_group`."""
    parts = [_outcomes(found), *([_lengths(found), *_groups(groups)] if found.measured else [])]
    if found.asked:
        parts.append(
            _markdown(["asked for labels", "documents"], [[name, f"{n:,}"] for name, n in found.asked.most_common()])
        )
    return "\n\n".join(parts)


def _outcomes(found: Analysis) -> str:
    total = found.thoughts + found.rejected["generate"].total()
    kept = found.thoughts - found.rejected["assemble"].total()
    rows = [("documents", total), ("trained on", kept)]
    rows += [
        (f"{stage}: {reason}", n) for stage, counts in found.rejected.items() for reason, n in counts.most_common()
    ]
    return _markdown(["", "documents", "share"], [[name, f"{n:,}", f"{n / max(total, 1):.2%}"] for name, n in rows])


def _lengths(found: Analysis) -> str:
    columns: dict[str, list[float]] = {
        "document tokens": [item.document_tokens for item in found.measured],
        "thinking tokens": [item.thinking_tokens for item in found.measured],
        "thinking per document token": [item.thinking_tokens / max(item.document_tokens, 1) for item in found.measured],
    }
    rows = []
    for name, values in columns.items():
        tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
        figures = (statistics.fmean(values), tenths[0], statistics.median(values), tenths[8], max(values))
        rows.append([name, *(f"{figure:,.2f}" if "per" in name else f"{figure:,.0f}" for figure in figures)])
    return _markdown([f"{len(found.measured):,} documents", "mean", "10 %", "median", "90 %", "max"], rows)


def _groups(groups: Mapping[str, dict[str, list[int]]]) -> Iterator[str]:
    for group, lengths in groups.items():
        if lengths:
            rows = [
                [name, f"{len(values):,}", f"{statistics.fmean(values):,.0f}", f"{statistics.median(values):,.0f}"]
                for name, values in lengths.items()
            ]
            yield _markdown([group, "documents", "mean thinking tokens", "median"], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded])} |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([line(head), rule, *map(line, rows)])
