"""Every label of a training batch meets its own log-probability, however documents are split, mixed and packed."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sidecars import any_values, write_sidecar

from megatron_ptrl.config import DataConfig, RemitConfig, TokenizeConfig
from megatron_ptrl.data.batches import Samples, build_datasets, microbatches
from megatron_ptrl.data.indexed import open_indexed, resolve_tokenizer
from megatron_ptrl.data.tokenize_stage import run
from megatron_ptrl.errors import InputError

SEQ = 16
APART = 100_000  # between the numbers of the tokens of one prefix and of the next


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def corpus(folder: Path, name: str, texts: list[str], tokenizer: str | None = None, **options: object) -> str:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = str(folder / name)
    run(TokenizeConfig(input=[str(source)], output=output, vocab_size=400, tokenizer=tokenizer, **options))
    return output


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> list[str]:
    """Documents of 1 to 90 tokens: several to a row, and some over several rows."""
    folder = tmp_path_factory.mktemp("aligned")

    def texts(name: str, documents: int) -> list[str]:
        return [" ".join(f"{name}{number}{i}" for i in range(1 + number * 7 % 23)) for number in range(documents)]

    first = corpus(folder, "a", texts("a", 90))
    return [first, corpus(folder, "b", texts("b", 40), first + ".tokenizer.json")]


@pytest.fixture(scope="module")
def sidecars(prefixes, tmp_path_factory) -> list[str]:
    """Of each token the value -(its number + 1) / 2^10, which fp32 holds."""
    folder, made = tmp_path_factory.mktemp("sidecars"), []
    for number, prefix in enumerate(prefixes):
        tokens = open_indexed(prefix)[1].tokens
        assert tokens < APART
        values = -(numpy.arange(tokens) + number * APART + 1) / 1024
        made.append(write_sidecar(prefix, str(folder / f"{number}"), values))
    return made


def datasets(tmp_path: Path, data: DataConfig, remit: RemitConfig, samples: int = 150) -> Samples:
    tokenizer, cache = resolve_tokenizer(data), tmp_path / "cache"
    options = {"train_samples": samples, "valid_samples": 4, "tokenizer": tokenizer, "cache": cache, "remit": remit}
    train, valid = build_datasets(data, seed=3, **options)
    assert set(valid[0]) == set(train.dataset[0]), "held-out samples carry nothing more"
    return train


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("blended", [False, True])
def test_every_label_meets_its_own_value(prefixes, sidecars, tmp_path, blended, isolated):
    parts = ["0.7", prefixes[1], "0.3", prefixes[0]] if blended else prefixes[:1]
    data = DataConfig(train=parts, seq_length=SEQ, split="80,20", isolate_documents=isolated)
    chosen = sidecars[::-1] if blended else sidecars[:1]
    train = datasets(tmp_path, data, RemitConfig(weighting="remit", sidecar=chosen))
    opened = [IndexedDataset(prefix) for prefix in prefixes]
    stored = [numpy.concatenate(list(dataset)) for dataset in opened]
    eod, seen = resolve_tokenizer(data).eod, set()
    batches = microbatches(
        train, first_sample=0, end_sample=len(train), global_batch=6, micro_batch=3, dp_rank=0, dp_size=1
    )
    for batch in batches:
        for labels, values in zip(batch["labels"].tolist(), batch["reference_logprob"].tolist(), strict=True):
            numbers = [round(-value * 1024) - 1 for value in values]
            assert [int(stored[n // APART][n % APART]) for n in numbers] == labels
            # Words repeat, places do not: inside a document one token follows the other.
            pairs = zip(labels, itertools.pairwise(numbers), strict=False)
            assert all(after == before + 1 for label, (before, after) in pairs if label != eod)
            seen |= set(numbers)
    assert len({n // APART for n in seen}) == 1 + blended
    assert max(n % APART for n in seen if n < APART) < 0.9 * len(stored[0]), "no held-out document trains"
    assert len(seen) > 1000


def test_documents_are_those_of_the_labels(prefixes, tmp_path):
    data = DataConfig(train=prefixes[:1], seq_length=SEQ)
    train = datasets(tmp_path, data, RemitConfig(weighting="rho1", reference="r", center="document"), 60)
    eod, ends = resolve_tokenizer(data).eod, 0
    for sample in range(60):
        row = train[sample]
        labels, ids = row["labels"].tolist(), row["document_ids"].tolist()
        for place in range(1, SEQ):
            # The end belongs to the document that it closes.
            assert ids[place] - ids[place - 1] == (labels[place - 1] == eod)
        ends += labels.count(eod)
    assert ends > 10


def test_side_cars_that_do_not_belong_are_refused(prefixes, sidecars, tmp_path):
    other = corpus(tmp_path, "other", ["quite other words"] * 30)
    nan = any_values(prefixes[0], 1)
    nan[200:] = numpy.nan
    data = DataConfig(train=prefixes, seq_length=SEQ)

    def refused(said: str, chosen: list[str]) -> None:
        with pytest.raises(InputError, match=said):
            train = datasets(tmp_path, data, RemitConfig(weighting="remit", sidecar=chosen))
            for sample in range(len(train)):
                train[sample]

    refused("remit.sidecar has 1 prefixes and data.train 2; expected one for each", sidecars[:1])
    refused("belongs to another data set than", sidecars[::-1])
    refused("belongs to another tokenizer", [write_sidecar(other, str(tmp_path / "o"), any_values(other, 0))] * 2)
    refused("no such file; make it with `ptrl score`", [str(tmp_path / "none"), sidecars[1]])
    refused(r"document \d+, token \d+: nan is no", [write_sidecar(prefixes[0], str(tmp_path / "n"), nan), sidecars[1]])
    cut = write_sidecar(prefixes[0], str(tmp_path / "cut"), any_values(prefixes[0], 0))
    Path(cut + ".bin").write_bytes(Path(cut + ".bin").read_bytes()[:-4])
    refused("cut.bin: .* bytes, expected", [cut, sidecars[1]])


def test_documents_need_ends(tmp_path, prefixes):
    prefix = corpus(tmp_path, "endless", ["a b c d"] * 40, prefixes[0] + ".tokenizer.json", append_eod=False)
    remit = RemitConfig(weighting="remit", reference="r", center="document")
    with pytest.raises(InputError, match="remit.center document: .* has no ends of documents"):
        datasets(tmp_path, DataConfig(train=[prefix], seq_length=SEQ), remit)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"weighting": "remit"}, "nothing says what the reference prefers; set remit.sidecar"),
        ({"weighting": "rho1", "sidecar": []}, "nothing says what the reference prefers"),
        ({"weighting": "remit", "sidecar": ["a"], "reference": "b"}, "both set"),
        ({"epsilon": 1.0}, "remit.epsilon is 1.0; expected 0 or more, below 1"),
        ({"epsilon": -0.1}, "remit.epsilon is -0.1"),
        ({"keep": 0.0}, "remit.keep is 0.0"),
        ({"top_tokens": -1}, "remit.top_tokens is -1"),
    ],
)
def test_settings_that_cannot_work(options, said):
    with pytest.raises(InputError, match=said):
        RemitConfig(**options)
