"""Responses -> rows: nothing lost, the same rows for every layout, attention within a response alone."""

import numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ptrl.data.rollouts import TrainedResponse, barred, microbatches, pack

SIZES = st.lists(st.integers(1, 32), max_size=60)


@given(SIZES)
def test_every_item_is_packed_once_and_fits(sizes):
    rows = pack(sizes, 32)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[item] for item in row) <= 32 for row in rows)
    # Two rows that would fit into one are never left.
    left = sorted(sum(sizes[item] for item in row) for row in rows)
    assert len(left) < 2 or left[0] + left[1] > 32


def test_worked_rows():
    assert pack([5, 3, 10, 2, 7], 10) == [[0, 3], [1, 4], [2]]
    assert pack([], 10) == []


def responses(count: int = 11) -> list[TrainedResponse]:
    generator = numpy.random.default_rng(1)
    found = []
    for i in range(count):
        prompt, answer = (generator.integers(1, 99, generator.integers(1, 7)) for _ in range(2))
        logprobs = -generator.random(len(answer)).astype(numpy.float32)
        found.append(TrainedResponse(prompt.tolist(), answer.astype(numpy.int32), logprobs, float(i - 5)))
    return found


def labelled(batches: list) -> list[tuple]:
    """(token before, label, its position, advantage, log-probability) of every token of a response."""
    found = []
    for batch in batches:
        kept = batch["loss_mask"] == 1
        names = ("tokens", "labels", "position_ids", "advantages", "rollout_logprobs")
        found += zip(*(batch[name][kept].tolist() for name in names), strict=True)
    return sorted(found)


def test_every_token_of_every_response_is_a_label_once_under_any_layout():
    expected = []
    for r in responses():
        ids = [*r.prompt_ids, *r.token_ids.tolist()]
        for place, (label, logprob) in enumerate(zip(r.token_ids.tolist(), r.logprobs.tolist(), strict=True)):
            position = len(r.prompt_ids) - 1 + place
            expected.append((ids[position], label, position, r.advantage, logprob))
    for dp, micro, multiple in ((1, 1, 1), (1, 3, 1), (2, 2, 1), (4, 1, 2)):
        ranks = [
            microbatches(responses(), seq_length=16, micro_batch=micro, dp_rank=rank, dp_size=dp, multiple=multiple)
            for rank in range(dp)
        ]
        assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) % multiple == 0
        assert labelled([batch for batches in ranks for batch in batches]) == sorted(expected)
        # The ranks take the rows in turn, as they are packed.
        rows = torch.cat([batch["tokens"] for round in zip(*ranks, strict=True) for batch in round])
        whole = microbatches(responses(), seq_length=16, micro_batch=1, dp_rank=0, dp_size=1)
        alone = torch.cat([batch["tokens"] for batch in whole])
        assert torch.equal(rows[: len(alone)], alone) and not rows[len(alone) :].any()


def test_a_row_attends_within_its_responses():
    (batch,) = microbatches(responses(3), seq_length=32, micro_batch=1, dp_rank=0, dp_size=1)
    ids = batch["sequence_ids"]
    assert ids.unique().tolist() == [0, 1, 2, 3] and not batch["loss_mask"][ids == 3].any()
    mask = barred(ids)
    assert mask.shape == (1, 1, 32, 32)
    for query in range(32):
        allowed = [key for key in range(query + 1) if ids[0, key] == ids[0, query]]
        assert (~mask[0, 0, query]).nonzero()[:, 0].tolist() == allowed
        assert batch["position_ids"][0, query] == len(allowed) - 1
