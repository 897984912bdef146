"""Documents -> which of them nearly repeat an earlier one, by MinHash.

    each part:  document  ->  band_keys  ->  OUTPUT/clean/signatures/00000.npy
    all parts:  documents that share a key are of one cluster  ->  find_duplicates  ->  OUTPUT/clean/duplicates.npy

datatrove's blocks for this need spaCy for words, and which document of a cluster they keep depends on how the corpus
is shared out. Here it is the first one.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy

from megatron_ptrl.data.input_parts import Position
from megatron_ptrl.segmenting.words import run_hashes

SHINGLE = 5
BANDS, ROWS = 14, 8
SIGNATURE = numpy.dtype([("file", "<i4"), ("line", "<i8"), ("keys", "<u8", (BANDS,))])
DUPLICATE = numpy.dtype([(name, "<i8") for name in ("part", "file", "line", "of_part", "of_file", "of_line")])

_random = numpy.random.RandomState(1)
# a x + b mod 2^64 with odd a: another order of the 64-bit hashes for each of the rows.
_A = _random.randint(0, 1 << 63, BANDS * ROWS, numpy.uint64) * numpy.uint64(2) + numpy.uint64(1)
_B = _random.randint(0, 1 << 63, BANDS * ROWS, numpy.uint64)
# Enough that calls cost little beside the words, few enough that they stay in the cache.
_WORDS_AT_ONCE = 1 << 14


def band_keys(word_hashes: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """(documents, 14) uint64 of documents by their words, uint64, of which each has five at least.

    Two documents whose sets of 5-word runs have Jaccard similarity s share at least one key with probability
    1 - (1 - s^8)^14: 0.92 at 0.8, 0.13 at 0.56.
    """
    lengths = numpy.array([len(hashes) for hashes in word_hashes])
    inside = numpy.ones(lengths.sum(), bool)
    for k in range(1, SHINGLE):
        inside[numpy.cumsum(lengths) - k] = False
    shingles = run_hashes(numpy.concatenate(word_hashes), SHINGLE)[inside[: 1 - SHINGLE]]
    begins = numpy.cumsum(lengths - SHINGLE + 1) - (lengths - SHINGLE + 1)
    least = numpy.empty((BANDS * ROWS, len(lengths)), numpy.uint64)
    order = numpy.empty_like(shingles)
    for row in range(BANDS * ROWS):
        numpy.multiply(shingles, _A[row], out=order)
        numpy.add(order, _B[row], out=order)
        numpy.minimum.reduceat(order, begins, out=least[row])
    bands = least.reshape(BANDS, ROWS, len(lengths))
    return numpy.concatenate([run_hashes(band, ROWS) for band in bands]).T


def signatures(documents: Iterable[tuple[Position, numpy.ndarray]]) -> numpy.ndarray:
    """SIGNATURE rows of a part's documents, given their words' hashes; those too short for one are left out."""
    long_enough = (document for document in documents if len(document[1]) >= SHINGLE)
    found = [numpy.empty(0, SIGNATURE)]
    for batch in _batches(long_enough):
        rows = numpy.empty(len(batch), SIGNATURE)
        rows["file"], rows["line"] = numpy.array([position for position, _ in batch]).T
        rows["keys"] = band_keys([hashes for _, hashes in batch])
        found.append(rows)
    return numpy.concatenate(found)


def _batches(
    documents: Iterable[tuple[Position, numpy.ndarray]],
) -> Iterator[list[tuple[Position, numpy.ndarray]]]:
    batch, words = [], 0
    for document in documents:
        batch.append(document)
        words += len(document[1])
        if words >= _WORDS_AT_ONCE:
            yield batch
            batch, words = [], 0
    if batch:
        yield batch


def find_duplicates(parts: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """DUPLICATE rows, one for each document that is not the first of its cluster, in the order of the corpus.

    parts: each part's SIGNATURE rows, in order
    Cost: 40 bytes of memory a document, besides the rows; a sort for each of the 14 bands.
    """
    sizes = [len(rows) for rows in parts]
    first = numpy.arange(sum(sizes))

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = first[first[index]]
            index = int(first[index])
        return index

    for band in range(BANDS):
        keys = numpy.concatenate([rows["keys"][:, band] for rows in parts]) if parts else numpy.empty(0)
        order = numpy.argsort(keys, kind="stable")
        same = numpy.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        for place in same:
            one, other = root(int(order[place])), root(int(order[place + 1]))
            first[max(one, other)] = min(one, other)
    part_of = numpy.repeat(numpy.arange(len(parts)), sizes)
    begins = numpy.concatenate([[0], numpy.cumsum(sizes)]).astype(int)

    def place_of(index: int) -> tuple[int, int, int]:
        part = int(part_of[index])
        row = parts[part][index - begins[part]]
        return part, int(row["file"]), int(row["line"])

    repeats = numpy.flatnonzero(first != numpy.arange(len(first)))
    return numpy.array([(*place_of(int(i)), *place_of(root(int(i)))) for i in repeats], DUPLICATE)
