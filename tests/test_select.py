"""The documents with the largest mean gain stay, in their order, as data that training takes."""

import dataclasses
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sidecars import describe
from test_indexed import tokenized

from megatron_ptrl.config import DataConfig, SelectConfig
from megatron_ptrl.data import sidecar
from megatron_ptrl.data.indexed import open_indexed, resolve_tokenizer
from megatron_ptrl.data.select_stage import largest, run
from megatron_ptrl.errors import InputError

# The mean gain of each of eight documents, whose lengths differ: a sum over tokens would choose others.
GAINS = [0.5, -0.25, 2.0, 0.0, 1.0, -1.0, 0.25, 0.5]
TEXTS = [f"document number {number} " * (1 + 9 * (number % 3 == 1)) for number in range(len(GAINS))]


@pytest.fixture
def data(tmp_path) -> str:
    return tokenized(tmp_path, "data", TEXTS, vocab_size=300)


def scored(data: str, name: str, gains: list[float]) -> str:
    """A side-car whose document d has the mean -8 + gains[d], over values that are not alike."""
    output, pieces = str(Path(data).parent / name), []
    indexed = IndexedDataset(data)
    for gain, length in zip(gains, indexed.sequence_lengths, strict=True):
        pieces.append(numpy.float32(gain - 8) + numpy.linspace(-1, 1, length, dtype=numpy.float32))
    payload = (sidecar.encode(piece, "fp32") for piece in pieces)
    sidecar.publish(output, data, payload, describe(data, "fp32"))
    return output


def config(data: str, **changes: object) -> SelectConfig:
    reference, base = scored(data, "reference", [g / 2 for g in GAINS]), scored(data, "base", [-g / 2 for g in GAINS])
    known = {"data": data, "reference": reference, "base": base, "output": data + ".chosen", "keep": 0.5}
    return SelectConfig(**{**known, **changes})


def test_the_documents_with_the_largest_means_stay_in_their_order(data, capsys):
    run(config(data))
    old, (chosen, meta) = IndexedDataset(data), open_indexed(data + ".chosen")
    assert [chosen.get(i).tolist() for i in range(len(chosen))] == [old.get(i).tolist() for i in (0, 2, 4, 7)]
    before = open_indexed(data)[1]
    tokens = int(chosen.sequence_lengths.sum())
    expected = dataclasses.replace(before, documents=4, tokens=tokens, rejected={"not selected": 4})
    assert meta == expected and chosen.index.dtype == old.index.dtype
    assert resolve_tokenizer(DataConfig(train=[data + ".chosen"])).sha256 == before.tokenizer_sha256
    printed = capsys.readouterr().out
    assert f"4 of 8 documents, {tokens:,} of {before.tokens:,} tokens" in printed and "of 0.5000 nats" in printed
    assert not list(Path(data).parent.glob("*.tmp"))


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=12), st.floats(0.01, 1))
def test_a_kept_document_never_gains_less_than_a_dropped_one(gains, keep):
    chosen = largest(numpy.array(gains), keep).tolist()
    dropped = [d for d in range(len(gains)) if d not in chosen]
    assert chosen == sorted(set(chosen)) and len(chosen) == max(round(keep * len(gains)), 1)
    for out in dropped:
        assert all((gains[d], -d) > (gains[out], -out) for d in chosen)


def test_side_cars_of_other_data_and_bad_settings_are_refused(data, tmp_path):
    (tmp_path / "other").mkdir()
    other = tokenized(tmp_path / "other", "o", TEXTS[:-1], tokenizer=data + ".tokenizer.json")
    foreign = scored(other, "s", GAINS[:-1])
    for change, message in (
        ({"base": foreign}, "belongs to another data set than"),
        ({"reference": data}, "not the description of a side-car"),
        ({"output": data}, "would overwrite its input"),
        ({"base": config(data).reference}, "reference and base are both"),
        ({"output": ""}, "output is empty"),
    ):
        with pytest.raises(InputError, match=message):
            run(config(data, **change))
    assert not Path(data + ".chosen.bin").exists()
    for keep in (0, 1.5, float("nan")):
        with pytest.raises(InputError, match="expected above 0, up to 1"):
            SelectConfig(keep=keep)


def test_a_disk_that_is_full_is_told_in_one_line(data):
    for suffix in (".bin.tmp", ".json.tmp"):
        Path(data + ".chosen" + suffix).symlink_to("/dev/full")
        with pytest.raises(InputError, match=r"output .*chosen: No space left on device"):
            run(config(data))
        Path(data + ".chosen" + suffix).unlink()
    assert not Path(data + ".chosen.idx").exists()
