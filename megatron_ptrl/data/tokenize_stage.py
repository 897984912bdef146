"""Raw text -> PREFIX.tokenizer.json, PREFIX.bin, PREFIX.idx, PREFIX.json, PREFIX.rejects.jsonl.

    corpus.read_documents  ->  batches of texts  ->  Tokenizer.encode_batch, in `workers` processes
                           ->  Megatron-Core's IndexedDatasetBuilder, in the order of the input

The files are complete or absent, as `indexed_output` says.
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ptrl.config import TokenizeConfig
from megatron_ptrl.data.corpus import Rejects, find_files, read_documents
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
from megatron_ptrl.data.tokenizer import Tokenizer, encode_in_worker, start_worker, train_tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Document

# A batch is big enough to hide the cost of handing it to a process, and small enough that a few of them are no load.
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20
# Merges hardly change beyond this much text, and the trainer holds every distinct word in memory.
TRAIN_CHARACTERS = 1 << 29

Encoded = tuple[numpy.ndarray, numpy.ndarray]


def run(config: TokenizeConfig) -> None:
    """Tokenize `config.input` into `config.output`.*; prints a summary.

    The bytes of every file depend on the input and the tokenizer, not on `config.workers`.
    Raises InputError for bad input, a corpus without a document, or with `strict` the first bad record.
    """
    files = find_files(config.input, config.output)
    with temporary_output(config.output, files) as temporary:
        meta, text_bytes = _write(config, files, temporary)
    print(
        f"{config.output}: {meta.documents:,} documents, {meta.tokens:,} tokens ({meta.dtype}), "
        f"{text_bytes / meta.tokens:.2f} bytes/token, vocabulary {meta.vocab_size:,}, "
        f"rejected: {count_text(meta.rejected)}"
    )


def _write(config: TokenizeConfig, files: list[Path], temporary: dict[str, Path]) -> tuple[IndexedMeta, int]:
    """All five files, under their names in the end; the metadata, and the bytes of text behind the tokens."""
    if config.tokenizer:
        Tokenizer(config.tokenizer, config.eod_token)
        shutil.copyfile(config.tokenizer, temporary[".tokenizer.json"])
    else:
        _train(config, files, temporary)
    tokenizer = Tokenizer(temporary[".tokenizer.json"], config.eod_token)

    with Rejects(temporary[REJECTS], config.strict) as rejects, Progress("tokenize", files) as progress:
        documents = read_documents(files, config.text_field, rejects, progress)
        meta, text_bytes = _write_indexed(documents, tokenizer, rejects, config, progress, temporary)
    _publish_rejects(config, meta.documents, temporary[REJECTS], meta.rejected)
    temporary[".json"].write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
    publish(config.output, temporary)
    return meta, text_bytes


def _train(config: TokenizeConfig, files: list[Path], temporary: dict[str, Path]) -> None:
    with (
        Rejects(temporary[REJECTS], config.strict) as rejects,
        Progress("train tokenizer", files) as progress,
    ):
        documents = read_documents(files, config.text_field, rejects, progress)
        first = next(documents, None)
        if first is not None:
            texts = _training_texts(itertools.chain([first], documents))
            train_tokenizer(texts, temporary[".tokenizer.json"], config.vocab_size, config.eod_token)
    if first is None:
        _publish_rejects(config, 0, temporary[REJECTS], rejects.counts)


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
    progress: Progress,
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
    identity = (tokenizer.path, tokenizer.eod_token)
    pairs = ((batch, [document.text for document in batch]) for batch in _batches(documents))
    yield from in_order(pairs, encode_in_worker, workers, start_worker, identity)


def _publish_rejects(config: TokenizeConfig, documents: int, temporary: Path, counts: Mapping[str, int]) -> None:
    """Give the rejects their final name; InputError when there was nothing else."""
    path = publish_rejects(config.output, temporary, counts)
    if not documents:
        raise InputError(
            f"{', '.join(config.input)}: no document to tokenize; rejected: {count_text(counts)}"
            + (f", see {path}" if path else "")
        )
