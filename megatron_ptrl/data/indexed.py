"""PREFIX.bin, PREFIX.idx, PREFIX.json -> an opened IndexedDataset that is what its index says, and its metadata.

Ids beyond the vocabulary are not searched for here: reading terabytes of `.bin` would delay every start, and
`batches.microbatches` looks at each batch anyway, at no cost, before the model can.
"""

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_ptrl.config import DataConfig
from megatron_ptrl.data.tokenizer import DEFAULT_EOD, Tokenizer
from megatron_ptrl.errors import InputError

# Magic, version, dtype code, number of sequences, number of document boundaries.
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
# Per sequence an int32 length and an int64 offset, per document boundary an int64.
SEQUENCE_BYTES, DOCUMENT_BYTES = 12, 8


@dataclass(frozen=True, kw_only=True)
class IndexedMeta:
    """What PREFIX.json says of a `.bin/.idx` pair."""

    vocab_size: int
    eod_id: int
    eod_token: str
    tokenizer_sha256: str
    documents: int
    tokens: int
    dtype: str
    append_eod: bool
    rejected: dict[str, int]
    """Bad records left out, by reason."""


def open_indexed(prefix: str) -> tuple[IndexedDataset, IndexedMeta | None]:
    """Open a pair after checking it; metadata is None when PREFIX.json is missing, as beside Megatron's own tools.

    Raises InputError for a missing or truncated file, sizes that disagree, an empty dataset, or broken metadata.
    """
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            stem = prefix.removesuffix(".bin").removesuffix(".idx")
            if stem != prefix:
                raise InputError(f"{prefix}{suffix}: no such file; give the prefix without its suffix, {stem}")
            flags = f"--input {prefix} first" if Path(prefix).exists() else f"--output {prefix}"
            raise InputError(f"{prefix}{suffix}: no such file; run `ptrl tokenize` with {flags}")
    check_pair(prefix, f"tokenize {prefix} again, or copy both of its files again")
    return IndexedDataset(prefix), read_meta(prefix)


def check_pair(prefix: str, remedy: str) -> None:
    """Raise InputError where an existing `.bin/.idx` contradicts itself; `remedy` says what to do then."""
    idx = Path(prefix + ".idx")
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise InputError(f"{idx}: {size} bytes, shorter than an index header; {remedy}")
    magic, version, code, sequences, boundaries = HEADER.unpack(header)
    if magic != MAGIC or version != 1 or code not in {dtype.value for dtype in DType}:
        raise InputError(f"{idx}: not an index of Megatron's IndexedDataset; {remedy}")
    expected = HEADER.size + sequences * SEQUENCE_BYTES + boundaries * DOCUMENT_BYTES
    # A multimodal index has one more byte a sequence.
    if size not in (expected, expected + sequences):
        raise InputError(f"{idx}: {size} bytes, expected {expected} for {sequences} sequences; {remedy}")
    if sequences == 0:
        raise InputError(f"{prefix}: no documents in it; tokenize a corpus that is not empty")
    lengths = numpy.memmap(idx, numpy.int32, "r", HEADER.size, sequences)
    tokens = int(lengths.sum(dtype=numpy.int64))
    last = HEADER.size + sequences * SEQUENCE_BYTES + (boundaries - 1) * DOCUMENT_BYTES
    if boundaries < 1 or int(numpy.memmap(idx, numpy.int64, "r", last, 1)[0]) != sequences or lengths.min() < 0:
        raise InputError(f"{idx}: its document boundaries do not end at its {sequences} sequences; {remedy}")
    stored = os.path.getsize(prefix + ".bin")
    if stored != tokens * DType.size(code):
        raise InputError(f"{prefix}.bin: {stored} bytes, expected {tokens * DType.size(code)} by its index; {remedy}")
    if tokens == 0:
        raise InputError(f"{prefix}: no tokens in it; tokenize a corpus that is not empty")


def read_meta(prefix: str) -> IndexedMeta | None:
    """PREFIX.json, or None when there is none. Raises InputError when it is not metadata."""
    path = Path(prefix + ".json")
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return IndexedMeta(**values)
    except (ValueError, TypeError) as error:
        expected = ", ".join(field.name for field in fields(IndexedMeta))
        raise InputError(f"{path}: not the metadata of a tokenization ({error}); expected {expected}") from error


def load_blend(items: Sequence[str | float]) -> list[tuple[float, str]]:
    """`[0.7, a, 0.3, b]`, or `[a, b]` weighted by their numbers of tokens, -> [(weight, prefix)], weights of sum 1.

    Tokens, because then every token of all parts is seen equally often. A prefix that reads as a number is written
    `./7`. Raises InputError for a list in neither form, or a weight that is not a positive number.
    """
    words = [str(item) for item in items]
    if not words:
        raise InputError("data.train is empty; expected prefixes, each optionally preceded by its weight")
    numbers = [_as_number(item) for item in words]
    if any(number is not None for number in numbers):
        weights, prefixes = numbers[0::2], words[1::2]
        if len(words) % 2 or None in weights or any(number is not None for number in numbers[1::2]):
            raise InputError(
                f"data blend {words} mixes forms; expected [weight, prefix, weight, prefix] or only prefixes"
            )
    else:
        prefixes = words
        weights = [float(count_tokens(prefix)) for prefix in prefixes]
    parts = [weight or 0.0 for weight in weights]
    for weight, prefix in zip(parts, prefixes, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"data blend: weight {weight} of {prefix}; expected a positive number")
    return [(weight / sum(parts), prefix) for weight, prefix in zip(parts, prefixes, strict=True)]


def count_tokens(prefix: str) -> int:
    """Tokens of a pair, by its index. Raises InputError as `open_indexed` does."""
    # The arrays of a dataset lie in a map that closes with it, so it must outlive the sum.
    dataset, _ = open_indexed(prefix)
    return int(dataset.sequence_lengths.sum(dtype=numpy.int64))


def _as_number(item: str) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def resolve_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of a run: `data.tokenizer`, or the one beside the first training prefix.

    Its EOD token is `data.eod_token`, or the one that the first prefix's metadata names. Every prefix of the run is
    held against it. Raises InputError when it is missing or a prefix was tokenized with another.
    """
    prefixes = [prefix for items in (data.train, data.valid) if items for _, prefix in load_blend(items)]
    metas = [(prefix, read_meta(prefix)) for prefix in prefixes]
    first, meta = metas[0]
    if data.tokenizer is None and not Path(first + ".tokenizer.json").is_file():
        raise InputError(f"{first}.tokenizer.json: no such file; name the tokenizer of {first} by data.tokenizer")
    eod_token = data.eod_token or (meta.eod_token if meta else DEFAULT_EOD)
    tokenizer = Tokenizer(data.tokenizer or first + ".tokenizer.json", eod_token)
    check_same_tokenizer(metas, tokenizer, explicit=data.tokenizer is not None)
    return tokenizer


def check_same_tokenizer(
    parts: Sequence[tuple[str, IndexedMeta | None]], tokenizer: Tokenizer, *, explicit: bool
) -> None:
    """Raise InputError unless every (prefix, metadata) was tokenized with `tokenizer` and its EOD.

    A prefix without metadata is believed when the tokenizer was named explicitly.
    """
    first = parts[0][0]
    for prefix, meta in parts:
        if meta is None:
            if not explicit:
                raise InputError(f"{prefix}.json: no such file, so its tokenizer is unknown; name it by data.tokenizer")
        elif meta.tokenizer_sha256 != tokenizer.sha256:
            raise InputError(
                f"{prefix} was tokenized with {prefix}.tokenizer.json (sha256 {meta.tokenizer_sha256[:12]}), "
                f"{'but data.tokenizer is' if explicit else f'{first} with'} {tokenizer.path} "
                f"(sha256 {tokenizer.sha256[:12]}); tokenize both with one, by --tokenizer"
            )
        elif meta.append_eod and meta.eod_id != tokenizer.eod:
            raise InputError(
                f"{prefix} ends its documents with {meta.eod_token!r} (id {meta.eod_id}), "
                f"{first} with {tokenizer.eod_token!r} (id {tokenizer.eod}); set data.eod_token to the one in the data"
            )
