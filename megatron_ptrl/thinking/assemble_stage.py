"""thoughts/*.jsonl -> PREFIX.tokenizer.json, PREFIX.bin, PREFIX.idx, PREFIX.json, PREFIX.rejects.jsonl.

    lines  ->  batches  ->  joined.join, in `workers` processes  ->  Megatron-Core's IndexedDatasetBuilder, in order

The output is in the order of the input, files by name. The files are complete or absent, as `indexed_output` says.
Nothing is generated here, so that other filters, another tokenizer or separator cost minutes.
"""

import itertools
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ptrl.config import AssembleConfig
from megatron_ptrl.data.corpus import find_files, uncompressed
from megatron_ptrl.data.indexed import IndexedMeta
from megatron_ptrl.data.indexed_output import (
    REJECTS,
    Progress,
    count_text,
    in_order,
    publish,
    publish_rejects,
    temporary_output,
)
from megatron_ptrl.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking.joined import Joined, Rejected, join, join_in_worker, read_thought, start_joining, texts_of

# Big enough to hide the cost of handing a batch to a process, and small enough that a few of them are no load.
BATCH_LINES = 256
BATCH_BYTES = 1 << 20
# Merges hardly change beyond this much text, and the trainer holds every distinct word in memory.
TRAIN_CHARACTERS = 1 << 29


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, as it is."""

    content: bytes
    file: str
    number: int
    """From 1."""


def run(config: AssembleConfig) -> None:
    """Assemble `config.input` into `config.output`.*; prints a summary.

    The bytes of every file depend on the input and the configuration, not on `config.workers`.
    Raises InputError for bad input, or when no thinking is left.
    """
    files = find_files(config.input, config.output)
    for file in files:
        if ".jsonl" not in file.suffixes[-2:]:
            raise InputError(
                f"{file}: not a file of thinking; expected .jsonl, .jsonl.gz or .jsonl.zst, as `ptrl think` has them "
                "in its folder thoughts"
            )
    with temporary_output(config.output, files) as temporary:
        meta, thoughts, text_bytes = _write(config, files, temporary)
    print(
        f"{config.output}: {thoughts:,} documents with thinking as {meta.documents:,}, {meta.tokens:,} tokens "
        f"({meta.dtype}), {text_bytes / meta.tokens:.2f} bytes/token, vocabulary {meta.vocab_size:,}, "
        f"rejected: {count_text(meta.rejected)}"
    )


def _write(config: AssembleConfig, files: list[Path], temporary: dict[str, Path]) -> tuple[IndexedMeta, int, int]:
    """All five files, under their names in the end; returns as `_write_indexed` does."""
    if config.tokenizer:
        Tokenizer(config.tokenizer, config.eod_token)
        shutil.copyfile(config.tokenizer, temporary[".tokenizer.json"])
    else:
        _train(config, files, temporary)
    tokenizer = Tokenizer(temporary[".tokenizer.json"], config.eod_token)

    with _Rejects(temporary[REJECTS]) as rejects, Progress("assemble", files) as progress:
        meta, thoughts, text_bytes = _write_indexed(files, tokenizer, rejects, config, progress, temporary)
    _publish_rejects(config, meta.documents, temporary[REJECTS], meta.rejected)
    temporary[".json"].write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
    publish(config.output, temporary)
    return meta, thoughts, text_bytes


class _Rejects:
    """Counts what is put aside by reason and writes a line for each."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._file = path.open("wb")

    def add(self, line: Line, found: Rejected) -> None:
        self.counts[found.reason] += 1
        head: dict[str, Any] = {"id": found.id, "reason": found.reason, "detail": found.detail, "stage": "assemble"}
        head |= {"file": line.file, "line": line.number}
        self._file.write(json.dumps(head).encode()[:-1] + b', "document": ' + _as_it_came(line.content) + b"}\n")

    def __enter__(self) -> "_Rejects":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def _as_it_came(content: bytes) -> bytes:
    """JSON as it is, anything else as a JSON string."""
    try:
        json.loads(content)
        return content.strip()
    except (ValueError, RecursionError):
        return json.dumps(content.decode("utf-8", "backslashreplace").rstrip("\r\n")).encode()


def _publish_rejects(config: AssembleConfig, documents: int, temporary: Path, counts: Mapping[str, int]) -> None:
    """Give the rejects their final name; InputError when there was nothing else."""
    path = publish_rejects(config.output, temporary, counts)
    if not documents:
        raise InputError(
            f"{', '.join(config.input)}: no thinking to train on; rejected: {count_text(counts)}"
            + (f", see {path}" if path else "")
        )


def _train(config: AssembleConfig, files: list[Path], temporary: dict[str, Path]) -> None:
    with _Rejects(temporary[REJECTS]) as rejects, Progress("train tokenizer", files) as progress:
        texts = _training_texts(config, files, rejects, progress)
        first = next(texts, None)
        if first is not None:
            whole = itertools.chain([first], texts)
            train_tokenizer(whole, temporary[".tokenizer.json"], config.vocab_size, config.eod_token)
    if first is None:
        _publish_rejects(config, 0, temporary[REJECTS], rejects.counts)


def _training_texts(config: AssembleConfig, files: list[Path], rejects: _Rejects, progress: Progress) -> Iterator[str]:
    characters = 0
    for line in read_lines(files, progress):
        thought = read_thought(line.content, 0, config)
        if isinstance(thought, Rejected):
            rejects.add(line, thought)
            continue
        for text in texts_of(thought, None, config):
            yield text
            characters += len(text)
        if characters >= TRAIN_CHARACTERS:
            print(f"tokenizer: trained on the first {characters:,} characters")
            return


def _write_indexed(
    files: list[Path],
    tokenizer: Tokenizer,
    rejects: _Rejects,
    config: AssembleConfig,
    progress: Progress,
    temporary: dict[str, Path],
) -> tuple[IndexedMeta, int, int]:
    """The pair under temporary names; its metadata, how many thoughts are in it and of how many bytes of text."""
    builder = IndexedDatasetBuilder(str(temporary[".bin"]), dtype=tokenizer.dtype)
    documents = tokens = thoughts = text_bytes = 0
    for lines, joined in _joined(read_lines(files, progress), tokenizer, config):
        ends = numpy.cumsum(joined.lengths)
        for begin, end in zip(ends - joined.lengths, ends, strict=True):
            builder.add_document(joined.ids[begin:end], [end - begin])
        for found in joined.rejected:
            rejects.add(lines[found.index], found)
        documents += len(joined.lengths)
        tokens += joined.ids.size
        thoughts += joined.thoughts
        text_bytes += joined.text_bytes
        progress.tokens = tokens
    builder.finalize(str(temporary[".idx"]))
    meta = IndexedMeta(
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod,
        eod_token=tokenizer.eod_token,
        tokenizer_sha256=tokenizer.sha256,
        documents=documents,
        tokens=tokens,
        dtype=numpy.dtype(tokenizer.dtype).name,
        append_eod=config.append_eod,
        rejected=dict(sorted(rejects.counts.items())),
    )
    return meta, thoughts, text_bytes


def _joined(lines: Iterator[Line], tokenizer: Tokenizer, config: AssembleConfig) -> Iterator[tuple[list[Line], Joined]]:
    pairs = ((batch, [line.content for line in batch]) for batch in _batches(lines))
    if config.workers == 1:
        for batch, contents in pairs:
            yield batch, join(contents, tokenizer, config)
    else:
        identity = (tokenizer.path, tokenizer.eod_token, config)
        yield from in_order(pairs, join_in_worker, config.workers, start_joining, identity)


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.content)
        if len(batch) >= BATCH_LINES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_lines(files: list[Path], on_bytes: Callable[[int], None] = lambda bytes_read: None) -> Iterator[Line]:
    """The lines of `files` that are not blank; `on_bytes` hears how far it is, in bytes on disk over all files.

    Raises InputError for a file that cannot be read to its end.
    """
    done = 0
    for file in files:
        try:
            with file.open("rb") as raw, uncompressed(str(file), raw) as stream:
                for number, content in enumerate(stream, start=1):
                    on_bytes(done + raw.tell())
                    if content.strip():
                        yield Line(content, str(file), number)
            done += file.stat().st_size
        except (EOFError, zlib.error) as error:
            raise InputError(f"{file}: damaged archive ({error}); nothing was written") from error
        except OSError as error:
            raise InputError(f"{file}: {error.strerror or error}") from error
