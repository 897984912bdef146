"""`ptrl score` against unpacked forward passes in fp64, under every layout of the ranks."""

from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from scoring import WINDOW, direct, score, values_of
from stage_runs import one_by_one
from tiny import Settings

from megatron_ptrl.data import sidecar
from megatron_ptrl.data.indexed import open_indexed
from megatron_ptrl.data.parts import Part
from megatron_ptrl.data.sidecar import SideCar
from megatron_ptrl.data.tokenizer import Tokenizer

OVERLAP = 24
TOLERANCE = 1e-5


def settings(reference: Settings, data: str, output: Path, **overrides: object) -> Settings:
    known = {"checkpoint": reference["run_dir"], "data": data, "output": str(output), "storage": "fp32"}
    known |= {"overlap": OVERLAP, "micro_batch": 2, "chunk": 4}
    return known | {name.replace("__", "."): value for name, value in overrides.items()}


@pytest.fixture(scope="module")
def alone(ranks, reference, unscored, tmp_path_factory) -> tuple[str, str]:
    """Prefix of the side-car that one rank makes, and what that printed."""
    output = tmp_path_factory.mktemp("alone") / "s"
    return str(output), ranks.run(1, score, settings(reference, unscored, output))[0]


@pytest.fixture(scope="module")
def expected(ranks, reference, unscored) -> list[list[float]]:
    """By document. A long one: every token from the first window, 40 apart, that sees it and what went before it."""
    lengths = IndexedDataset(unscored)
    wanted, parts = [], []
    for document, length in enumerate(int(x) for x in lengths.sequence_lengths):
        wanted.append([document, -1, 1])
        parts.append((document, None, 0))
        last = 0
        for begin in range(0, max(length - 1, 1), WINDOW - OVERLAP):
            end = min(begin + WINDOW + 1, length)
            if end > last + 1:
                wanted.append([document, begin, end])
                # What the windows before have reached is theirs.
                parts.append((document, begin, max(last - begin, 0)))
                last = end - 1
    found = ranks.run(1, direct, reference, unscored, wanted)[0]
    documents: list[list[float]] = [[] for _ in lengths.sequence_lengths]
    for (document, _, skip), values in zip(parts, found, strict=True):
        documents[document] += values[skip:]
    return documents


def test_the_data_have_what_the_windows_must_cope_with(unscored):
    lengths = IndexedDataset(unscored)
    sizes = lengths.sequence_lengths
    assert min(sizes) == 2 and max(sizes) > 4 * WINDOW and sum(sizes > WINDOW + 1) >= 2
    assert sum(sizes <= WINDOW + 1) > 10 and sum(sizes) > 1000


def test_values_equal_unpacked_forward_passes(unscored, alone, expected):
    opened, lengths = SideCar.open(alone[0]), IndexedDataset(unscored)
    assert [len(values) for values in expected] == lengths.sequence_lengths.tolist()
    for document, values in enumerate(expected):
        numpy.testing.assert_allclose(opened.read(document), values, rtol=0, atol=TOLERANCE)
    # The model has an opinion, so that a shift by one could not pass.
    assert numpy.abs(numpy.diff(numpy.concatenate(expected))).mean() > 0.1


def test_it_is_a_pair_of_megatrons_that_belongs_to_the_data(prefix, unscored, alone, expected):
    mine, theirs = IndexedDataset(alone[0]), IndexedDataset(unscored)
    assert mine.index.dtype == numpy.float32
    assert mine.sequence_lengths.tolist() == theirs.sequence_lengths.tolist()
    assert mine.document_indices.tolist() == theirs.document_indices.tolist()
    opened, (indexed, meta) = SideCar.open(alone[0]), open_indexed(unscored)
    opened.check(Part(1.0, unscored, indexed, 0, len(indexed)), Tokenizer(prefix + ".tokenizer.json"))
    mean = numpy.concatenate(expected).mean()
    assert opened.meta.tokens == meta.tokens and abs(opened.meta.mean_logprob - mean) < TOLERANCE
    assert (opened.meta.window, opened.meta.overlap) == (WINDOW, OVERLAP)
    assert f"cross entropy {-mean:.4f}" in alone[1] and f"perplexity {numpy.exp(-mean):.2f}" in alone[1]
    assert f"{meta.tokens:,} of {meta.tokens:,} tokens" in alone[1]
    assert not Path(alone[0] + ".parts").exists()


LAYOUTS = {
    "tp 2, sequence parallel": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "pp 2": (2, {"parallel__pp": 2}),
    "pp 2, interleaved": (2, {"parallel__pp": 2, "parallel__vpp": 2, "micro_batch": 3}),
    "dp 2": (2, {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same(ranks, reference, unscored, tmp_path, alone, name):
    world_size, layout = LAYOUTS[name]
    printed = ranks.run(world_size, score, settings(reference, unscored, tmp_path / "s", **layout))
    assert printed[1:] == [""] * (world_size - 1)
    numpy.testing.assert_allclose(values_of(str(tmp_path / "s")), values_of(alone[0]), rtol=0, atol=TOLERANCE)
    assert (tmp_path / "s.idx").read_bytes() == Path(alone[0] + ".idx").read_bytes()


def test_settings_that_must_not_matter_and_some_that_must(ranks, reference, unscored, tmp_path, alone):
    one_row = settings(reference, unscored, tmp_path / "a", micro_batch=5, chunk=1)
    stored = settings(reference, unscored, tmp_path / "b", storage="bf16")
    wide = settings(reference, unscored, tmp_path / "c", window=512, overlap=None)
    coarse = settings(reference, unscored, tmp_path / "d", precision="bf16")
    ranks.run(1, one_by_one, score, [one_row, stored, wide, coarse])
    exact = values_of(alone[0])
    numpy.testing.assert_allclose(values_of(str(tmp_path / "a")), exact, rtol=0, atol=TOLERANCE)
    bits = numpy.fromfile(tmp_path / "b.bin", numpy.uint16)
    assert bits.tolist() == sidecar.to_bf16(exact).tolist()
    opened, lengths = SideCar.open(str(tmp_path / "c")), IndexedDataset(unscored)
    assert (opened.meta.window, opened.meta.overlap) == (512, 256)
    for document, length in enumerate(lengths.sequence_lengths):
        same = numpy.abs(opened.read(document) - SideCar.open(alone[0]).read(document)) < TOLERANCE
        # More context changes what comes after the first window, and nothing else.
        assert same[: WINDOW + 1].all() and (length <= WINDOW + 1 or not same[WINDOW + 1 :].all())
    rough = values_of(str(tmp_path / "d"))
    assert 1e-4 < numpy.abs(rough - exact).max() and numpy.abs(rough - exact).mean() < 0.1
