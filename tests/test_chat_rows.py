"""Packing of conversations: laws for any sizes, and what a row says of what is in it."""

from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ptrl.data import chat_rows
from megatron_ptrl.data.chat import Encoded
from megatron_ptrl.data.chat_rows import ChatRows, epoch_rows


@given(
    sizes=st.lists(st.integers(1, 32), min_size=1, max_size=60),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    together=st.sampled_from([1, 7, 1 << 13]),
)
def test_every_epoch_has_every_conversation_once_in_rows_that_are_full(sizes, seed, epoch, together):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_rows, "PACKED_TOGETHER", together)
        rows = epoch_rows(numpy.array(sizes), 32, seed=seed, epoch=epoch)
        assert rows == epoch_rows(numpy.array(sizes), 32, seed=seed, epoch=epoch)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    used = [sum(sizes[number] for number in row) for row in rows]
    assert max(used) <= 32
    if together == 1 << 13 and len(rows) > 1:
        assert sum(sorted(used)[:2]) > 32, "two rows would fit into one"


def test_epochs_and_seeds_have_orders_of_their_own():
    sizes = numpy.arange(1, 41) % 16 + 1
    orders = [epoch_rows(sizes, 16, seed=seed, epoch=epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({str(rows) for rows in orders}) == 4


def test_short_conversations_do_not_gather_at_the_beginning():
    """`pack` puts rows with many first: without a shuffle the first steps would have other lengths than the last."""
    sizes = numpy.random.default_rng(1).choice([2, 40, 60], 4000)
    rows = epoch_rows(sizes, 64, seed=1, epoch=0)
    first, last = ([len(row) for row in part] for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]))
    assert numpy.mean(first) == pytest.approx(numpy.mean(last), rel=0.2)


class Made:
    """Conversations of known ids: number * 100 and up, of which the last two are the response."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.sizes, self.folder = lengths, numpy.array(lengths) - 1, Path()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Encoded:
        ids = numpy.arange(self.lengths[number], dtype=numpy.int32) + 100 * (number + 1)
        return ids, numpy.arange(len(ids)) >= len(ids) - 2


def chat_rows_of(lengths: list[int], seq_length: int, **options: int) -> ChatRows:
    return ChatRows(Made(lengths), seq_length=seq_length, vocab_size=10_000, seed=3, **options)  # type: ignore[arg-type]


def test_no_target_and_no_attention_reaches_into_another_conversation():
    lengths = [3, 8, 5, 2, 9, 4, 7]
    rows = chat_rows_of(lengths, 16, epochs=1)
    targets: Counter[int] = Counter()
    for number in range(len(rows)):
        row = rows[number]
        tokens, labels, mask = row["tokens"], row["labels"], row["loss_mask"]
        filled = tokens > 0
        assert torch.equal(labels[filled], tokens[filled] + 1), "the next token of the same conversation"
        targets.update(labels[mask > 0].tolist())
        begins = (tokens % 100 == 0) & filled
        assert torch.equal(row["position_ids"][filled], tokens[filled] % 100)
        owner = torch.where(filled, tokens // 100, 0)
        assert begins.sum() == owner[filled].unique().numel() and not mask[~filled].any()
        for query in range(16):
            seen = (~row["attention_mask"][0, query]).nonzero()[:, 0].tolist()
            assert seen == [key for key in range(query + 1) if owner[key] == owner[query]]
    expected = {100 * (n + 1) + length - k for n, length in enumerate(lengths) for k in (1, 2)}
    # The first token of a conversation of two, both of the response, has nothing before it.
    assert targets == Counter(expected - {400})


def test_rows_go_on_over_the_epochs_and_a_longer_run_begins_with_a_shorter_one():
    lengths = [3, 8, 5, 2, 9, 4, 7]
    three, one = chat_rows_of(lengths, 16, epochs=3), chat_rows_of(lengths, 16, epochs=1)
    longer = chat_rows_of(lengths, 16, rows=len(three) + 5)
    assert len(longer) == len(three) + 5 and chat_rows_of(lengths, 16, epochs=3, rows=2)._rows == three._rows[:2]
    assert longer._rows[: len(three)] == three._rows and three._rows[: len(one)] == one._rows
    assert Counter(number for row in three._rows for number in row) == dict.fromkeys(range(7), 3)
    assert three.fill == 3 * (sum(lengths) - 7) / (16 * len(three))
