"""What is refused before a run starts: broken pairs, malformed blends, data of another tokenizer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ptrl.config import DataConfig, TokenizeConfig
from megatron_ptrl.data.indexed import check_same_tokenizer, load_blend, open_indexed, read_meta, resolve_tokenizer
from megatron_ptrl.data.tokenize_stage import run
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError


def tokenized(folder: Path, name: str, texts: list[str], **options: object) -> str:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(TokenizeConfig(input=[str(source)], output=str(folder / name), **options))
    return str(folder / name)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> dict[str, str]:
    """`a` and `b` share a tokenizer, `b` has three times the tokens; `other` has its own."""
    folder = tmp_path_factory.mktemp("indexed")
    a = tokenized(folder, "a", ["some words of text"] * 10, vocab_size=300)
    shared = a + ".tokenizer.json"
    return {
        "a": a,
        "b": tokenized(folder, "b", ["some words of text"] * 30, tokenizer=shared),
        "other": tokenized(folder, "other", ["quite another text"] * 10, vocab_size=290),
    }


@pytest.fixture
def copy(prefixes, tmp_path) -> str:
    """A copy of `a` to break."""
    for file in Path(prefixes["a"]).parent.glob("a.*"):
        shutil.copy(file, tmp_path / file.name)
    return str(tmp_path / "a")


def test_open_gives_documents_and_metadata(prefixes):
    indexed, meta = open_indexed(prefixes["a"])
    assert len(indexed) == meta.documents == 10 and meta == read_meta(prefixes["a"])


def cut(prefix: str, suffix: str, size: int) -> None:
    path = Path(prefix + suffix)
    path.write_bytes(path.read_bytes()[:size] if size >= 0 else path.read_bytes() + b"\0" * -size)


BROKEN = {
    "no idx": (lambda p: Path(p + ".idx").unlink(), r"a\.idx: no such file; run `ptrl tokenize`"),
    "no bin": (lambda p: Path(p + ".bin").unlink(), r"a\.bin: no such file; run `ptrl tokenize`"),
    "short bin": (lambda p: cut(p, ".bin", 7), r"a\.bin: 7 bytes, expected \d+ by its index"),
    "long bin": (lambda p: cut(p, ".bin", -2), r"a\.bin: \d+ bytes, expected \d+ by its index"),
    "empty bin": (lambda p: cut(p, ".bin", 0), r"a\.bin: 0 bytes, expected \d+ by its index"),
    "empty idx": (lambda p: cut(p, ".idx", 0), r"a\.idx: 0 bytes, shorter than an index header"),
    "short idx": (lambda p: cut(p, ".idx", 60), r"a\.idx: 60 bytes, expected 242 for 10 sequences"),
    "not an idx": (lambda p: Path(p + ".idx").write_bytes(b"x" * 99), r"a\.idx: not an index of Megatron's"),
    "metadata": (lambda p: Path(p + ".json").write_text("{}"), r"a\.json: not the metadata of a tokenization"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_pairs_are_refused(case, copy):
    damage, message = BROKEN[case]
    damage(copy)
    with pytest.raises(InputError, match=message):
        open_indexed(copy)


def test_suffix_in_the_prefix_is_explained(prefixes):
    with pytest.raises(InputError, match="give the prefix without its suffix"):
        open_indexed(prefixes["a"] + ".bin")


def test_a_folder_of_text_in_place_of_a_prefix_is_explained(tmp_path):
    with pytest.raises(InputError, match=f"run `ptrl tokenize` with --input {tmp_path} first"):
        open_indexed(str(tmp_path))


def foreign(prefix: Path, documents: list[list[int]]) -> str:
    """A pair as Megatron's own tools write it: no metadata, int32."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for ids in documents:
        builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_empty_dataset_is_refused(tmp_path):
    for name, documents in {"none": [], "hollow": [[]]}.items():
        with pytest.raises(InputError, match="tokenize a corpus that is not empty"):
            open_indexed(foreign(tmp_path / name, documents))


def test_foreign_pair_needs_an_explicit_tokenizer(prefixes, tmp_path):
    prefix = foreign(tmp_path / "f", [[1, 2, 0], [3, 0]])
    indexed, meta = open_indexed(prefix)
    assert meta is None and [ids.tolist() for ids in indexed] == [[1, 2, 0], [3, 0]]
    with pytest.raises(InputError, match=r"f\.tokenizer\.json: no such file; name the tokenizer of .*f"):
        resolve_tokenizer(DataConfig(train=[prefix]))
    with pytest.raises(InputError, match=r"f\.json: no such file, so its tokenizer is unknown"):
        resolve_tokenizer(DataConfig(train=[prefixes["a"], prefix]))
    given = prefixes["a"] + ".tokenizer.json"
    assert resolve_tokenizer(DataConfig(train=[prefix], tokenizer=given)).eod == 0


def test_blend_forms(prefixes):
    a, b = prefixes["a"], prefixes["b"]
    assert load_blend(["7", a, "3", b]) == [(0.7, a), (0.3, b)]
    assert load_blend([a]) == [(1.0, a)]
    assert load_blend([a, b]) == [(0.25, a), (0.75, b)]


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "is empty"),
        (["0.5"], "mixes forms"),
        (["0.7", "a", "b"], "mixes forms"),
        (["a", "0.7"], "mixes forms"),
        (["a", "0.7", "b", "0.3"], "mixes forms"),
        (["0.7", "0.3", "a", "b"], "mixes forms"),
        (["0.7", "a", "b", "0.3"], "mixes forms"),
        (["0", "a"], "weight 0.0 of a; expected a positive number"),
        (["-1", "a"], "weight -1.0 of a"),
        (["nan", "a"], "weight nan of a"),
        (["inf", "a"], "weight inf of a"),
    ],
)
def test_malformed_blends_are_refused(items, message):
    with pytest.raises(InputError, match=message):
        load_blend(items)


def test_tokenizer_of_a_run(prefixes):
    a, b, other = prefixes["a"], prefixes["b"], prefixes["other"]
    assert resolve_tokenizer(DataConfig(train=[a, b])).path == a + ".tokenizer.json"
    both = rf"{other} was tokenized with {other}\.tokenizer\.json .*, {a} with {a}\.tokenizer\.json"
    with pytest.raises(InputError, match=both):
        resolve_tokenizer(DataConfig(train=[a, other]))
    with pytest.raises(InputError, match=f"{other} was tokenized with"):
        resolve_tokenizer(DataConfig(train=[a], valid=[other]))
    with pytest.raises(InputError, match=rf"{a} was tokenized with .* but data\.tokenizer is {other}\.tokenizer\.json"):
        resolve_tokenizer(DataConfig(train=[a], tokenizer=other + ".tokenizer.json"))


def test_another_eod_is_refused(prefixes):
    a = prefixes["a"]
    meta = read_meta(a)
    tokenizer = Tokenizer(a + ".tokenizer.json")
    check_same_tokenizer([(a, meta)], tokenizer, explicit=False)
    with pytest.raises(InputError, match=r"ends its documents with '<s>' \(id 9\)"):
        check_same_tokenizer([(a, replace(meta, eod_id=9, eod_token="<s>"))], tokenizer, explicit=False)
