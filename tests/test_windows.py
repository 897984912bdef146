"""Every token has its value from exactly one piece, with the context that was promised, whatever the lengths."""

import numpy
from hypothesis import given
from hypothesis import strategies as st

from megatron_ptrl.data.windows import Windows, pack

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


@given(LENGTHS, st.integers(1, 12), st.data(), st.integers(1, 4))
def test_pieces_of_all_chunks_cover_every_token_once_in_order(lengths, window, data, chunk):
    overlap = data.draw(st.integers(0, window - 1))
    windows = Windows(numpy.array(lengths, numpy.int32), window=window, overlap=overlap, chunk=chunk)
    seen: list[tuple[int, int]] = []
    for number in range(len(windows)):
        part = windows.chunk(number)
        assert part.first_token == len(seen)
        inputs = 0
        for piece in windows.pieces(number):
            assert piece.inputs <= window and piece.begin + piece.inputs <= max(lengths[piece.document] - 1, 0)
            for token in range(piece.first, piece.end):
                seen.append((piece.document, token))
                check_context(piece, token, lengths[piece.document] - 1, window, overlap)
            inputs += piece.inputs
        assert inputs < (chunk + 1) * window
        assert part.end_token == len(seen)
    assert seen == [(document, token) for document, length in enumerate(lengths) for token in range(length)]


def check_context(piece, token: int, inputs: int, window: int, overlap: int) -> None:
    """By trying all windows: the first that reaches the token's input has the most context of those that do."""
    if token == 0:
        return
    starts = range(0, inputs, window - overlap) if inputs > window else [0]
    reaching = [start for start in starts if start < token <= start + window]
    assert piece.begin == min(reaching)
    assert token <= window or token - piece.begin > overlap
    if inputs <= window:
        assert (piece.begin, piece.inputs) == (0, inputs)


def test_a_document_of_ten_tokens_in_windows_of_four_that_share_two():
    windows = Windows(numpy.array([10]), window=4, overlap=2, chunk=100)
    assert [tuple(piece)[1:] for piece in windows.pieces(0)] == [
        (0, 4, 0, 5),
        (2, 4, 5, 7),
        (4, 4, 7, 9),
        (6, 3, 9, 10),
    ]


@given(st.lists(st.integers(1, 16), max_size=60))
def test_packed_pieces_do_not_overlap_and_waste_little(sizes):
    places = pack(sizes, 16)
    taken = [(row, column + i) for size, (row, column) in zip(sizes, places, strict=True) for i in range(size)]
    assert len(set(taken)) == len(taken) == sum(sizes)
    assert all(column < 16 for _, column in taken)
    rows = 1 + max((row for row, _ in places), default=-1)
    assert set(range(rows)) == {row for row, _ in places}
    # At most one row can be half empty: the pieces of two such rows would have shared one.
    assert rows <= 2 * sum(sizes) // 16 + 1


def test_documents_of_ordinary_lengths_leave_little_padding():
    lengths = numpy.random.default_rng(0).lognormal(5, 1, 5000).astype(int).clip(2, 3000)
    windows = Windows(lengths, window=512, overlap=256, chunk=128)
    sizes = [[piece.inputs for piece in windows.pieces(number)] for number in range(len(windows) - 1)]
    rows = [1 + max(row for row, _ in pack(chunk, 512)) for chunk in sizes]
    assert len(sizes) > 5 and sum(map(sum, sizes)) > 0.98 * sum(rows) * 512
