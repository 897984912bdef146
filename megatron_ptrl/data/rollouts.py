"""Responses with their advantages -> packed rows -> the microbatches of one data-parallel rank.

    TrainedResponse  --pack-->  rows of responses  --microbatches-->  Batch

The rows follow from all responses of a step alone; the ranks then take them in turn, as pre-training's samples.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from megatron_ptrl.data.batches import Batch


@dataclass(frozen=True, slots=True)
class TrainedResponse:
    """A prompt with one response, as the loss sees it."""

    prompt_ids: list[int]
    token_ids: numpy.ndarray
    logprobs: numpy.ndarray
    """By the sampler, of token_ids."""
    advantage: float

    @property
    def size(self) -> int:
        """Positions in a row: every token but the last one is an input."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row: best fit, the largest first; ties by number. O(n log n), one answer for one question.

    Rows are in the order of their first item.
    """
    assert not sizes or max(sizes) <= capacity, f"{max(sizes)} of {capacity} positions"
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (positions left, row), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(space, (sizes[item], -1))
        if place == len(space):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = space.pop(place)
        rows[row].append(item)
        bisect.insort(space, (left - sizes[item], row))
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


def microbatches(
    responses: Sequence[TrainedResponse],
    *,
    seq_length: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    multiple: int = 1,
) -> list[Batch]:
    """This rank's share of the packed responses; every rank gets the same number, a multiple of `multiple`.

    tokens, labels, position_ids, sequence_ids: int64 [b, s]     loss_mask, advantages, rollout_logprobs: fp32 [b, s]

    The mask is 1 where the label is of a response. sequence_ids number the responses of a row from 0, and what fills
    the row up is one more. Rows are taken `micro_batch` at a time by the ranks in turn; what is missing are empty rows.
    """
    rows = pack([response.size for response in responses], seq_length)
    per_round = micro_batch * dp_size
    rounds = -(-len(rows) // (per_round * multiple)) * multiple
    rows += [[] for _ in range(rounds * per_round - len(rows))]
    starts = range(dp_rank * micro_batch, len(rows), per_round)
    return [
        _collate([[responses[i] for i in row] for row in rows[start : start + micro_batch]], seq_length)
        for start in starts
    ]


def _collate(rows: list[list[TrainedResponse]], seq_length: int) -> Batch:
    whole = {name: numpy.zeros((len(rows), seq_length), numpy.int64) for name in ("tokens", "labels", "sequence_ids")}
    parts = {
        name: numpy.zeros((len(rows), seq_length), numpy.float32)
        for name in ("loss_mask", "advantages", "rollout_logprobs")
    }
    positions = numpy.zeros((len(rows), seq_length), numpy.int64)
    for row, responses in enumerate(rows):
        begin = 0
        for number, response in enumerate(responses):
            ids = numpy.concatenate([response.prompt_ids, response.token_ids]).astype(numpy.int64)
            end = begin + response.size
            answer = slice(end - len(response.token_ids), end)
            whole["tokens"][row, begin:end] = ids[:-1]
            whole["labels"][row, begin:end] = ids[1:]
            whole["sequence_ids"][row, begin:end] = number
            positions[row, begin:end] = numpy.arange(response.size)
            parts["loss_mask"][row, answer] = 1.0
            parts["advantages"][row, answer] = response.advantage
            parts["rollout_logprobs"][row, answer] = response.logprobs
            begin = end
        whole["sequence_ids"][row, begin:] = len(responses)
        positions[row, begin:] = numpy.arange(seq_length - begin)
    return {name: torch.from_numpy(values) for name, values in (whole | parts | {"position_ids": positions}).items()}


def barred(sequence_ids: Tensor) -> Tensor:
    """Attention mask (b, 1, s, s) of sequence_ids (b, s): True where a token lies ahead or in another sequence."""
    ahead = torch.ones(2 * sequence_ids.shape[1:], dtype=torch.bool, device=sequence_ids.device).triu(1)
    return ((sequence_ids[:, :, None] != sequence_ids[:, None, :]) | ahead)[:, None]
