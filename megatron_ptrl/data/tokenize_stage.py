"""Raw text -> PREFIX.tokenizer.json, PREFIX.bin, PREFIX.idx, PREFIX.json, PREFIX.rejects.jsonl.

    corpus.read_documents  ->  batches of texts  ->  Tokenizer.encode_batch, in `workers` processes
                           ->  Megatron-Core's IndexedDatasetBuilder, in the order of the input

Everything is written under PREFIX.*.tmp and renamed at the end, the index last: a `.idx` that exists belongs to a
complete `.bin`. A run that was killed is repeated by the same command, which starts over.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tqdm import tqdm

from megatron_ptrl.config import TokenizeConfig
from megatron_ptrl.data.corpus import Rejects, find_files, read_documents
from megatron_ptrl.data.indexed import IndexedMeta
from megatron_ptrl.data.tokenizer import Tokenizer, encode_in_worker, start_worker, train_tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Document

# A batch is big enough to hide the cost of handing it to a process, and small enough that a few of them are no load.
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20
# Merges hardly change beyond this much text, and the trainer holds every distinct word in memory.
TRAIN_CHARACTERS = 1 << 29
# The order in which finished files get their final names.
PUBLISHED = (".tokenizer.json", ".json", ".bin", ".idx")
SECONDS_BETWEEN_LINES = 10.0

Encoded = tuple[numpy.ndarray, numpy.ndarray]


def run(config: TokenizeConfig) -> None:
    """Tokenize `config.input` into `config.output`.*; prints a summary.

    The bytes of every file depend on the input and the tokenizer, not on `config.workers`.
    Raises InputError for bad input, a corpus without a document, or with `strict` the first bad record.
    """
    files = find_files(config.input, config.output)
    _prepare_output(config.output, files)
    temporary = {suffix: Path(config.output + suffix + ".tmp") for suffix in (*PUBLISHED, ".rejects.jsonl")}

    if config.tokenizer:
        Tokenizer(config.tokenizer, config.eod_token)
        shutil.copyfile(config.tokenizer, temporary[".tokenizer.json"])
    else:
        _train(config, files, temporary)
    tokenizer = Tokenizer(temporary[".tokenizer.json"], config.eod_token)

    with Rejects(temporary[".rejects.jsonl"], config.strict) as rejects, _Progress("tokenize", files) as progress:
        documents = read_documents(files, config.text_field, rejects, progress)
        meta, text_bytes = _write_indexed(documents, tokenizer, rejects, config, progress, temporary)
    _publish_rejects(config, meta.documents, temporary[".rejects.jsonl"], meta.rejected)
    temporary[".json"].write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
    # Without its index the pair of an earlier run no longer counts, so a kill between two renames mixes nothing.
    Path(config.output + ".idx").unlink(missing_ok=True)
    for suffix in PUBLISHED:
        os.replace(temporary[suffix], config.output + suffix)
    print(
        f"{config.output}: {meta.documents:,} documents, {meta.tokens:,} tokens ({meta.dtype}), "
        f"{text_bytes / meta.tokens:.2f} bytes/token, vocabulary {meta.vocab_size:,}, "
        f"rejected: {_counts(meta.rejected) or 'none'}"
    )


def _prepare_output(output: str, files: list[Path]) -> None:
    if not output or output.endswith(os.sep) or Path(output).is_dir():
        raise InputError(
            f"output is {output!r}; expected a prefix such as data/corpus, to which .bin and .idx are added"
        )
    written = {os.path.realpath(output + suffix) for suffix in (*PUBLISHED, ".rejects.jsonl")}
    for file in files:
        if os.path.realpath(file) in written:
            raise InputError(f"output {output} would overwrite the input {file}; choose another prefix")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {output}: {error.strerror}: {error.filename}") from error


def _train(config: TokenizeConfig, files: list[Path], temporary: dict[str, Path]) -> None:
    with (
        Rejects(temporary[".rejects.jsonl"], config.strict) as rejects,
        _Progress("train tokenizer", files) as progress,
    ):
        documents = read_documents(files, config.text_field, rejects, progress)
        first = next(documents, None)
        if first is not None:
            texts = _training_texts(itertools.chain([first], documents))
            train_tokenizer(texts, temporary[".tokenizer.json"], config.vocab_size, config.eod_token)
    if first is None:
        _publish_rejects(config, 0, temporary[".rejects.jsonl"], rejects.counts)


def _training_texts(documents: Iterable[Document]) -> Iterator[str]:
    characters = 0
    for count, document in enumerate(documents, start=1):
        yield document.text
        characters += len(document.text)
        if characters >= TRAIN_CHARACTERS:
            print(f"tokenizer: trained on the first {count:,} documents ({characters:,} characters)")
            return


def _write_indexed(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    rejects: Rejects,
    config: TokenizeConfig,
    progress: "_Progress",
    temporary: dict[str, Path],
) -> tuple[IndexedMeta, int]:
    builder = IndexedDatasetBuilder(str(temporary[".bin"]), dtype=tokenizer.dtype)
    eod = numpy.array([tokenizer.eod] if config.append_eod else [], dtype=tokenizer.dtype)
    count = tokens = text_bytes = 0
    for batch, (ids, lengths) in _encoded(documents, tokenizer, config.workers):
        ends = numpy.cumsum(lengths)
        for document, begin, end in zip(batch, ends - lengths, ends, strict=True):
            reason = _reason_against(ids[begin:end], tokenizer.eod)
            if reason:
                rejects.add(document.source, document.line, reason)
                continue
            item = numpy.concatenate((ids[begin:end], eod))
            builder.add_document(item, [item.size])
            count += 1
            tokens += item.size
            text_bytes += len(document.text.encode("utf-8"))
        progress.tokens = tokens
    builder.finalize(str(temporary[".idx"]))
    meta = IndexedMeta(
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod,
        eod_token=tokenizer.eod_token,
        tokenizer_sha256=tokenizer.sha256,
        documents=count,
        tokens=tokens,
        dtype=numpy.dtype(tokenizer.dtype).name,
        append_eod=config.append_eod,
        rejected=dict(sorted(rejects.counts.items())),
    )
    return meta, text_bytes


def _reason_against(ids: numpy.ndarray, eod: int) -> str | None:
    if ids.size == 0:
        return "no tokens"
    if (ids == eod).any():
        return "EOD token in the text"
    return None


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(
    documents: Iterator[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[Document], Encoded]]:
    """Each batch with its ids, in the order of the documents; with one worker in this process."""
    if workers == 1:
        for batch in _batches(documents):
            yield batch, tokenizer.encode_batch([document.text for document in batch])
        return
    # Not forked from here, as this process has threads (torch's, the tokenizer's) whose locks a fork would copy; forked
    # from a server, as a fresh start costs each worker the seconds that importing the package takes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_ptrl.data.tokenizer"])
    identity = (tokenizer.path, tokenizer.eod_token)
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=identity) as pool:
        # Two batches a worker keep all of them busy; more would only pile up when writing is the slow part.
        ahead: deque[tuple[list[Document], Future[Encoded]]] = deque()
        for batch in _batches(documents):
            ahead.append((batch, pool.submit(encode_in_worker, [document.text for document in batch])))
            if len(ahead) > 2 * workers:
                batch, future = ahead.popleft()
                yield batch, future.result()
        for batch, future in ahead:
            yield batch, future.result()


def _publish_rejects(config: TokenizeConfig, documents: int, temporary: Path, counts: Mapping[str, int]) -> None:
    """Give the rejects their final name; InputError when there was nothing else."""
    path = Path(config.output + ".rejects.jsonl")
    if counts:
        os.replace(temporary, path)
    else:
        temporary.unlink()
        path.unlink(missing_ok=True)
    if not documents:
        raise InputError(
            f"{', '.join(config.input)}: no document to tokenize; rejected: {_counts(counts) or 'none'}"
            + (f", see {path}" if counts else "")
        )


def _counts(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())


class _Progress:
    """Bytes of input read so far: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, task: str, files: list[Path]) -> None:
        self.tokens = 0
        self._task = task
        self._total = sum(file.stat().st_size for file in files)
        self._start = self._last = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self._total, desc=task, unit="B", unit_scale=True, disable=not terminal)
        self._report: Callable[[int], None] = self._show_bar if terminal else self._print_line

    def __call__(self, bytes_read: int) -> None:
        self._report(bytes_read)

    def _show_bar(self, bytes_read: int) -> None:
        if self.tokens:
            rate = self.tokens / (time.monotonic() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(bytes_read - self._bar.n)

    def _print_line(self, bytes_read: int) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = f", {self.tokens / (now - self._start):,.0f} tokens/s" if self.tokens else ""
        print(f"{self._task}: {bytes_read / max(self._total, 1):.1%} of {self._total / 1e6:,.1f} MB{rate}", flush=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()
