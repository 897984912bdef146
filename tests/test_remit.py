"""ReMiT's weights against fp64, their rules, and their operators."""

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from megatron_ptrl import ops, reference, remit_weights
from megatron_ptrl.errors import InputError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (3, 17), (8, 129)]


def tokens(shape: tuple[int, int], dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of a model and of its reference, a mask and document ids, in pieces and far apart."""
    torch.manual_seed(0)
    logprob = -torch.rand(shape, dtype=torch.float64) * 8 - offset
    reference_logprob = logprob + torch.randn(shape) * 0.3 + offset
    mask = torch.rand(shape) > 0.2
    ids = torch.tensor([7, -(2**40), 0, 2**62])[torch.randint(4, shape)]
    return logprob.to(dtype), reference_logprob.to(dtype), mask, ids


@pytest.fixture(params=["kernels", "torch"])
def operators(request, monkeypatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(ops, "_remit_kernels", lambda x: False)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 0.99])
def test_as_accurate_as_eager(operators, shape, dtype, by_document, epsilon):
    logprob, reference_logprob, mask, ids = tokens(shape, dtype)
    documents = ids if by_document else None
    weights = remit_weights(logprob, reference_logprob, mask, epsilon=epsilon, document_ids=documents)
    eager, exact = (
        reference.remit_weights(logprob.to(d), reference_logprob.to(d), mask, epsilon, documents)
        for d in (torch.float32, torch.float64)
    )
    assert weights.dtype == torch.float32 and not weights.requires_grad
    assert_as_accurate(weights, eager, exact)
    assert torch.equal(weights == 0, ~mask)


def test_a_large_common_gap_costs_no_accuracy(operators):
    logprob, reference_logprob, mask, _ = tokens((4, 4096), torch.float32, offset=1000.0)
    exact = reference.remit_weights(logprob.double(), reference_logprob.double(), mask, 0.2)
    torch.testing.assert_close(remit_weights(logprob, reference_logprob, mask).double(), exact, rtol=1e-7, atol=0)


def test_by_hand(operators):
    """Gaps 1, 0, -1, 0.2 and a masked one: the mean is 0.05, and beyond ln 1.5 from it the clip holds."""
    logprob, gap = torch.tensor([[-2.0, -1.0, -3.0, -2.0, -9.0]]), torch.tensor([[1.0, 0.0, -1.0, 0.2, 5.0]])
    weights = remit_weights(logprob, logprob + gap, torch.tensor([[1, 1, 1, 1, 0]]))
    middle = [2 / (1 + torch.tensor(-x).exp().item()) for x in (-0.05, 0.15)]
    torch.testing.assert_close(weights, torch.tensor([[1.2, middle[0], 0.8, middle[1], 0.0]]))


def test_masked_tokens_may_hold_anything_and_a_row_without_tokens_is_0(operators):
    logprob, reference_logprob, mask, ids = tokens((3, 40), torch.float32)
    mask[1] = False
    spoilt = [x.masked_fill(~mask, value) for x, value in ((logprob, torch.nan), (reference_logprob, -torch.inf))]
    for documents in (None, ids):
        weights = remit_weights(*spoilt, mask, document_ids=documents)
        assert torch.equal(weights, remit_weights(logprob, reference_logprob, mask, document_ids=documents))
        assert not weights[1].any() and weights[mask].min() >= 0.8 and weights[mask].max() <= 1.2
    assert remit_weights(*(x[:0] for x in (logprob, reference_logprob, mask))).shape == (0, 40)


def test_masks_of_every_kind_dtypes_that_differ_and_strides():
    logprob, reference_logprob, mask, ids = tokens((6, 50), torch.float32)
    expected = remit_weights(logprob, reference_logprob, mask, document_ids=ids)
    assert torch.equal(remit_weights(logprob, reference_logprob, mask.float() * 0.5, document_ids=ids), expected)
    turned = (x.t().contiguous().t() for x in (logprob, reference_logprob, mask.long()))
    assert torch.equal(remit_weights(*turned, document_ids=ids.t().contiguous().t()), expected)
    half = reference_logprob.half()
    mixed = remit_weights(logprob, half, mask)
    assert torch.equal(mixed, remit_weights(logprob, half.float(), mask))
    leaf = logprob.clone().requires_grad_()
    assert not remit_weights(leaf, reference_logprob, mask).requires_grad


@given(st.integers(0, 99), st.floats(-30, 30), st.integers(-(2**63), 2**63 - 1))
def test_laws(seed, constant, document):
    """A constant on all gaps changes nothing; one document is the row; a row does not depend on the others."""
    torch.manual_seed(seed)
    logprob, reference_logprob = torch.randn(2, 3, 20, dtype=torch.float64)
    mask = torch.rand(3, 20) > 0.3
    weights = remit_weights(logprob, reference_logprob, mask)
    torch.testing.assert_close(remit_weights(logprob, reference_logprob + constant, mask), weights)
    ids = torch.full((3, 20), document)
    assert torch.equal(remit_weights(logprob, reference_logprob, mask, document_ids=ids), weights)
    assert torch.equal(remit_weights(logprob[1:2], reference_logprob[1:2], mask[1:2]), weights[1:2])


def test_bad_input_is_told_in_one_line():
    logprob = torch.zeros(2, 5)
    mask, ids = torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.int64)

    def refused(said, logprob=logprob, reference_logprob=logprob, loss_mask=mask, **options):
        with pytest.raises(InputError, match=said) as caught:
            remit_weights(logprob, reference_logprob, loss_mask, **options)
        assert "\n" not in str(caught.value)

    for epsilon in (1.0, -0.2, float("nan")):
        refused(f"epsilon is {epsilon}; expected 0 ", epsilon=epsilon)
    refused(r"logprob has shape \[10\]; expected \[b, s\]", logprob=logprob.view(-1))
    refused(r"reference_logprob has shape \[2, 4\]; expected \[2, 5\]", reference_logprob=logprob[:, 1:])
    refused(r"loss_mask has shape \[5, 2\]", loss_mask=mask.t())
    refused(r"document_ids has shape \[1, 5\]", document_ids=ids[:1])
    refused("document_ids is torch.int32; expected int64", document_ids=ids.int())
    refused("reference_logprob is torch.int64; expected bfloat16", reference_logprob=ids)
    refused("loss_mask is on meta; expected cpu", loss_mask=mask.to("meta"))
    spoilt = logprob.clone()
    spoilt[1, 3] = -torch.inf
    refused("not finite at an unmasked token of row 1", reference_logprob=spoilt)
    refused("not finite at an unmasked token of row 1", logprob=spoilt, document_ids=ids + torch.arange(5))


needs_kernels = pytest.mark.skipif(not ops.load_kernels(), reason="the kernels were not built")


@needs_kernels
@pytest.mark.parametrize("segmented", [False, True])
def test_registration(segmented):
    logprob, reference_logprob, mask, _ = tokens((3, 17), torch.float32)
    segment = torch.randint(2, (3, 17)) + 2 * torch.arange(3)[:, None] if segmented else None
    library, count = torch.ops.megatron_ptrl, 6 if segmented else 3
    opcheck(library.remit_gap_sums.default, (logprob, reference_logprob, mask, segment, count))
    sums = library.remit_gap_sums(logprob, reference_logprob, mask, segment, count)
    opcheck(library.remit_weights.default, (logprob, reference_logprob, mask, segment, sums, 0.2))


@needs_kernels
def test_the_operators_name_what_is_wrong():
    x, keep, library = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ops.megatron_ptrl
    with pytest.raises(RuntimeError, match=r"keep has shape \[3, 2\], expected"):
        library.remit_gap_sums(x, x, keep.t().contiguous(), None, 2)
    with pytest.raises(RuntimeError, match="segment is 4, expected 0 to 3"):
        library.remit_gap_sums(x, x, keep, torch.full((2, 3), 4), 4)
    with pytest.raises(RuntimeError, match="segments are 1, expected one for each of 2 rows"):
        library.remit_gap_sums(x, x, keep, None, 1)
    with pytest.raises(RuntimeError, match=r"sums has shape \[3, 2\], expected"):
        library.remit_weights(x, x, keep, None, torch.zeros(3, 2, dtype=torch.float64), 0.2)


@needs_kernels
def test_the_result_does_not_depend_on_the_number_of_threads():
    every, before = tokens((16, 5000), torch.float32), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(remit_weights(*every[:3], document_ids=every[3]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def context_parallel(rank: int, world_size: int, every: tuple[Tensor, ...]) -> list[Tensor | str]:
    """Of this rank's columns, which Megatron takes from both ends: weights by row and by document, and a refusal."""
    import torch.distributed as dist

    chunks = [x.chunk(2 * world_size, 1) for x in every]
    logprob, reference_logprob, mask, ids = (torch.cat([c[rank], c[-1 - rank]], 1) for c in chunks)
    group = dist.group.WORLD
    found: list[Tensor | str] = [
        remit_weights(logprob, reference_logprob, mask, cp_group=group),
        remit_weights(logprob, reference_logprob, mask, document_ids=ids, cp_group=group),
    ]
    spoilt = reference_logprob.clone()
    if rank == 0:
        spoilt[mask] = torch.inf
    try:
        remit_weights(logprob, spoilt, mask, cp_group=group)
    except InputError as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_ranks_share_the_mean(ranks, cp):
    every = tokens((5, 64), torch.float32)
    every[2][3] = False
    every[2][4, 16:] = False  # what is left of this row is on the first rank of two
    logprob, reference_logprob, mask, ids = every
    results = ranks.run(cp, context_parallel, every)
    for i, documents in enumerate((None, ids)):
        expected = remit_weights(logprob, reference_logprob, mask, document_ids=documents).chunk(2 * cp, 1)
        for rank, result in enumerate(results):
            mine = torch.cat([expected[rank], expected[-1 - rank]], 1)
            torch.testing.assert_close(result[i], mine, rtol=1e-7, atol=0)
    assert all("not finite" in result[2] for result in results)
