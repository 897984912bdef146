"""RHO-1's choice of tokens against a plain sort of each row, and its rules."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_ptrl import rho1_weights
from megatron_ptrl.errors import InputError


def by_hand(logprob: Tensor, reference: Tensor, mask: Tensor, keep: float, ids: Tensor | None = None) -> Tensor:
    """[b, s] fp64, token by token."""
    excess = (reference.double() - logprob.double()).tolist()
    weights = torch.zeros(logprob.shape)
    for row in range(len(logprob)):
        documents: dict[int, list[float]] = {}
        for place in range(logprob.shape[1]):
            if mask[row, place]:
                documents.setdefault(0 if ids is None else int(ids[row, place]), []).append(excess[row][place])
        for place in range(logprob.shape[1]):
            if mask[row, place]:
                rivals = sorted(documents[0 if ids is None else int(ids[row, place])], reverse=True)
                smallest = rivals[max(1, math.floor(keep * len(rivals) + 0.5)) - 1]
                weights[row, place] = float(excess[row][place] >= smallest)
    return weights


def tokens(seed: int, rows: int = 4, places: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities on a coarse grid, so that many tie; row 1 is masked as a whole."""
    generator = torch.Generator().manual_seed(seed)
    logprob, reference = (-torch.randint(9, (rows, places), generator=generator) / 4 for _ in range(2))
    mask = (torch.rand(rows, places, generator=generator) > 0.3).float()
    mask[1] = 0
    return logprob, reference, mask, torch.randint(3, (rows, places), generator=generator) * 7 - 5


@given(st.integers(0, 999), st.sampled_from([0.01, 0.3, 0.5, 0.8, 1.0]))
def test_the_tokens_of_the_largest_excess_loss_stay(seed, keep):
    logprob, reference, mask, ids = tokens(seed)
    for documents in (None, ids):
        weights = rho1_weights(logprob, reference, mask, keep=keep, document_ids=documents)
        assert weights.dtype == torch.float32
        assert torch.equal(weights, by_hand(logprob, reference, mask, keep, documents))


def test_rounding_and_ties():
    logprob, mask = torch.zeros(1, 5), torch.ones(1, 5)
    gap = torch.tensor([[0.1, 0.5, 0.2, 0.4, 0.3]])
    assert rho1_weights(logprob, gap, mask, keep=0.5).tolist() == [[0, 1, 0, 1, 1]], "2.5 of 5 are 3"
    assert rho1_weights(logprob, gap, mask, keep=0.29).sum() == 1
    assert rho1_weights(logprob, gap, mask, keep=0.01).tolist() == [[0, 1, 0, 0, 0]], "at least one"
    assert rho1_weights(logprob, logprob, mask, keep=0.2).tolist() == [[1] * 5], "all tie"


def test_masked_tokens_may_hold_anything():
    logprob, reference, mask, ids = tokens(0)
    spoilt = reference.masked_fill(mask == 0, torch.nan)
    for documents in (None, ids):
        weights = rho1_weights(logprob, spoilt, mask, document_ids=documents)
        assert torch.equal(weights, rho1_weights(logprob, reference, mask, document_ids=documents))
        assert not weights[1].any() and not weights[mask == 0].any()
    assert rho1_weights(logprob[:0], reference[:0], mask[:0]).shape == (0, 32)
    assert not rho1_weights(logprob, reference, torch.zeros_like(mask)).any()


def test_bad_input_is_told():
    logprob, reference, mask, _ = tokens(0)
    for keep in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match=f"keep is {keep}; expected a share"):
            rho1_weights(logprob, reference, mask, keep=keep)
    reference[2][mask[2] == 1] = torch.nan
    with pytest.raises(InputError, match="not finite at an unmasked token of row 2"):
        rho1_weights(logprob, reference, mask)


def context_parallel(rank: int, world_size: int, every: tuple[Tensor, ...]) -> list[Tensor]:
    import torch.distributed as dist

    chunks = [x.chunk(2 * world_size, 1) for x in every]
    logprob, reference, mask, ids = (torch.cat([c[rank], c[-1 - rank]], 1) for c in chunks)
    group = dist.group.WORLD
    return [rho1_weights(logprob, reference, mask, keep=0.6, document_ids=d, cp_group=group) for d in (None, ids)]


def test_context_parallel_ranks_choose_from_the_whole_row(ranks):
    every = tokens(3)
    logprob, reference, mask, ids = every
    results = ranks.run(2, context_parallel, every)
    for i, documents in enumerate((None, ids)):
        expected = rho1_weights(logprob, reference, mask, keep=0.6, document_ids=documents).chunk(4, 1)
        for rank, result in enumerate(results):
            assert torch.equal(result[i], torch.cat([expected[rank], expected[-1 - rank]], 1))
