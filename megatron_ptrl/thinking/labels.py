"""Documents whose metadata lacks a label -> labels that a generator gives, kept beside the report.

    sample  ->  the document and what is asked  ->  Generator.generate  ->  labels_of  ->  labels.jsonl

A reply goes into the file as it comes, whether it is an answer or not, and nobody is asked about that document again.
What is not an answer to the letter is no label.
"""

import asyncio
import hashlib
import heapq
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ptrl.config import AskConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Thought, to_line
from megatron_ptrl.thinking.generators import GenerationError, Request, make_generator
from megatron_ptrl.thinking.prompts import make_cut

LABELS = {
    "domain": (
        *("mathematics", "physics", "chemistry", "biology", "medicine", "computer science", "engineering"),
        *("economics", "law", "history", "philosophy", "social science", "language and literature", "arts"),
        *("everyday life", "other"),
    ),
    "reasoning": ("None", "Basic", "Intermediate", "Advanced"),
    "audience": ("General", "High School", "Undergraduate", "Expert"),
}
"""What is asked for, and every answer that counts; the groups of arXiv:2509.20186, figure 3."""

TASK = f"""## End of the document ##

Label the document above.
domain: what it is about, one of {", ".join(LABELS["domain"])}.
reasoning: how much reasoning it takes to follow, one of {", ".join(LABELS["reasoning"])}.
audience: whom it is written for, one of {", ".join(LABELS["audience"])}.
Answer with one JSON object and nothing else, in the very words above:
{{"domain": "...", "reasoning": "...", "audience": "..."}}"""
PROMPT = f"labels@{hashlib.sha256(TASK.encode()).hexdigest()[:8]}"

# An answer has some 20 words; more of what is none says no more about why.
KEPT_CHARACTERS = 500
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Answers:
    """What is known from asking."""

    labels: Mapping[str, Mapping[str, str]]
    """By digest of the document."""
    outcomes: Counter[str]
    """Documents: labelled, unusable_answer, and one of records.GENERATE_REASONS for each that got no reply."""

    def of(self, thought: Thought) -> Mapping[str, str]:
        """The labels of its document; empty when nobody was asked."""
        return self.labels.get(_digest(thought.text), {})


@dataclass(frozen=True, slots=True)
class _Question:
    digest: str
    id: str
    text: str
    """As much of the document as is shown."""


def ask_generator(thoughts: Iterable[Thought], path: Path, config: AskConfig) -> Answers:
    """Labels for `config.documents` of the documents, chosen by the seed, with what `path` has from earlier calls.

    The answers are appended to `path`, a JSONL file. What got no reply is not, and is asked about again the next time.
    Raises InputError where the settings name no generator or the file is none of answers, GeneratorUnusable when no
    request can succeed; the answers until then are kept.
    """
    cut = make_cut(config.prompt_tokens, None)
    ranked = (
        (_rank(digest, config.seed), digest, thought) for thought in thoughts for digest in [_digest(thought.text)]
    )
    rows = ((rank, _Question(digest, thought.id, cut(thought.text))) for rank, digest, thought in ranked)
    chosen = {asked.digest: asked for _, asked in heapq.nsmallest(config.documents, rows, key=lambda row: row[0])}
    known = {record["document"]: record["labels"] for record in _read(path)}
    left = [asked for digest, asked in chosen.items() if digest not in known]
    failures: Counter[str] = Counter()
    if left:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            failures = asyncio.run(_ask(left, stream, config, known))
    outcomes = Counter("labelled" if labels else "unusable_answer" for labels in known.values())
    return Answers({digest: labels for digest, labels in known.items() if labels}, outcomes + failures)


def labels_of(text: str) -> dict[str, str] | None:
    """The labels of a reply; None unless it is one JSON object with a value of LABELS for each name, and no others.

    Thinking in front of the answer and a Markdown fence around it are no part of it.
    """
    answer = text.rpartition("</think>")[2].strip()
    fenced = _FENCED.fullmatch(answer)
    try:
        found = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.keys() != LABELS.keys():
        return None
    return found if all(value in LABELS[name] for name, value in found.items()) else None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _rank(digest: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{digest}".encode(), digest_size=8).digest()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of an earlier call with the same question; a line that a kill tore is cut off."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            if record["prompt"] == PROMPT:
                yield {"document": record["document"], "labels": record["labels"]}
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise InputError(f"{path}:{number}: no line of labels ({error!r}); delete the file to ask again") from error


async def _ask(
    left: list[_Question], stream: BinaryIO, config: AskConfig, known: dict[str, dict[str, str] | None]
) -> Counter[str]:
    """Ask about each, put the replies into `stream` and `known`; returns why others got none."""
    generator, tasks = make_generator(config)
    questions = iter(left)
    failures: Counter[str] = Counter()

    async def work() -> None:
        for asked in questions:
            message = {"role": "user", "content": f"{asked.text}\n\n{TASK}"}
            request = Request(asked.id, [message], config.max_tokens, 0.0, 1.0, [], config.seed)
            try:
                reply = await generator.generate(request)
            except GenerationError as error:
                failures[error.reason] += 1
                continue
            known[asked.digest] = labels = labels_of(reply.text)
            record = {"document": asked.digest, "id": asked.id, "prompt": PROMPT, "model": reply.model}
            stream.write(to_line({**record, "labels": labels, "reply": reply.text[-KEPT_CHARACTERS:]}) + b"\n")
            stream.flush()

    workers = [asyncio.create_task(work()) for _ in range(min(tasks, len(left)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await generator.close()
    return failures
