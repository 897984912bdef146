"""Documents of any length -> pieces of at most `window` tokens -> rows that hold several pieces -> chunks of rows.

    sequence lengths  ->  Windows  ->  chunks, each some documents' tokens in a row  ->  pieces  ->  pack  ->  rows

The input of token i is token i - 1, so a document of n + 1 tokens has n inputs. With more than `window` it is cut into
windows that begin every `window - overlap` tokens; a token that two of them reach belongs to the earlier one, where
more of its context is seen. All of it follows from the lengths and the three numbers, whatever the layout of the ranks.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy


class Piece(NamedTuple):
    """Inputs [begin, begin + inputs) of a document, which give the values of its tokens [first, end)."""

    document: int
    begin: int
    inputs: int
    first: int
    end: int


class _Place(NamedTuple):
    """Where a chunk begins: a document, a window of it, and that window's first value among the tokens of the data."""

    document: int
    window: int
    token: int


@dataclass(frozen=True)
class Chunk:
    """Tokens [first_token, end_token) of the data, and where in the documents they are."""

    number: int
    first_token: int
    end_token: int


class Windows:
    """The pieces of a data set, cut into chunks of about `chunk` rows.

    lengths: int [documents], tokens of each. While it is made it holds about 50 bytes a document.
    """

    def __init__(self, lengths: numpy.ndarray, *, window: int, overlap: int, chunk: int) -> None:
        self.window, self.overlap = window, overlap
        self._lengths = lengths
        self._places = list(self._find_places(chunk * window))

    def __len__(self) -> int:
        return len(self._places) - 1

    def chunk(self, number: int) -> Chunk:
        """Which tokens chunk `number` gives the values of."""
        return Chunk(number, self._places[number].token, self._places[number + 1].token)

    def pieces(self, number: int) -> Iterator[Piece]:
        """The pieces of chunk `number`; their tokens [first, end) in turn are those of the chunk."""
        begin, end = self._places[number], self._places[number + 1]
        for document in range(begin.document, min(end.document + 1, len(self._lengths))):
            first = begin.window if document == begin.document else 0
            count = self._count(int(self._lengths[document]))
            for window in range(first, end.window if document == end.document else count):
                yield self._piece(document, window)

    def _piece(self, document: int, window: int) -> Piece:
        length, begin = int(self._lengths[document]), window * (self.window - self.overlap)
        inputs = min(self.window, length - 1 - begin)
        return Piece(document, begin, inputs, begin + self.overlap + 1 if window else 0, begin + inputs + 1)

    def _count(self, length: int) -> int:
        if length == 0:
            return 0
        return 1 + max(-(-(length - 1 - self.window) // (self.window - self.overlap)), 0)

    def _find_places(self, cells: int) -> Iterator[_Place]:
        """A piece belongs to the chunk in whose `cells` inputs its first one falls, counted over all pieces."""
        lengths = self._lengths.astype(numpy.int64)
        inputs = numpy.maximum(lengths - 1, 0)
        more = numpy.maximum(-(-(inputs - self.window) // (self.window - self.overlap)), 0)
        ends = (inputs + more * self.overlap).cumsum()
        first_tokens = lengths.cumsum() - lengths
        last_start = int(ends[-1] - inputs[-1] - more[-1] * self.overlap + more[-1] * self.window)
        for start in range(0, last_start + 1, cells):
            # The first document that begins at `start` or later, unless a window of the one before does.
            document = 0 if start == 0 else int(numpy.searchsorted(ends, start)) + 1
            if document:
                before = document - 1
                begun = int(ends[before - 1]) if before else 0
                window = -(-(start - begun) // self.window)
                if window <= more[before]:
                    piece = self._piece(before, window)
                    yield _Place(before, window, int(first_tokens[before]) + piece.first)
                    continue
            yield _Place(document, 0, int(first_tokens[document]))
        yield _Place(len(lengths), 0, int(lengths.sum()))


def pack(sizes: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(row, column) where each size lies in rows of `width`, no two over one another; best fit, largest first.

    Every size is 1 to `width`. Cost: a logarithm of the number of rows for each.
    """
    places = [(0, 0)] * len(sizes)
    rooms: list[tuple[int, int]] = []
    rows = 0
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[number]
        fitting = bisect.bisect_left(rooms, (size, -1))
        if fitting == len(rooms):
            room, row = width, rows
            rows += 1
        else:
            room, row = rooms.pop(fitting)
        places[number] = (row, width - room)
        bisect.insort(rooms, (room - size, row))
    return places
