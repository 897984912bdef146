"""A log-probability for every token of a `.bin/.idx` pair: OUTPUT.bin, OUTPUT.idx, OUTPUT.json.

    data PREFIX.bin/.idx + a value per token, in order  ->  publish  ->  SideCar.open, check, read

Value i of a document is log p(token i | the tokens before it in that document) in nats, its first one is given the
end-of-document token alone. The pair is one of Megatron's with the lengths and the document boundaries of the data:
fp32, or bf16 whose bits are stored as uint16, which IndexedDataset knows. OUTPUT.json is written last: where it exists,
the rest is whole.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_ptrl.data.indexed import HEADER, check_pair
from megatron_ptrl.data.parts import Part
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError

FORMAT = 1
STORAGE = {"fp32": numpy.float32, "bf16": numpy.uint16}
# Blocks of a `.bin` that tell two data sets of the same lengths apart without reading terabytes.
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16
# Sequences whose lengths and offsets are copied at a time.
INDEX_BLOCK = 1 << 20


@dataclass(frozen=True)
class DataIdentity:
    """Which `.bin/.idx` pair it is, as far as a few megabytes and the index tell."""

    index_sha256: str
    bin_bytes: int
    sample_sha256: str
    """Of 64 blocks of 64 KiB spread evenly over the `.bin`, or of all of it where it is smaller."""


def identify(prefix: str) -> DataIdentity:
    """The identity of PREFIX.bin/.idx. Reads the index and at most 4 MiB of the tokens."""
    size, sample = os.path.getsize(prefix + ".bin"), hashlib.sha256()
    blocks = min(SAMPLED_BLOCKS, -(-size // BLOCK_BYTES))
    with open(prefix + ".bin", "rb") as stream:
        for block in range(blocks):
            stream.seek(block * (size - BLOCK_BYTES) // max(blocks - 1, 1) if size > BLOCK_BYTES else 0)
            sample.update(stream.read(BLOCK_BYTES))
    return DataIdentity(hash_file(prefix + ".idx"), size, sample.hexdigest())


def hash_file(path: str | Path) -> str:
    """SHA-256 of a whole file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class SideCarMeta:
    """What OUTPUT.json says."""

    format: int = FORMAT
    storage: str
    """fp32 or bf16."""
    data: DataIdentity
    data_sha256: str
    """Of the whole `.bin` of the data."""
    tokenizer_sha256: str
    reference: dict[str, Any]
    """The model that gave the values: its checkpoint, a digest of that, its settings."""
    window: int
    """Tokens that one forward pass saw at most."""
    overlap: int
    """Tokens of context that a window of a long document shares with the one before."""
    documents: int
    tokens: int
    mean_logprob: float
    """In nats a token, before rounding to the storage."""
    values: DataIdentity | None = None
    """The pair of the side-car itself; None in one that was made before this was noted."""


def read_sidecar_meta(prefix: str) -> SideCarMeta | None:
    """PREFIX.json, None when there is none. Raises InputError when it is something else or of another format."""
    path = Path(prefix + ".json")
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format"]
        if version == FORMAT and values["storage"] not in STORAGE:
            raise ValueError(f"storage {values['storage']}")
        if version == FORMAT and not (
            isinstance(values["tokenizer_sha256"], str) and isinstance(values["reference"], dict)
        ):
            raise ValueError("tokenizer_sha256 or reference of another type")
        if version == FORMAT:
            own = values.get("values")
            pairs = {"data": DataIdentity(**values["data"]), "values": DataIdentity(**own) if own else None}
            return SideCarMeta(**{**values, **pairs})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}: not the description of a side-car ({error!r}); expected one of `ptrl score`"
        ) from error
    raise InputError(f"{path}: a side-car of format {version}, this version reads {FORMAT}; score the data again")


class SideCar:
    """A finished side-car, opened for reading. It can be pickled."""

    def __init__(self, prefix: str, meta: SideCarMeta) -> None:
        self.prefix = prefix
        self.meta = meta
        self.digest = hash_file(prefix + ".json")
        """Another one for other values, wherever the side-car lies."""
        self._indexed = IndexedDataset(prefix)

    @classmethod
    def open(cls, prefix: str) -> "SideCar":
        """Raises InputError for one that is missing, unfinished, truncated, changed or of an unknown format.

        Reads as much as `identify`.
        """
        meta = read_sidecar_meta(prefix)
        if meta is None:
            begun = Path(prefix + ".parts").exists()
            state = "the side-car is not finished; repeat its `ptrl score`" if begun else "make it with `ptrl score`"
            raise InputError(f"{prefix}.json: no such file; {state}")
        remedy = f"remove {prefix}.* and score the data again, or copy all of these files again"
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                raise InputError(f"{prefix}{suffix}: no such file; {remedy}")
        check_pair(prefix, remedy)
        sidecar = cls(prefix, meta)
        lengths = sidecar._indexed.sequence_lengths
        found = (numpy.dtype(sidecar._indexed.index.dtype).name, len(lengths), int(lengths.sum(dtype=numpy.int64)))
        expected = (numpy.dtype(STORAGE[meta.storage]).name, meta.documents, meta.tokens)
        if found != expected:
            raise InputError(
                f"{prefix}: type, documents and tokens of the pair are {found}, {prefix}.json says {expected}; {remedy}"
            )
        if meta.values not in (None, identify(prefix)):
            raise InputError(f"{prefix}: the values are not those that {prefix}.json was written with; {remedy}")
        return sidecar

    def check(self, data: Part, tokenizer: Tokenizer) -> None:
        """Raise InputError unless the values belong to this data set and tokenizer. Reads as much as `identify`."""
        if self.meta.tokenizer_sha256 != tokenizer.sha256:
            raise InputError(
                f"side-car {self.prefix} belongs to another tokenizer (sha256 {self.meta.tokenizer_sha256[:12]}) than "
                f"{tokenizer.path} ({tokenizer.sha256[:12]}); expected the one of {data.prefix}"
            )
        mine, theirs = dataclasses.asdict(self.meta.data), dataclasses.asdict(identify(data.prefix))
        different = [name for name in mine if mine[name] != theirs[name]]
        if different or not numpy.array_equal(self._indexed.sequence_lengths, data.indexed.sequence_lengths):
            raise InputError(
                f"side-car {self.prefix} belongs to another data set than {data.prefix}, or that has changed since "
                f"(different: {', '.join(different) or 'lengths'}); make one with `ptrl score --data {data.prefix}`"
            )

    def read(self, document: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        """float32 [length], nats: values from `offset` on of a sequence, to its end with None.

        `document` is the sequence's number, as in IndexedDataset.get. Raises InputError for a value that is no
        log-probability: NaN, infinite or positive.
        """
        stored = self._indexed.get(document, offset, length)
        values = from_bf16(stored) if self.meta.storage == "bf16" else stored.copy()
        position = first_invalid(values)
        if position is not None:
            raise InputError(
                f"side-car {self.prefix}, document {document}, token {offset + position}: {values[position]} is no "
                "log-probability; score the data again"
            )
        return values


def first_invalid(values: numpy.ndarray) -> int | None:
    """Position of the first of the values that is not in (-inf, 0]."""
    # min and max hand NaN on, and nothing compares with it.
    if values.size == 0 or (values.max() <= 0 and values.min() > -numpy.inf):
        return None
    return int(numpy.flatnonzero(~((values <= 0) & (values > -numpy.inf)))[0])


def to_bf16(values: numpy.ndarray) -> numpy.ndarray:
    """float32 -> the bits of bf16 as uint16, rounded to nearest, ties to even. Values must be finite."""
    bits = values.view(numpy.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(numpy.uint16)


def from_bf16(bits: numpy.ndarray) -> numpy.ndarray:
    """The bits of bf16 as uint16 -> float32, exactly."""
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def encode(values: numpy.ndarray, storage: str) -> bytes:
    """float32 values as they lie in OUTPUT.bin."""
    return (to_bf16(values) if storage == "bf16" else values).tobytes()


def publish(output: str, data_prefix: str, payload: Iterable[bytes], meta: SideCarMeta) -> None:
    """Write OUTPUT.bin from the `encode`d values of all tokens in order, OUTPUT.idx, and OUTPUT.json at the end.

    Each is written under another name, brought to the disk and renamed; memory is bounded by a piece of the payload.
    Raises InputError when the payload has not one value for every token of the data.
    """
    written = 0
    with Durably(output + ".bin") as stream:
        for piece in payload:
            written += stream.write(piece)
        expected = meta.tokens * numpy.dtype(STORAGE[meta.storage]).itemsize
        if written != expected:
            raise InputError(f"{output}.bin: {written} bytes of values, expected {expected} for {meta.tokens} tokens")
    _write_index(output + ".idx", data_prefix, STORAGE[meta.storage])
    meta = dataclasses.replace(meta, values=identify(output))
    with Durably(output + ".json") as stream:
        stream.write((json.dumps(dataclasses.asdict(meta), indent=1) + "\n").encode())


def _write_index(path: str, data_prefix: str, dtype: type) -> None:
    """The index of the data with another type and the offsets that follow from it."""
    index = IndexedDataset(data_prefix).index
    with open(data_prefix + ".idx", "rb") as stream:
        magic, version, _, sequences, boundaries = HEADER.unpack(stream.read(HEADER.size))
    with Durably(path) as stream:
        stream.write(HEADER.pack(magic, version, DType.code_from_dtype(dtype), sequences, boundaries))
        blocks, item_bytes = range(0, sequences, INDEX_BLOCK), numpy.dtype(dtype).itemsize
        for begin in blocks:
            stream.write(index.sequence_lengths[begin : begin + INDEX_BLOCK].tobytes())
        offset = 0
        for begin in blocks:
            sizes = index.sequence_lengths[begin : begin + INDEX_BLOCK].astype(numpy.int64) * item_bytes
            ends = offset + sizes.cumsum()
            stream.write((ends - sizes).tobytes())
            offset = int(ends[-1])
        stream.write(index.document_indices.tobytes())


class Durably:
    """A file that gets its name when it is whole and on the disk; an error inside leaves no file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stream = open(path + ".tmp", "wb")

    def __enter__(self) -> Any:
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()
        if kind is None:
            os.replace(self._path + ".tmp", self._path)
        else:
            os.unlink(self._path + ".tmp")
