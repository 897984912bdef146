"""The same weights, losses and logged figures of ReMiT and RHO-1 under every layout, from a side-car and online."""

import contextlib
import io
import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from ranks import Ranks
from scoring import score
from sidecars import any_values, write_sidecar
from stage_runs import one_by_one
from tiny import VOCAB, Metrics, Settings, assert_close_metrics, run_tiny, tiny_config, train

from megatron_ptrl.data.indexed import IndexedMeta, read_meta

STEPS = 3
FIGURES = dict.fromkeys(("loss", "ce", "reference_ce", "remit_weight_mean"), 2e-6)
# A gap is the difference of two figures that are thirty times as large.
FIGURES |= {"remit_gap": 5e-5, "grad_norm": 5e-6, "num_tokens": 0.0}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp 2, sequence parallel": (2, {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    "pp 2": (2, {"parallel__pp": 2}),
    "pp 2, interleaved": (2, {"parallel__pp": 2, "parallel__vpp": 2}),
    "cp 2": (2, {"parallel__cp": 2}),
    "dp 2": (2, {}),
    "microbatches of 4": (1, {"train__micro_batch": 4}),
}


@pytest.fixture(scope="module")
def opinion(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run directory of a wider reference that has learned a little."""
    run_dir = tmp_path_factory.mktemp("opinion") / "run"
    run_tiny(ranks, 1, tiny_config(prefix, run_dir, train__steps=6, optimizer__lr=8e-3, model__hidden_size=96))
    return str(run_dir)


def documents(folder: Path, prefix: str, lengths: list[int]) -> str:
    """Prefix of documents of random tokens, the end among the `lengths`."""
    meta, generator, made = read_meta(prefix), numpy.random.default_rng(0), str(folder / "documents")
    builder = IndexedDatasetBuilder(made + ".bin", dtype=numpy.uint16)
    for length in lengths:
        tokens = numpy.append(generator.integers(5, VOCAB, length - 1), meta.eod_id).astype(numpy.uint16)
        builder.add_document(tokens, [length])
    builder.finalize(made + ".idx")
    described = IndexedMeta(**{**asdict(meta), "documents": len(lengths), "tokens": sum(lengths)})
    Path(made + ".json").write_text(json.dumps(asdict(described)))
    shutil.copy(prefix + ".tokenizer.json", made + ".tokenizer.json")
    return made


@pytest.fixture(scope="module")
def data(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of 5 to 40 tokens, cut where rows of 64 end."""
    lengths = random.Random(0).choices(range(5, 41), k=200)
    return documents(tmp_path_factory.mktemp("data"), prefix, lengths)


@pytest.fixture(scope="module")
def sidecar(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sidecar(data, str(tmp_path_factory.mktemp("sidecar") / "s"), any_values(data, 0))


def both(data: str, folder: Path, opinion: str, sidecar: str, **layout: Any) -> list[Settings]:
    """An online reference and documents of their own; a side-car and packed rows."""
    shaped = {"loss__beta": -0.25, "train__steps": STEPS, "log__every": STEPS}
    online = {"remit__weighting": "remit", "remit__reference": opinion, "remit__center": "document"}
    stored = {"remit__weighting": "rho1", "remit__sidecar": [sidecar]}
    return [
        tiny_config(data, folder / "online", **shaped, **online, data__isolate_documents=True, **layout),
        tiny_config(data, folder / "stored", **shaped, **stored, **layout),
    ]


def tokens(settings: Settings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(settings["run_dir"]) / "token_weights.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(
    ranks: Ranks, data: str, opinion: str, sidecar: str, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[list[Metrics], list[dict[str, Any]]]]:
    """Figures and logged tokens on one rank."""
    runs = both(data, tmp_path_factory.mktemp("alone"), opinion, sidecar)
    return [(rows, tokens(run)) for rows, run in zip(ranks.run(1, one_by_one, train, runs)[0], runs, strict=True)]


def test_the_weights_matter(alone):
    (online, rows), (stored, chosen) = alone
    assert all(abs(row["loss"] - row["ce"]) > 1e-3 for row in online)
    assert all(row["remit_low_share"] > 0.01 and row["remit_high_share"] > 0.01 for row in online)
    assert all(abs(row["remit_weight_mean"] - 0.8) < 0.01 for row in stored)
    assert len(rows) == len(chosen) == 2 and all(line["step"] == STEPS for line in rows + chosen)
    assert all(400 < row["num_tokens"] < 500 for row in online), "some labels are first tokens of documents"
    assert {0, 1} == {mask for line in rows for mask in line["loss_mask"]}
    assert {0.0, 1.0} == {weight for line in chosen for weight in line["weight"]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_weighs_alike(ranks, data, tmp_path, opinion, sidecar, alone, name):
    world_size, layout = LAYOUTS[name]
    runs = both(data, tmp_path, opinion, sidecar, **layout)
    spread = ranks.run(world_size, one_by_one, train, runs)[0]
    for rows, run, (expected, expected_tokens) in zip(spread, runs, alone, strict=True):
        assert_close_metrics(rows, expected, FIGURES)
        for row, other in zip(rows, expected, strict=True):
            shares = [figure for figure in other if "share" in figure or "bin" in figure]
            assert set(row) == set(other) and len(shares) in (0, 12)
            # A weight on the edge of a bin may fall to either side.
            assert all(abs(row[share] - other[share]) < 1.5 / row["num_tokens"] for share in shares)
        for line, other in zip(tokens(run), expected_tokens, strict=True):
            assert (line["step"], line["text"], line["loss_mask"]) == (other["step"], other["text"], other["loss_mask"])
            assert numpy.abs(numpy.subtract(line["weight"], other["weight"])).max() < 1e-5
            assert numpy.abs(numpy.subtract(line["gap"], other["gap"])).max() < 2e-5


def test_a_side_car_is_what_the_reference_says_online(ranks, prefix, tmp_path, opinion):
    # Four documents fill a row: none is cut, and each is scored as a whole.
    data = documents(tmp_path, prefix, [16] * 200)
    scored = {"checkpoint": opinion, "data": data, "output": str(tmp_path / "s"), "storage": "fp32", "micro_batch": 2}
    with contextlib.redirect_stdout(io.StringIO()):
        ranks.run(1, score, scored)
    common = {"train__steps": STEPS, "data__isolate_documents": True, "log__every": 1, "remit__weighting": "remit"}
    runs = [
        tiny_config(data, tmp_path / "online", **common, remit__reference=opinion),
        tiny_config(data, tmp_path / "stored", **common, remit__sidecar=[str(tmp_path / "s")]),
    ]
    online, stored = ranks.run(1, one_by_one, train, runs)[0]
    assert_close_metrics(stored, online, dict.fromkeys(("loss", "ce", "reference_ce", "grad_norm"), 1e-5))
    assert online[0]["num_tokens"] == 8 * 60, "what follows the end of a document is masked"
    for line, other in zip(tokens(runs[1]), tokens(runs[0]), strict=True):
        assert numpy.abs(numpy.subtract(line["gap"], other["gap"])).max() < 1e-5
        assert numpy.abs(numpy.subtract(line["weight"], other["weight"])).max() < 1e-5
        assert max(numpy.abs(other["gap"])) > 0.05
