"""ReMiT's CUDA kernels, run by the emulation of thread blocks, against fp64 and the operators for CPUs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_as_accurate
from emulated import SANITIZE
from emulated_remit import EmulatedRemit, compile_remit_kernels
from test_remit import tokens
from torch import Tensor

from megatron_ptrl import ops, reference, remit_weights

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
# An emulated block takes 64 x 4 tokens, a warp 128.
SHAPES = [(1, 1), (2, 3), (3, 4), (5, 7), (1, 128), (4, 129), (2, 256), (3, 1023), (1, 5000)]
UNIT = 2.0**-28  # nats, of the kernels' integers


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedRemit:
    prebuilt = os.environ.get("PTRL_EMULATED_REMIT")
    return EmulatedRemit(Path(prebuilt) if prebuilt else compile_remit_kernels(tmp_path_factory.mktemp("emulated")))


@pytest.fixture
def installed(kernels: EmulatedRemit, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.install(monkeypatch)


def documents(shape: tuple[int, int], kind: str) -> Tensor | None:
    """Document ids: long pieces as packing makes them, tokens of one warp in many documents, or one each."""
    b, s = shape
    place = torch.arange(b * s).view(shape)
    return {
        "row": None,
        "packed": place // 150 * 2**40,
        "pieces": place // 3 % 5 - 2,
        "each": -place,
    }[kind]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["row", "packed", "pieces", "each"])
def test_against_fp64(installed, shape, kind):
    logprob, reference_logprob, mask, _ = tokens(shape, torch.float32)
    ids = documents(shape, kind)
    weights = remit_weights(logprob, reference_logprob, mask, document_ids=ids)
    eager, exact = (
        reference.remit_weights(logprob.to(d), reference_logprob.to(d), mask, 0.2, ids)
        for d in (torch.float32, torch.float64)
    )
    assert_as_accurate(weights, eager, exact)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-7, atol=0)
    assert torch.equal(weights == 0, ~mask)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4, 2.0**33])
def test_sums_as_on_cpus(kernels, segmented, offset):
    """Counts exactly, gaps to half a unit each, up to the largest that the integers hold."""
    shape = (5, 700)
    logprob, reference_logprob, mask, _ = tokens(shape, torch.float32)
    reference_logprob = torch.where(torch.arange(700) % 3 == 0, -1, 1) * (reference_logprob + offset)
    segment = torch.randint(4, shape) + 4 * torch.arange(5)[:, None] if segmented else None
    count = 23 if segmented else 6  # some of them of no token
    gaps, numbers = kernels.gap_sums(logprob, reference_logprob, mask, segment, count)
    expected = ops.remit_gap_sums(logprob, reference_logprob, mask, segment, count)
    assert torch.equal(numbers, expected[1])
    scale = torch.maximum(expected[0].abs(), numbers * offset)
    assert ((gaps - expected[0]).abs() <= numbers * UNIT / 2 + scale * 2.0**-50).all()


def test_nothing_at_all(installed):
    for shape in ((0, 40), (3, 0)):
        logprob, mask = torch.zeros(shape), torch.ones(shape)
        ids = torch.zeros(shape, dtype=torch.int64)
        assert remit_weights(logprob, logprob, mask).shape == shape
        assert remit_weights(logprob, logprob, mask, document_ids=ids).shape == shape


@pytest.mark.parametrize("kind", ["row", "pieces"])
def test_masked_tokens_may_hold_anything(installed, kind):
    logprob, reference_logprob, mask, _ = tokens((3, 400), torch.float32)
    mask[1] = False
    ids = documents((3, 400), kind)
    spoilt = [x.masked_fill(~mask, value) for x, value in ((logprob, torch.nan), (reference_logprob, -torch.inf))]
    weights = remit_weights(*spoilt, mask, document_ids=ids)
    assert torch.equal(weights, remit_weights(logprob, reference_logprob, mask, document_ids=ids))
    assert not weights[1].any() and weights[mask].min() >= 0.8


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2.0**34, -3e38])
@pytest.mark.parametrize("kind", ["row", "pieces"])
def test_a_kept_value_that_cannot_be_summed_makes_its_whole_segment_nan(installed, kind, value):
    logprob, reference_logprob, mask, _ = tokens((3, 400), torch.float32)
    ids = documents((3, 400), kind)
    mask[1, 77] = True
    expected = remit_weights(logprob, reference_logprob, mask, document_ids=ids)
    for spoilt in (logprob, reference_logprob):
        clean = spoilt[1, 77].item()
        spoilt[1, 77] = value
        # As on a GPU, where nothing looks at the sums in between.
        segment = None if ids is None else ids - ids.min() + 5 * torch.arange(3)[:, None]
        sums = ops.remit_gap_sums(logprob, reference_logprob, mask, segment, 15)
        weights = ops.remit_weights(logprob, reference_logprob, mask, segment, sums, 0.2)
        same = torch.zeros_like(mask)
        same[1] = True if ids is None else ids[1] == ids[1, 77]
        assert weights[same & mask].isnan().all()
        assert torch.equal(weights[~same], expected[~same]) and not weights[~mask].any()
        spoilt[1, 77] = clean


@pytest.mark.parametrize("implementation", ["emulated", "kernels", "torch"])
def test_an_infinite_sum_is_not_clipped_to_a_number(kernels, implementation, monkeypatch):
    if implementation == "emulated":
        kernels.install(monkeypatch)
    elif implementation == "torch":
        monkeypatch.setattr(ops, "_remit_kernels", lambda x: False)
    x, keep = torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool)
    sums = torch.tensor([[-torch.inf, 0.0], [5.0, 5.0]], dtype=torch.float64)
    weights = ops.remit_weights(x, x, keep, None, sums, 0.2)
    assert weights[0].isnan().all() and torch.equal(weights[1], torch.ones(5))


@pytest.mark.parametrize("wrong", [-1, 15, 2**62, -(2**63)])
def test_a_segment_out_of_range_is_nan_and_touches_nothing_else(kernels, wrong):
    logprob, reference_logprob, mask, _ = tokens((3, 400), torch.float32)
    segment = documents((3, 400), "pieces") + 2 + 5 * torch.arange(3)[:, None]
    stray = torch.arange(400) % 11 == 7
    segment[:, stray] = wrong
    arguments = (logprob, reference_logprob, mask, segment)
    sums = kernels.gap_sums(*arguments, 15)
    expected = kernels.gap_sums(logprob, reference_logprob, mask & ~stray, segment.clamp(0, 14), 15)
    assert torch.equal(sums, expected)
    weights = kernels.weights(*arguments, sums, 0.2)
    assert torch.equal(weights.isnan(), mask & stray)


@pytest.mark.parametrize("kind", ["row", "pieces"])
def test_neither_order_nor_alignment_changes_a_bit(kernels, installed, kind):
    shape = (4, 257)
    logprob, reference_logprob, mask, _ = tokens(shape, torch.float32)
    ids = documents(shape, kind)
    expected = remit_weights(logprob, reference_logprob, mask, document_ids=ids)
    for offset in range(1, 5):
        kernels.seed(offset)
        # Each tensor off by something else, so that the ways to load them mix.
        moved = [at(x, offset * k) for k, x in enumerate((logprob, reference_logprob, mask))]
        found = remit_weights(*moved, document_ids=None if ids is None else at(ids, offset))
        assert torch.equal(found, expected)


def at(x: Tensor, offset: int) -> Tensor:
    """The same, contiguous, `offset` elements beyond where an allocation starts."""
    return torch.cat([x.new_zeros(offset), x.reshape(-1)])[offset:].view(x.shape)


@pytest.mark.skipif("PTRL_EMULATED_REMIT" in os.environ, reason="runs these tests with sanitizers")
def test_under_sanitizers(tmp_path):
    library = compile_remit_kernels(tmp_path, SANITIZE)
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "PTRL_EMULATED_REMIT": str(library),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    selected = ("-k", "not fp64 or (row and 1023)")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, *selected],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
