"""Conversations -> rows of a few whole ones each, epoch after epoch in another order.

    Conversations --an epoch's order--> blocks --pack--> rows, in an order of their own --ChatRows--> microbatches

Which conversations share a row, and where the row stands, follows from the seed and the epoch alone.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy
import torch
from torch import Tensor

from megatron_ptrl.data.chat_store import Conversations
from megatron_ptrl.data.rollouts import barred, pack

# Conversations packed together: enough that rows are full, few enough that `pack` stays fast.
PACKED_TOGETHER = 1 << 13


def epoch_rows(sizes: numpy.ndarray, seq_length: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The rows of one epoch: numbers of conversations, each once, at most `seq_length` positions in a row.

    sizes: positions of each conversation, int64 [n]
    Any two rows of the same block of 8192 hold more than `seq_length` together. Rows are shuffled, because `pack` would
    put those with many short conversations first.
    """
    random = numpy.random.default_rng([seed, epoch])
    order = random.permutation(len(sizes))
    rows: list[list[int]] = []
    for begin in range(0, len(order), PACKED_TOGETHER):
        block = order[begin : begin + PACKED_TOGETHER]
        rows += [[int(block[i]) for i in row] for row in pack(sizes[block].tolist(), seq_length)]
    return [rows[i] for i in random.permutation(len(rows))]


class ChatRows:
    """Rows by their number in the whole run.

    epochs: how often each conversation comes; None for as often as `rows` rows need
    rows: how many rows; None for all of the epochs
    """

    def __init__(
        self,
        conversations: Conversations,
        *,
        seq_length: int,
        vocab_size: int,
        seed: int,
        epochs: int | None = None,
        rows: int | None = None,
    ) -> None:
        assert epochs or rows
        self._conversations, self._seq_length, self.vocab_size = conversations, seq_length, vocab_size
        numbers = itertools.count() if epochs is None else range(epochs)
        self._rows = list(itertools.islice(self._all(numbers, seed), rows))

    def _all(self, epochs: Iterable[int], seed: int) -> Iterator[list[int]]:
        for epoch in epochs:
            yield from epoch_rows(self._conversations.sizes, self._seq_length, seed=seed, epoch=epoch)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold conversations."""
        used = sum(int(self._conversations.sizes[row].sum()) for row in self._rows)
        return used / (len(self._rows) * self._seq_length)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """A row, as `data.batches` stacks them: a batch without the dimension `b`.

        tokens, labels, position_ids: int64 [s]     loss_mask: fp32 [s], 1 where the label is of a response
        attention_mask: bool [1, s, s], True where a token lies ahead or in another conversation

        Positions restart with every conversation; what is left of the row is a sequence of its own.
        """
        s = self._seq_length
        tokens, labels, positions = (numpy.zeros(s, numpy.int64) for _ in range(3))
        loss_mask, sequence_ids = numpy.zeros(s, numpy.float32), numpy.zeros(s, numpy.int64)
        begin = 0
        for number, conversation in enumerate(self._rows[row]):
            ids, is_response = self._conversations[conversation]
            end = begin + len(ids) - 1
            tokens[begin:end], labels[begin:end] = ids[:-1], ids[1:]
            loss_mask[begin:end] = is_response[1:]
            positions[begin:end] = numpy.arange(end - begin)
            sequence_ids[begin:end] = number
            begin = end
        positions[begin:] = numpy.arange(s - begin)
        sequence_ids[begin:] = len(self._rows[row])
        named = {"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": loss_mask}
        mask = barred(torch.from_numpy(sequence_ids)[None])[0]
        return {name: torch.from_numpy(values) for name, values in named.items()} | {"attention_mask": mask}
