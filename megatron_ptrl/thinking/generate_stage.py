"""One part of the corpus -> its thoughts and rejects.

    read_part  ->  `in_flight` tasks:  Template.messages  ->  Generator.generate  ->  thinking_of  ->  Journal

Documents are started in the order of the input and finished in any; the journal puts them in order at the end. What a
document gets depends on it, the settings and the generator, so a run that was killed ends with the same bytes.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ptrl.config import ThinkConfig
from megatron_ptrl.data.input_parts import InputFile, Position, Unreadable, read_part
from megatron_ptrl.records import Document, Thought, to_line
from megatron_ptrl.thinking.generators import GenerationError, Generator, Reply, Request
from megatron_ptrl.thinking.journal import Journal, Source
from megatron_ptrl.thinking.prompts import Cut, Template
from megatron_ptrl.thinking.same_corpus import PartDigest, digest_of

OPEN, CLOSE = "<think>", "</think>"
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class _Item:
    id: str
    record: Document | Unreadable
    repeats: bool
    """Whether its file had the id before."""
    digest: bytes


def seed_of(run_seed: int, document_id: str) -> int:
    """A document's seed, 31 bits: the same wherever and whenever the document comes up."""
    digest = hashlib.blake2b(f"{run_seed}\0{document_id}".encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def thinking_of(reply: Reply, untagged: str) -> str:
    """The thinking without its tags.

    What the server told apart, else what stands between <think> and </think>, either of which may be missing: the
    template may have opened it, the stop may have swallowed the other. With neither, `untagged` decides.
    Raises GenerationError (no_thinking).
    """
    if reply.thinking is not None:
        return reply.thinking.strip()
    inside, closed, _ = reply.text.partition(CLOSE)
    before, opened, behind = inside.partition(OPEN)
    if not (opened or closed) and untagged == "reject":
        raise GenerationError("no_thinking", f"neither tags nor reasoning_content in the reply: {reply.text[:100]!r}")
    return (behind if opened else before).strip()


def finish_of(reply: Reply) -> str:
    """The reply's finish_reason, of which "length" is left for thinking that was cut off, not an answer behind it."""
    answered = reply.thinking is not None and reply.text.strip() not in ("", reply.thinking.strip())
    return "stop" if reply.finish_reason == "length" and (answered or CLOSE in reply.text) else reply.finish_reason


class Think:
    """Asks a generator about each document of a part."""

    def __init__(self, config: ThinkConfig, template: Template, cut: Cut, generator: Generator, tasks: int) -> None:
        self._config = config
        self._template = template
        self._cut = cut
        self._generator = generator
        self._tasks = tasks
        self.counts: Counter[str] = Counter()
        """thoughts, and rejects by reason, of this run."""
        self._start = self._last_line = time.monotonic()

    async def run(self, files: tuple[InputFile, ...], journal: Journal) -> Source:
        """Give every record of the part that is not in the journal its line there; returns what the records were.

        Raises GeneratorUnusable, or InputError for a damaged file and one that has changed; the journal keeps what was
        done until then.
        """
        whole = PartDigest()
        documents = self._left(files, journal, whole)

        async def work() -> None:
            for position, document in documents:
                journal.add(position, document.digest, *await self._outcome(document))
                self._progress()

        workers = [asyncio.create_task(work()) for _ in range(self._tasks)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return whole.source(files)

    def _left(
        self, files: tuple[InputFile, ...], journal: Journal, whole: PartDigest
    ) -> Iterator[tuple[Position, _Item]]:
        """What the journal lacks; `whole` is told of every record."""
        seen: set[bytes] = set()
        current = -1
        for position, record in read_part(files, self._config.text_field):
            if position[0] != current:
                current = position[0]
                seen.clear()
            file = files[current]
            content = digest_of(record)
            whole.add(content)
            if isinstance(record, Unreadable):
                item = _Item(f"{file.label}:{record.line}", record, False, content)
            else:
                name = self._id(record, file)
                digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=10).digest()
                item = _Item(name, record, digest in seen, content)
                seen.add(digest)
            if not journal.has(position, content):
                yield position, item

    def _id(self, document: Document, file: InputFile) -> str:
        given = document.fields.get(self._config.id_field)
        return f"{file.label}:{document.line}" if given is None or given == "" else str(given)

    async def _outcome(self, item: _Item) -> tuple[str, bytes]:
        """("thoughts" or "rejects", the line)."""
        record = item.record
        if isinstance(record, Unreadable):
            reason = "empty_document" if record.why == "empty document" else "unreadable"
            return self._rejected(item.id, reason, f"{record.source}:{record.line}: {record.why}", None)
        try:
            if item.repeats:
                raise GenerationError("duplicate_id", f"{record.source}:{record.line}: an id from further up")
            thought = await self._think(item.id, record)
        except GenerationError as error:
            document = {self._config.text_field: record.text, **record.fields}
            return self._rejected(item.id, error.reason, error.detail, document)
        self.counts["thoughts"] += 1
        return "thoughts", thought.to_line()

    async def _think(self, name: str, document: Document) -> Thought:
        sampling, seed = self._config.sampling, seed_of(self._config.seed, name)
        request = Request(
            id=name,
            messages=self._template.messages(document.text, document.fields, self._cut, seed),
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=sampling.stop,
            seed=seed,
        )
        reply = await self._generator.generate(request)
        return Thought(
            id=name,
            text=document.text,
            metadata=self._metadata(document.fields),
            thinking=thinking_of(reply, sampling.untagged),
            model=reply.model,
            prompt=self._template.name,
            finish_reason=finish_of(reply),
            prompt_tokens=reply.prompt_tokens,
            thinking_tokens=reply.completion_tokens,
            seed=seed,
        )

    def _metadata(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The other fields; a field `metadata`, as datatrove and others write it, is not nested once more."""
        others = {name: value for name, value in fields.items() if name != self._config.id_field}
        inner = others.pop("metadata", {})
        return {**inner, **others} if isinstance(inner, dict) else {**others, "metadata": inner}

    def _rejected(self, name: str, reason: str, detail: str, document: dict[str, Any] | None) -> tuple[str, bytes]:
        self.counts[reason] += 1
        line = {"id": name, "reason": reason, "detail": detail, "stage": "generate", "document": document}
        return "rejects", to_line(line)

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        total = self.counts.total()
        print(
            f"think: {total:,} documents, {total / (now - self._start):,.1f}/s, "
            f"{total - self.counts['thoughts']:,} rejected",
            flush=True,
        )
