"""`DataConfig` -> which documents of which prefixes train, which are held out, and how they are weighted.

    data.train, data.valid, data.split  ->  load_blend  ->  open_indexed  ->  training parts, held-out parts

Documents are split by their order in the file: the held-out ones of `95,5` are the last 5 % of each prefix.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ptrl.config import DataConfig
from megatron_ptrl.data.indexed import check_same_tokenizer, load_blend, open_indexed
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError


@dataclass(frozen=True)
class Part:
    """Documents [begin, end) of one prefix, and its share of a blend."""

    weight: float
    prefix: str
    indexed: IndexedDataset
    begin: int
    end: int


def open_parts(
    data: DataConfig, tokenizer: Tokenizer, *, needs_ends: str | None = None
) -> tuple[list[Part], list[Part]]:
    """(training parts, held-out parts), every prefix opened once and checked against `tokenizer`.

    needs_ends: the setting that tells documents by their ends, besides data.isolate_documents
    Raises InputError for broken files, another tokenizer, a malformed blend or split, or documents without ends where
    a setting needs them.
    """
    needs_ends = "data.isolate_documents" if data.isolate_documents else needs_ends
    blends = [load_blend(data.train), load_blend(data.valid or data.train)]
    prefixes = dict.fromkeys(prefix for blend in blends for _, prefix in blend)
    opened = {prefix: open_indexed(prefix) for prefix in prefixes}
    metas = [(prefix, meta) for prefix, (_, meta) in opened.items()]
    check_same_tokenizer(metas, tokenizer, explicit=data.tokenizer is not None)
    for prefix, meta in metas:
        if needs_ends and meta and not meta.append_eod:
            raise InputError(f"{needs_ends}: {prefix} has no ends of documents; tokenize it with append_eod")
    spans = [(0.0, 1.0)] * 2 if data.valid else _split_bounds(data.split)

    def part(weight: float, prefix: str, span: tuple[float, float]) -> Part:
        indexed = opened[prefix][0]
        return Part(weight, prefix, indexed, round(span[0] * len(indexed)), round(span[1] * len(indexed)))

    train, held_out = ([part(*item, span) for item in blend] for blend, span in zip(blends, spans, strict=True))
    return train, held_out


def _split_bounds(split: str) -> list[tuple[float, float]]:
    """'95,5' -> [(0.0, 0.95), (0.95, 1.0)]; a third share is left out of both."""
    expected = f"data.split is {split!r}; expected shares of documents for training and validation such as 95,5"
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError as error:
        raise InputError(expected) from error
    if len(shares) > 3 or not all(0 <= share < float("inf") for share in shares) or sum(shares) == 0:
        raise InputError(expected)
    train, held_out = ([share / sum(shares) for share in shares] + [0.0])[:2]
    return [(0.0, train), (train, min(train + held_out, 1.0))]


def check_enough(part: Part, name: str, data: DataConfig) -> None:
    """Raise InputError when the part has no document, or not one sequence of tokens. `name`: "train" or "valid"."""
    where = f"{part.prefix}, {name} documents"
    if part.begin == part.end:
        raise InputError(
            f"{where}: none of its {len(part.indexed)} by data.split {data.split!r}; change the shares, give "
            "data.valid, or set train.eval_samples 0 to hold out nothing"
        )
    tokens = int(part.indexed.sequence_lengths[part.begin : part.end].sum(dtype=numpy.int64))
    if tokens <= data.seq_length:
        raise InputError(
            f"{where}: {tokens} tokens, too few for one sequence of data.seq_length {data.seq_length} and its last "
            "label; give more data or a shorter sequence"
        )


def index_identity(parts: Sequence[Part], tokenizer: Tokenizer) -> dict[str, str]:
    """What a cached sample index depends on besides its configuration, as sha256 digests by name.

    It holds positions in documents, so it is good for as long as their lengths, all of the `.idx`, stay the same.
    """
    identity = {"tokenizer": tokenizer.sha256}
    for part in parts:
        digest = hashlib.sha256()
        with open(part.prefix + ".idx", "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        identity[part.prefix] = digest.hexdigest()
    return identity
