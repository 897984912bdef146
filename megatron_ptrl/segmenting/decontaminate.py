"""Evaluation files -> the runs of words in them -> whether a document has one of those.

datatrove's block wants lighteval for its index and spaCy for words.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from megatron_ptrl.data.corpus import find_files, uncompressed
from megatron_ptrl.errors import InputError
from megatron_ptrl.segmenting.words import WordHashes, run_hashes, words_of


def index_runs(inputs: Sequence[str], length: int) -> tuple[numpy.ndarray, int, int]:
    """(sorted uint64 of all runs of `length` words, evaluation texts, how many of them are too short for a run).

    Raises InputError for a file that is missing, or no evaluation data.
    """
    hashes, runs, texts, short = WordHashes(), [numpy.empty(0, numpy.uint64)], 0, 0
    for file in find_files(inputs) if inputs else ():
        for text in _texts_of(file):
            found = run_hashes(hashes(words_of(text)), length)
            texts += 1
            short += not len(found)
            runs.append(found)
    return numpy.unique(numpy.concatenate(runs)), texts, short


def shared_run(words: list[str], hashes: numpy.ndarray, index: numpy.ndarray, length: int) -> str | None:
    """The first run of words that is in the index, as text; None for none."""
    runs = run_hashes(hashes, length)
    if not len(runs) or not len(index):
        return None
    places = numpy.minimum(numpy.searchsorted(index, runs), len(index) - 1)
    found = numpy.flatnonzero(index[places] == runs)
    return " ".join(words[found[0] : found[0] + length]) if len(found) else None


def _texts_of(file: Path) -> Iterator[str]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    yield from _strings_of(record)
            return
        with file.open("rb") as raw, uncompressed(file.name, raw) as stream:
            if ".txt" in file.suffixes[-2:]:
                yield stream.read().decode("utf-8-sig")
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    try:
                        yield from _strings_of(json.loads(line.decode("utf-8-sig")))
                    except ValueError as error:
                        raise InputError(f"{file}:{number}: {error}; expected a line of JSON") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"clean.decontaminate: {file}: {error}") from error
    except ImportError as error:
        raise InputError(f"{file}: reading it needs pyarrow; pip install megatron-ptrl[data]") from error


def _strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings_of(part)
