"""Raw files -> `.bin/.idx`: nothing lost, nothing invented, the same bytes whatever the number of processes."""

import gzip
import json
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ptrl.config import TokenizeConfig
from megatron_ptrl.data import corpus, indexed_output, tokenize_stage
from megatron_ptrl.data.indexed import read_meta
from megatron_ptrl.data.tokenize_stage import run
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError

# Letters outside ASCII, control bytes, Windows line ends, the EOD token spelled out, no final newline.
ODD_TEXTS = ["naïve – 東京 🙂\r\n", "a\x00b\tc", "before<|endoftext|>after", " ", "\n\n  x  \n", "x"]


def words(seed: int, count: int) -> str:
    chosen = random.Random(seed)
    return " ".join("".join(chosen.choices("abcdefgh", k=chosen.randint(1, 6))) for _ in range(count))


TEXTS = [text for text in ODD_TEXTS if text.strip()] + [words(seed, 1 + seed % 60) for seed in range(700)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def rejects(prefix: str) -> list[tuple[str, int, str]]:
    records = [json.loads(line) for line in Path(prefix + ".rejects.jsonl").read_text().splitlines()]
    return [(Path(record["file"]).name, record["line"], record["reason"]) for record in records]


def texts_of(prefix: str) -> list[str]:
    """Every document as Megatron-Core reads it back, decoded, without its EOD."""
    tokenizer = Tokenizer(prefix + ".tokenizer.json")
    documents = []
    for ids in IndexedDataset(prefix):
        assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
        documents.append(tokenizer.decode(ids[:-1]))
    return documents


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """Prefix of TEXTS, tokenized with a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("trained")
    run(TokenizeConfig(input=[str(write_jsonl(folder / "in.jsonl", TEXTS))], output=str(folder / "a"), vocab_size=400))
    return str(folder / "a")


def test_every_document_reads_back(trained):
    assert texts_of(trained) == TEXTS
    meta, dataset = read_meta(trained), IndexedDataset(trained)
    assert (meta.documents, meta.tokens) == (len(TEXTS), dataset.sequence_lengths.sum())
    assert list(dataset.document_indices) == list(range(len(TEXTS) + 1))
    assert dataset.index.dtype == numpy.uint16 and meta.dtype == "uint16" and meta.append_eod
    assert meta.tokenizer_sha256 == Tokenizer(trained + ".tokenizer.json").sha256 and meta.rejected == {}
    assert not Path(trained + ".rejects.jsonl").exists() and not list(Path(trained).parent.glob("*.tmp"))


def test_given_tokenizer_is_copied_and_no_eod_when_off(trained, tmp_path):
    given = trained + ".tokenizer.json"
    prefix = str(tmp_path / "new" / "folder" / "b")
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    run(TokenizeConfig(input=[str(source)], output=prefix, tokenizer=given, append_eod=False))
    assert Path(prefix + ".tokenizer.json").read_bytes() == Path(given).read_bytes()
    tokenizer = Tokenizer(given)
    assert [list(ids) for ids in IndexedDataset(prefix)] == [tokenizer.encode(text) for text in TEXTS]
    assert not read_meta(prefix).append_eod


@pytest.fixture(scope="module")
def single(trained, tmp_path_factory) -> str:
    return _with_workers(tmp_path_factory.mktemp("single"), trained, 1)


def _with_workers(folder: Path, trained: str, workers: int) -> str:
    # A bad record in the middle, and more batches than the processes can hold at once.
    source = write_jsonl(folder / "in.jsonl", TEXTS * 6)
    with source.open("a") as stream:
        stream.write("not json\n" + json.dumps({"text": "the last"}) + "\n")
    prefix = str(folder / "out")
    run(TokenizeConfig(input=[str(source)], output=prefix, tokenizer=trained + ".tokenizer.json", workers=workers))
    return prefix


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_workers(workers, trained, single, tmp_path):
    prefix = _with_workers(tmp_path, trained, workers)
    for suffix in (".bin", ".idx", ".json"):
        assert Path(prefix + suffix).read_bytes() == Path(single + suffix).read_bytes()
    assert texts_of(prefix)[-1] == "the last"


def test_training_is_deterministic(trained, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    run(TokenizeConfig(input=[str(source)], output=str(tmp_path / "a"), vocab_size=400))
    assert (tmp_path / "a.tokenizer.json").read_bytes() == Path(trained + ".tokenizer.json").read_bytes()


def test_every_kind_of_file_in_a_folder(trained, tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    root = tmp_path / "in"
    (root / "b").mkdir(parents=True)
    line = json.dumps({"text": "from jsonl"}).encode() + b"\n"
    (root / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\n   \n" + line)
    (root / "b" / "c.json.gz").write_bytes(gzip.compress(line) + gzip.compress(line.replace(b"jsonl", b"second")))
    (root / "b" / "d.jsonl.zst").write_bytes(zstandard.compress(line) + zstandard.compress(line * 2))
    (root / "e.txt").write_bytes(b"two\r\nlines")
    (root / "f.txt.gz").write_bytes(gzip.compress(b"packed"))
    (root / "g.txt.zst").write_bytes(zstandard.compress(b"packed more"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row one", None, "row three"]}), root / "h.parquet")
    (root / "README.md").write_text("not data")
    # Outputs of an earlier tokenization into the same folder are no documents.
    for suffix in (".idx", ".json", ".rejects.jsonl", ".tokenizer.json"):
        (root / ("old" + suffix)).write_text("{}")
    prefix = str(root / "out")
    for _ in range(2):
        run(TokenizeConfig(input=[str(root)], output=prefix, tokenizer=trained + ".tokenizer.json"))
        expected = ["from jsonl"] * 2 + ["from jsonl", "from second"] + ["from jsonl"] * 3
        assert texts_of(prefix) == [*expected, "two\r\nlines", "packed", "packed more", "row one", "row three"]
        assert rejects(prefix) == [("h.parquet", 2, "field 'text' is not a string")]


def test_bad_records_are_put_aside_with_file_and_line(trained, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b'{"other": "x"}',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b'{"text": " "}',
        b'["text"]',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "also good"}',
    ]
    source.write_bytes(b"\n".join(lines))
    (tmp_path / "z.txt").write_bytes(b"fine\nfine\nbad \xff\n")
    config = TokenizeConfig(
        input=[str(source), str(tmp_path / "z.txt")],
        output=str(tmp_path / "out"),
        tokenizer=trained + ".tokenizer.json",
    )
    run(config)
    assert texts_of(config.output) == ["good", "also good"]
    assert rejects(config.output) == [
        ("in.jsonl", 2, "not JSON"),
        ("in.jsonl", 3, "no field 'text'"),
        ("in.jsonl", 4, "field 'text' is not a string"),
        ("in.jsonl", 5, "invalid UTF-8"),
        ("in.jsonl", 6, "empty document"),
        ("in.jsonl", 7, "not a JSON object"),
        ("in.jsonl", 8, "lone surrogate in the text"),
        ("in.jsonl", 9, "not JSON"),
        ("z.txt", 3, "invalid UTF-8"),
    ]
    assert read_meta(config.output).rejected["invalid UTF-8"] == 2
    assert "2 documents" in (summary := capsys.readouterr().out) and "2 invalid UTF-8" in summary


@pytest.mark.parametrize("tokenizer", [None, "given"])
def test_strict_stops_at_the_first_bad_record(tokenizer, trained, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"other": 1}\n{broken\n')
    with pytest.raises(InputError, match=r"in\.jsonl:2: no field 'text'"):
        run(
            TokenizeConfig(
                input=[str(source)],
                output=str(tmp_path / "out"),
                tokenizer=tokenizer and trained + ".tokenizer.json",
                strict=True,
            )
        )
    assert not (tmp_path / "out.idx").exists()


def _input(tmp_path: Path, name: str, content: bytes) -> list[str]:
    (tmp_path / name).write_bytes(content)
    return [str(tmp_path / name)]


BAD_INPUTS = {
    "missing": (lambda tmp: [str(tmp / "none.jsonl")], r"none\.jsonl: no such file"),
    "suffix": (lambda tmp: _input(tmp, "a.csv", b"x"), r"a\.csv: unknown kind of file; expected one of \.txt"),
    "no files": (lambda tmp: [str(tmp)], "no input files in"),
    "no inputs": (lambda tmp: [], "no input was given"),
    "all rejected": (lambda tmp: _input(tmp, "a.jsonl", b"{\n{\n"), r"rejected: 2 not JSON, see .*out\.rejects\.jsonl"),
    "empty file": (lambda tmp: _input(tmp, "a.jsonl", b""), "no document to tokenize; rejected: none"),
    "cut gzip": (lambda tmp: _input(tmp, "a.txt.gz", gzip.compress(b"x" * 999)[:-9]), r"a\.txt\.gz: damaged archive"),
    "not gzip": (lambda tmp: _input(tmp, "a.txt.gz", b"plain"), r"a\.txt\.gz: Not a gzipped file"),
    "not zstd": (lambda tmp: _input(tmp, "a.jsonl.zst", b"plain text"), r"a\.jsonl\.zst: damaged archive"),
    "not parquet": (lambda tmp: _input(tmp, "a.parquet", b"plain text"), r"a\.parquet: damaged Parquet"),
    "overwrites": (lambda tmp: _input(tmp, "out.json", b'{"text": "x"}'), "would overwrite the input"),
}


@pytest.mark.parametrize("tokenizer", [None, "given"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_told_in_one_line(case, tokenizer, trained, tmp_path):
    make, message = BAD_INPUTS[case]
    inputs = make(tmp_path)
    given = tokenizer and trained + ".tokenizer.json"
    with pytest.raises(InputError, match=message) as error:
        run(TokenizeConfig(input=inputs, output=str(tmp_path / "out"), tokenizer=given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.idx").exists()
    assert (tmp_path / "out.rejects.jsonl").exists() == ("rejected: 2" in str(error.value))


def test_damaged_archives_and_columns(trained, tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    packed = zstandard.compress(json.dumps({"text": words(0, 5000)}).encode())
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    for name, message in {"a.jsonl.zst": "within a zstd frame", "b.parquet": "no column 'text'; it has body"}.items():
        with pytest.raises(InputError, match=message):
            run(TokenizeConfig(input=[str(tmp_path / name)], output=str(tmp_path / "out")))


@pytest.mark.parametrize("package, name", [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_missing_extra_is_named(package, name, monkeypatch, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package}; pip install megatron-ptrl\[data\]"):
        list(corpus.read_documents([tmp_path / name], "text", corpus.Rejects()))


@pytest.mark.parametrize("output", ["", "folder/"])
def test_output_must_be_a_prefix(output, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])
    with pytest.raises(InputError, match="expected a prefix"):
        run(TokenizeConfig(input=[str(source)], output=output))


def test_given_tokenizer_without_the_eod(trained, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])
    config = TokenizeConfig(
        input=[str(source)], output=str(tmp_path / "a"), tokenizer=trained + ".tokenizer.json", eod_token="</s>"
    )
    with pytest.raises(InputError, match=r"has no token '</s>'; set --eod_token .* '<\|endoftext\|>'"):
        run(config)
    (tmp_path / "broken.json").write_text("{}")
    for path, message in {"broken.json": "expected a Hugging Face tokenizer.json", "none.json": "No such file"}.items():
        with pytest.raises(InputError, match=message):
            Tokenizer(tmp_path / path)


def test_documents_that_would_end_early_or_have_no_tokens_are_put_aside(tmp_path):
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "END": 1}, unk_token="a"))
    plain.normalizer = tokenizers.normalizers.Replace("unknown", " ")
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    plain.save(str(tmp_path / "t.json"))
    source = write_jsonl(tmp_path / "in.jsonl", ["a a", "a END a", "unknown", "a"])
    config = TokenizeConfig(
        input=[str(source)], output=str(tmp_path / "a"), tokenizer=str(tmp_path / "t.json"), eod_token="END"
    )
    run(config)
    assert [ids.tolist() for ids in IndexedDataset(config.output)] == [[0, 0, 1], [0, 1]]
    assert rejects(config.output) == [("in.jsonl", 2, "EOD token in the text"), ("in.jsonl", 3, "no tokens")]


def test_a_tokenizer_keeps_no_truncation_template_or_plain_eod(trained, tmp_path):
    foreign = tokenizers.Tokenizer.from_file(trained + ".tokenizer.json")
    foreign.add_tokens(["<end>"])
    foreign.enable_truncation(3)
    foreign.enable_padding(length=50)
    foreign.post_processor = tokenizers.processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", 400)])
    foreign.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer(tmp_path / "t.json", "<end>")
    assert (tokenizer.eod, tokenizer.vocab_size, tokenizer.dtype) == (400, 401, numpy.uint16)
    for text in TEXTS[:50] + ["a<end>b"]:
        ids = tokenizer.encode(text)
        assert tokenizer.eod not in ids and tokenizer.decode(ids) == text


def test_int32_when_the_vocabulary_needs_it(tmp_path):
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    large.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    large.add_special_tokens(["<|endoftext|>"])
    large.save(str(tmp_path / "t.json"))
    source = write_jsonl(tmp_path / "in.jsonl", ["w69999 w1"])
    run(TokenizeConfig(input=[str(source)], output=str(tmp_path / "a"), tokenizer=str(tmp_path / "t.json")))
    assert [ids.tolist() for ids in IndexedDataset(str(tmp_path / "a"))] == [[69_999, 1, 70_000]]
    assert IndexedDataset(str(tmp_path / "a")).index.dtype == numpy.int32


def test_killed_run_leaves_no_pair_and_is_repeated_by_the_same_command(trained, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS * 6)
    config = TokenizeConfig(input=[str(source)], output=str(tmp_path / "a"), tokenizer=trained + ".tokenizer.json")
    encoded = tokenize_stage._encoded

    def slowly(*arguments: object) -> Iterator[object]:
        for item in encoded(*arguments):
            yield item
            time.sleep(0.2)

    monkeypatch.setattr(tokenize_stage, "_encoded", slowly)
    process = multiprocessing.get_context("fork").Process(target=run, args=(config,))
    process.start()
    bin_file = tmp_path / "a.bin.tmp"
    while not (bin_file.exists() and bin_file.stat().st_size):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    monkeypatch.undo()
    assert not {path.name for path in tmp_path.iterdir()} & {"a.bin", "a.idx", "a.json"}
    run(config)
    assert texts_of(str(tmp_path / "a")) == TEXTS * 6
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("suffix", indexed_output.PUBLISHED)
def test_no_index_beside_another_runs_tokens(suffix, trained, tmp_path, monkeypatch):
    """Killed before any of the renames that replace an earlier pair, a run leaves no index at all."""
    config = TokenizeConfig(
        input=[str(write_jsonl(tmp_path / "in.jsonl", ["first"]))],
        output=str(tmp_path / "a"),
        tokenizer=trained + ".tokenizer.json",
    )
    run(config)
    write_jsonl(tmp_path / "in.jsonl", ["the second text"])

    def killed(source: Path, target: str) -> None:
        if target == config.output + suffix:
            raise KeyboardInterrupt
        Path(source).rename(target)

    monkeypatch.setattr(indexed_output.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert not (tmp_path / "a.idx").exists()
    monkeypatch.undo()
    run(config)
    assert texts_of(config.output) == ["the second text"]


def test_stdlib_corpus_is_a_function_of_the_seed(tmp_path):
    script = Path(__file__).parents[1] / "examples" / "quickstart" / "collect_stdlib.py"
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        command = [sys.executable, str(script), str(tmp_path / name), "--megabytes", "0.3", "--seed", str(seed)]
        subprocess.run(command, check=True, capture_output=True)
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c
    records = [json.loads(line) for line in a.splitlines()]
    assert 0.3e6 <= sum(len(record["text"].encode()) for record in records) < 1e6
    assert all(record["source"].endswith(".py") and "site-packages" not in record["source"] for record in records)
