"""A side-car lies beside its data token for token, and one that is broken or belongs elsewhere is refused."""

import json
import pickle
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from sidecars import describe
from test_indexed import cut, tokenized

from megatron_ptrl.data import sidecar
from megatron_ptrl.data.indexed import open_indexed
from megatron_ptrl.data.parts import Part
from megatron_ptrl.data.sidecar import SideCar, SideCarMeta
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError

TEXTS = ["some words of text", "one", "and a longer document than the others are", "two words", "three more words"]


def part(prefix: str) -> Part:
    indexed, _ = open_indexed(prefix)
    return Part(1.0, prefix, indexed, 0, len(indexed))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tokenized(tmp_path_factory.mktemp("data"), "a", TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def values(data) -> numpy.ndarray:
    """Minus the number of the token over a power of two, which bf16 holds."""
    return -numpy.arange(open_indexed(data)[1].tokens, dtype=numpy.float32) / 64


@pytest.fixture(params=["fp32", "bf16"])
def made(request, data, values, tmp_path) -> str:
    """Published in pieces that do not end where documents do."""
    output = str(tmp_path / "a.logprob")
    pieces = numpy.array_split(values, 7)
    sidecar.publish(output, data, (sidecar.encode(x, request.param) for x in pieces), describe(data, request.param))
    return output


def test_every_token_has_its_own_value(data, values, made):
    """Against the offsets of the data's own index, under another item size than the data's where it is fp32."""
    tokens, opened = IndexedDataset(data), pickle.loads(pickle.dumps(SideCar.open(made)))
    opened.check(part(data), Tokenizer(data + ".tokenizer.json"))
    mine = IndexedDataset(made)
    assert mine.sequence_lengths.tolist() == tokens.sequence_lengths.tolist()
    assert mine.document_indices.tolist() == tokens.document_indices.tolist()
    for document in range(len(tokens)):
        first = int(tokens.index.sequence_pointers[document]) // tokens.index.dtype_size
        length = int(tokens.sequence_lengths[document])
        expected = values[first : first + length]
        assert opened.read(document).tolist() == expected.tolist()
        assert opened.read(document, 1, length - 2).tolist() == expected[1:-1].tolist()
        assert len(mine.get(document)) == length


def test_sequences_that_share_a_document_keep_its_boundaries(tmp_path):
    prefix, output = str(tmp_path / "d"), str(tmp_path / "o")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.int32)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_document(torch.arange(4), [4])
    builder.finalize(prefix + ".idx")
    meta = SideCarMeta(
        storage="fp32",
        data=sidecar.identify(prefix),
        data_sha256="",
        tokenizer_sha256="",
        reference={},
        window=8,
        overlap=4,
        documents=3,
        tokens=9,
        mean_logprob=-4.0,
    )
    sidecar.publish(output, prefix, [sidecar.encode(-numpy.arange(9, dtype=numpy.float32), "fp32")], meta)
    written = IndexedDataset(output)
    assert written.document_indices.tolist() == [0, 2, 3]
    assert [SideCar.open(output).read(i).tolist() for i in range(3)] == [[0, -1], [-2, -3, -4], [-5, -6, -7, -8]]


def test_bf16_rounds_as_torch_does():
    values = torch.cat([-torch.rand(4096) * 20, -torch.tensor([0.0, 1e-30, 1e-42, 88.0, 1.00390625, 1.01171875])])
    bits = sidecar.to_bf16(values.numpy())
    assert torch.equal(torch.from_numpy(bits.view(numpy.int16)).view(torch.bfloat16), values.bfloat16())
    assert torch.equal(torch.from_numpy(sidecar.from_bf16(bits)), values.bfloat16().float())


def change_meta(**changes: object):
    def change(prefix: str) -> None:
        path = Path(prefix + ".json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


BROKEN = {
    "missing": (lambda p: Path(p + ".json").unlink(), r"a\.logprob\.json: no such file; make it with `ptrl score`"),
    "unfinished": (
        lambda p: (Path(p + ".json").unlink(), Path(p + ".parts").mkdir()),
        "not finished; repeat its `ptrl score`",
    ),
    "no bin": (lambda p: Path(p + ".bin").unlink(), r"logprob\.bin: no such file; remove .*logprob\.\* and score"),
    "short bin": (lambda p: cut(p, ".bin", 20), r"logprob\.bin: 20 bytes, expected \d+ by its index; remove"),
    "long bin": (lambda p: cut(p, ".bin", -4), r"logprob\.bin: \d+ bytes, expected \d+ by its index"),
    "short idx": (lambda p: cut(p, ".idx", 60), r"logprob\.idx: 60 bytes, expected"),
    "fewer tokens than told": (change_meta(tokens=7), r"logprob\.json says \('\w+', 5, 7\)"),
    "another type than told": (
        change_meta(storage="fp8"),
        r"not the description .*'storage fp8'",
    ),
    "a tokenizer that is none": (change_meta(tokenizer_sha256=None), "not the description .*of another type"),
    "a reference that is none": (change_meta(reference=None), "not the description .*of another type"),
    "format": (change_meta(format=2), "side-car of format 2, this version reads 1"),
    "no meta": (lambda p: Path(p + ".json").write_text("{}"), "not the description of a side-car"),
    "no JSON": (lambda p: Path(p + ".json").write_text("x"), "not the description of a side-car"),
}


def test_values_that_have_changed_are_refused_and_those_of_before_are_read(made, values):
    digest = SideCar.open(made).digest
    was = Path(made + ".bin").read_bytes()
    Path(made + ".bin").write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    with pytest.raises(InputError, match="the values are not those that .*logprob.json was written with; remove"):
        SideCar.open(made)
    Path(made + ".bin").write_bytes(was)
    assert SideCar.open(made).digest == digest

    path = Path(made + ".json")
    meta = json.loads(path.read_text())
    del meta["values"]
    path.write_text(json.dumps(meta))
    assert SideCar.open(made).read(0).tolist() == values[: len(SideCar.open(made).read(0))].tolist()


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_side_car_is_refused(made, case):
    breaking, message = BROKEN[case]
    breaking(made)
    with pytest.raises(InputError, match=message):
        SideCar.open(made)


def test_the_data_themselves_are_no_side_car(data):
    with pytest.raises(InputError, match="not the description of a side-car"):
        SideCar.open(data)


def test_other_data_or_another_tokenizer_are_refused(data, made, tmp_path):
    tokenizer, opened = Tokenizer(data + ".tokenizer.json"), SideCar.open(made)
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(data + suffix, str(tmp_path / "copy") + suffix)
    copy = str(tmp_path / "copy")
    opened.check(part(copy), tokenizer)
    content = bytearray(Path(copy + ".bin").read_bytes())
    content[10] ^= 1
    Path(copy + ".bin").write_bytes(content)
    with pytest.raises(InputError, match=r"another data set than .*copy.*different: sample_sha256"):
        opened.check(part(copy), tokenizer)
    shorter = tokenized(tmp_path, "b", TEXTS[:4], tokenizer=tokenizer.path)
    with pytest.raises(InputError, match=r"another data set .*index_sha256, bin_bytes, sample_sha256"):
        opened.check(part(shorter), tokenizer)
    other = tokenized(tmp_path, "c", TEXTS, vocab_size=290)
    with pytest.raises(InputError, match="belongs to another tokenizer"):
        opened.check(part(data), Tokenizer(other + ".tokenizer.json"))


def test_the_sample_of_a_large_file_reaches_its_end(tmp_path):
    size = 80 * (1 << 16) + 5
    (tmp_path / "x.idx").write_bytes(b"")
    seen = set()
    for position in (None, 0, 32 * (size - (1 << 16)) // 63, size - 1):
        content = bytearray(size)
        if position is not None:
            content[position] = 1
        (tmp_path / "x.bin").write_bytes(content)
        seen.add(sidecar.identify(str(tmp_path / "x")).sample_sha256)
    assert len(seen) == 4


@pytest.mark.parametrize("bad", [numpy.nan, -numpy.inf, 0.5])
def test_what_is_no_log_probability_is_not_handed_out(data, values, made, bad):
    storage = SideCar.open(made).meta.storage
    broken = values.copy()
    tokens = IndexedDataset(data)
    first, second = (int(length) for length in tokens.sequence_lengths[:2])
    broken[first + second + 2] = bad
    # The values are multiples of a power of two, so cutting their bits rounds nothing and lets NaN be.
    payload = broken if storage == "fp32" else (broken.view(numpy.uint32) >> 16).astype(numpy.uint16)
    sidecar.publish(made, data, [payload.tobytes()], describe(data, storage))
    opened = SideCar.open(made)
    assert opened.read(0).tolist() == values[:first].tolist() and len(opened.read(2, 0, 2)) == 2
    with pytest.raises(InputError, match=rf"document 2, token 2: {bad} is no log-probability"):
        opened.read(2, 1)


def test_values_for_too_few_tokens_make_no_side_car(data, values, tmp_path):
    output = str(tmp_path / "a.logprob")
    with pytest.raises(InputError, match=r"bytes of values, expected \d+ for \d+ tokens"):
        sidecar.publish(output, data, [sidecar.encode(values[:-1], "fp32")], describe(data, "fp32"))
    assert not Path(output + ".bin").exists() and not Path(output + ".json").exists()
