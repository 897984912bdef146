"""Which tokens reach which rank: the data's, in an order that neither the layout nor a restart changes."""

import itertools
import json
import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_ptrl.config import DataConfig, TokenizeConfig
from megatron_ptrl.data.batches import Samples, build_datasets, microbatches, unigram_cross_entropy
from megatron_ptrl.data.index_cache import building_in
from megatron_ptrl.data.indexed import resolve_tokenizer
from megatron_ptrl.data.tokenize_stage import run
from megatron_ptrl.errors import InputError

SEQ = 16


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> dict[str, str]:
    """`a`, `b` and the small `c` share a tokenizer but no word, so that a token tells its document and its prefix."""
    folder = tmp_path_factory.mktemp("batches")
    made: dict[str, str] = {}
    for name, documents in {"a": 120, "b": 60, "c": 3}.items():
        source = folder / f"{name}.jsonl"
        texts = [
            " ".join(f"{name}{number}{place}" for place in range(3 + number * 7 % 11)) for number in range(documents)
        ]
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        made[name] = str(folder / name)
        given = made["a"] + ".tokenizer.json" if name != "a" else None
        run(TokenizeConfig(input=[str(source)], output=made[name], vocab_size=400, tokenizer=given))
    return made


def datasets(
    tmp_path: Path, data: DataConfig, train_samples: int = 40, valid_samples: int = 0, seed: int = 1
) -> tuple[Samples, Samples | None]:
    return build_datasets(
        data,
        seed=seed,
        train_samples=train_samples,
        valid_samples=valid_samples,
        tokenizer=resolve_tokenizer(data),
        cache=tmp_path / "cache",
    )


def config(*train: str, **options: object) -> DataConfig:
    return DataConfig(**{"train": list(train), "seq_length": SEQ, **options})


def rows(samples: Samples, **options: object) -> list[list[list[int]]]:
    """Per microbatch the rows of tokens."""
    settings = {"first_sample": 0, "end_sample": len(samples), "global_batch": 8, "micro_batch": 2}
    settings |= {"dp_rank": 0, "dp_size": 1, **options}
    return [batch["tokens"].tolist() for batch in microbatches(samples, **settings)]


def test_a_batch_has_megatrons_keys_types_and_the_next_token_as_label(prefixes, tmp_path):
    train, valid = datasets(tmp_path, config(prefixes["a"]))
    assert valid is None and len(train) == 40
    batches = microbatches(train, first_sample=0, end_sample=8, global_batch=8, micro_batch=4, dp_rank=0, dp_size=1)
    for batch in batches:
        assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "attention_mask"}
        for key in ("tokens", "labels", "position_ids"):
            assert batch[key].shape == (4, SEQ) and batch[key].dtype == torch.int64
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(4, SEQ))
        assert batch["loss_mask"].dtype == torch.float32 and bool((batch["loss_mask"] == 1).all())
        assert batch["attention_mask"] is None


def test_one_epoch_is_the_stream_of_documents(prefixes, tmp_path):
    """Samples laid end to end in stream order are whole documents, each once."""
    indexed = IndexedDataset(prefixes["a"])
    samples = (int(indexed.sequence_lengths.sum()) - 1) // SEQ
    train, _ = datasets(tmp_path, config(prefixes["a"], split="1"), train_samples=samples)
    order = numpy.argsort(train.dataset.shuffle_index)
    stream = [token for sample in order for token in train[int(sample)]["tokens"].tolist()]
    eod = resolve_tokenizer(config(prefixes["a"])).eod
    seen = [tuple(group) for end, group in itertools.groupby(stream, lambda token: token == eod) if not end]
    documents = {tuple(ids[:-1].tolist()) for ids in indexed}
    assert len(set(seen)) == len(seen) and set(seen[:-1]) < documents
    # The one left over did not fill a sequence.
    assert len(seen) >= len(documents) - 2


@pytest.mark.parametrize("dp_size, micro_batch", [(1, 1), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_global_batches_do_not_depend_on_the_layout(dp_size, micro_batch, prefixes, tmp_path):
    train, _ = datasets(tmp_path, config(prefixes["a"]))
    options = {"micro_batch": micro_batch, "dp_size": dp_size}
    ranks = [rows(train, dp_rank=rank, **options) for rank in range(dp_size)]
    together = [row for turn in zip(*ranks, strict=True) for part in turn for row in part]
    assert together == [train[sample]["tokens"].tolist() for sample in range(40)]


def test_first_sample_resumes(prefixes, tmp_path):
    train, _ = datasets(tmp_path, config(prefixes["a"]))
    assert rows(train, first_sample=24) == rows(train)[12:]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_rows_beyond_the_end_are_masked(dp_size, prefixes, tmp_path):
    train, _ = datasets(tmp_path, config(prefixes["a"]))
    settings = {"first_sample": 8, "end_sample": 19, "global_batch": 8, "micro_batch": 2, "dp_size": dp_size}
    counted: list[list[int]] = []
    for rank in range(dp_size):
        batches = list(microbatches(train, dp_rank=rank, **settings))
        assert len(batches) == 16 // (2 * dp_size)
        for batch in batches:
            live = batch["loss_mask"].sum(1)
            assert set(live.tolist()) <= {0.0, float(SEQ)}
            counted += batch["tokens"][live > 0].tolist()
    assert sorted(counted) == sorted(train[sample]["tokens"].tolist() for sample in range(8, 19))


def test_order_is_a_function_of_the_seed_within_the_epochs(prefixes, tmp_path):
    first = rows(datasets(tmp_path, config(prefixes["a"]))[0])
    assert first == rows(datasets(tmp_path / "another_cache", config(prefixes["a"]))[0])
    assert first != rows(datasets(tmp_path, config(prefixes["a"]), seed=2)[0])
    longer = rows(datasets(tmp_path, config(prefixes["a"]), train_samples=80)[0])
    assert longer[: len(first)] == first


def test_new_documents_under_an_old_name_do_not_meet_the_old_index(prefixes, tmp_path):
    source, prefix = tmp_path / "in.jsonl", str(tmp_path / "p")
    given = prefixes["a"] + ".tokenizer.json"
    for length in (400, 60):
        source.write_text("".join(json.dumps({"text": "a001 " * length}) + "\n" for _ in range(4)))
        run(TokenizeConfig(input=[str(source)], output=prefix, tokenizer=given))
        train, _ = datasets(tmp_path, config(prefix, split="1"), train_samples=30)
        assert train.dataset.document_index.max() == 3
        assert all(len(row) == SEQ for batch in rows(train, end_sample=30, global_batch=10) for row in batch)


def test_a_half_written_index_is_built_again(prefixes, tmp_path):
    expected = rows(datasets(tmp_path, config(prefixes["a"]))[0])
    for path in (tmp_path / "cache").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-20])
    assert rows(datasets(tmp_path, config(prefixes["a"]))[0]) == expected


def owners(samples: Samples, prefixes: dict[str, str]) -> list[set[tuple[str, int]]]:
    """(prefix, document) of every sample that its tokens belong to."""
    owner: dict[tuple[int, ...], tuple[str, int]] = {}
    for name, prefix in prefixes.items():
        for number, ids in enumerate(IndexedDataset(prefix)):
            owner[tuple(ids[:-1].tolist())] = (name, number)
    found = []
    for index in range(len(samples)):
        dataset, sample = samples.dataset, index
        if hasattr(dataset, "datasets"):
            dataset, sample = dataset.datasets[dataset.dataset_index[index]], dataset.dataset_sample_index[index]
        _, documents = dataset._query_document_sample_shuffle_indices(sample)
        name = next(name for name, prefix in prefixes.items() if prefix == dataset.dataset_path)
        found.append({(name, int(document)) for document in documents})
    return found


def test_split_holds_out_the_last_documents(prefixes, tmp_path):
    train, valid = datasets(tmp_path, config(prefixes["a"], split="75,25"), train_samples=300, valid_samples=1000)
    trained, held_out = (set().union(*owners(samples, prefixes)) for samples in (train, valid))
    assert trained == {("a", number) for number in range(90)}
    assert held_out == {("a", number) for number in range(90, 120)}
    tokens = sum(len(ids) for ids in itertools.islice(IndexedDataset(prefixes["a"]), 90, None))
    assert len(valid) == (tokens - 1) // SEQ
    distinct = {tuple(row) for batch in rows(valid, global_batch=2) for row in batch}
    assert len(distinct) == len(valid)


def test_fewer_held_out_samples_than_there_are(prefixes, tmp_path):
    _, valid = datasets(tmp_path, config(prefixes["a"], split="75,25"), valid_samples=5)
    assert len(valid) == 5


def test_separate_held_out_prefixes(prefixes, tmp_path):
    data = config(prefixes["a"], valid=[prefixes["b"]])
    train, valid = datasets(tmp_path, data, train_samples=500, valid_samples=1000)
    assert set().union(*owners(train, prefixes)) == {("a", number) for number in range(120)}
    assert {name for name, _ in set().union(*owners(valid, prefixes))} == {"b"}


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.05, 0.95)])
def test_blend_weights_are_the_shares_of_samples(weights, prefixes, tmp_path):
    blend = config(str(weights[0]), prefixes["a"], str(weights[1]), prefixes["b"], split="90,10")
    train, valid = datasets(tmp_path, blend, train_samples=600, valid_samples=1000)
    names = [next(iter(owner))[0] for owner in owners(train, prefixes)]
    for end in (20, 200, 600):
        assert abs(Counter(names[:end])["a"] - weights[0] * end) <= 1
    held_out = owners(valid, prefixes)
    share = Counter(next(iter(owner))[0] for owner in held_out)["a"] / len(held_out)
    assert abs(share - weights[0]) <= 1 / len(held_out)
    # One pass: the part that limits it is used up, none comes twice.
    drawn = Counter(valid.dataset.dataset_index.tolist())
    assert any(drawn[part] == len(dataset) for part, dataset in enumerate(valid.dataset.datasets))
    assert all(drawn[part] <= len(dataset) for part, dataset in enumerate(valid.dataset.datasets))


def test_unweighted_blend_is_proportional_to_tokens(prefixes, tmp_path):
    tokens = [sum(map(len, IndexedDataset(prefixes[name]))) for name in "ab"]
    train, _ = datasets(tmp_path, config(prefixes["a"], prefixes["b"]), train_samples=300)
    count = Counter(next(iter(owner))[0] for owner in owners(train, prefixes))["a"]
    assert abs(count - 300 * tokens[0] / sum(tokens)) <= 1


@pytest.mark.parametrize(
    "options, valid_samples, message",
    [
        ({"split": "100,0"}, 4, r"valid documents: none of its 120 by data\.split '100,0'"),
        ({"split": "0,100"}, 0, "train documents: none of its 120"),
        ({"split": "99.9,0.1"}, 4, "valid documents: none of its 120"),
        ({"split": "99,1"}, 4, r"valid documents: \d+ tokens, too few for one sequence of data\.seq_length 1000"),
        ({"seq_length": 100_000}, 0, r"train documents: \d+ tokens, too few for one sequence"),
        ({"split": "a,b"}, 0, "data.split is 'a,b'; expected shares"),
        ({"split": "0,0"}, 0, "expected shares"),
        ({"split": "-1,2"}, 0, "expected shares"),
        ({"split": "1,2,3,4"}, 0, "expected shares"),
    ],
)
def test_too_little_data_or_a_bad_split(options, valid_samples, message, prefixes, tmp_path):
    options = {"seq_length": 1000, **options} if "too few" in message else options
    with pytest.raises(InputError, match=message):
        datasets(tmp_path, config(prefixes["a"], **options), valid_samples=valid_samples)


def test_no_held_out_documents_needed_without_an_evaluation(prefixes, tmp_path):
    assert datasets(tmp_path, config(prefixes["a"], split="100,0"))[1] is None


ANOTHER_RUN = """
import fcntl, sys, time, numpy
lock = open(sys.argv[1] + "/.lock", "a")
fcntl.lockf(lock, fcntl.LOCK_EX)
index = open(sys.argv[1] + "/a-GPTDataset-train-document_index.npy", "wb")
index.write(b"half of it")
index.flush()
print("ready", flush=True)
time.sleep(1)
index.seek(0)
numpy.save(index, numpy.arange(9))
index.close()
"""


def test_what_another_run_is_writing_in_the_same_cache_is_left_to_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ANOTHER_RUN, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with building_in(tmp_path):
            (index,) = tmp_path.glob("*.npy")
            assert len(numpy.load(index)) == 9


def test_cache_that_cannot_be_written(prefixes, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"data\.cache .*cache: File exists"):
        datasets(tmp_path, config(prefixes["a"]))


def test_sizes_that_do_not_divide(prefixes, tmp_path):
    train, _ = datasets(tmp_path, config(prefixes["a"]))
    with pytest.raises(InputError, match=r"global_batch is 8; expected a multiple of train\.micro_batch 3 times .* 1"):
        rows(train, micro_batch=3)


def isolated_by_hand(tokens: list[int], eod: int) -> tuple[list[int], list[list[bool]]]:
    """(position ids, barred[i][j]) of one row: a document ends with its EOD, and is all that a token can see."""
    document = list(itertools.accumulate((token == eod for token in tokens[:-1]), initial=0))
    starts = {number: document.index(number) for number in document}
    positions = [place - starts[number] for place, number in enumerate(document)]
    barred = [[j > i or document[j] != document[i] for j in range(len(tokens))] for i in range(len(tokens))]
    return positions, barred


def test_isolated_documents_see_only_themselves(prefixes, tmp_path):
    data = config(prefixes["a"], isolate_documents=True)
    train, _ = datasets(tmp_path, data, train_samples=64)
    eod = resolve_tokenizer(data).eod
    boundaries = 0
    for batch in microbatches(
        train, first_sample=0, end_sample=64, global_batch=8, micro_batch=4, dp_rank=0, dp_size=1
    ):
        assert batch["attention_mask"].shape == (4, 1, SEQ, SEQ) and batch["attention_mask"].dtype == torch.bool
        for row in range(4):
            tokens = batch["tokens"][row].tolist()
            positions, barred = isolated_by_hand(tokens, eod)
            assert batch["position_ids"][row].tolist() == positions
            assert batch["attention_mask"][row, 0].tolist() == barred
            boundaries += tokens.count(eod)
            assert batch["loss_mask"][row].tolist() == [float(token != eod) for token in tokens]
    assert boundaries > 20
    plain, _ = datasets(tmp_path, config(prefixes["a"]), train_samples=64)
    assert rows(plain) == rows(train)


def test_isolation_needs_ends_of_documents(prefixes, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "a001 " * 99}) + "\n")
    prefix, given = str(tmp_path / "p"), prefixes["a"] + ".tokenizer.json"
    run(TokenizeConfig(input=[str(source)], output=prefix, tokenizer=given, append_eod=False))
    with pytest.raises(InputError, match="has no ends of documents"):
        datasets(tmp_path, config(prefix, isolate_documents=True))


@pytest.mark.parametrize("ids", [[5000], [-7]])
def test_ids_outside_the_vocabulary_are_found(ids, prefixes, tmp_path):
    prefix = str(tmp_path / "foreign")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.int32)
    for document in [[1, 2, 3, 0]] * 20 + [[*ids, 0]]:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(prefix + ".idx")
    data = config(prefix, split="1", tokenizer=prefixes["a"] + ".tokenizer.json")
    train, _ = datasets(tmp_path, data, train_samples=5)
    with pytest.raises(InputError, match=rf"token ids from .*{ids[0]}.*, but the tokenizer has \d+; name"):
        rows(train, global_batch=5, micro_batch=5)
    with pytest.raises(InputError, match=f"foreign: token ids from .*{ids[0]}"):
        unigram_cross_entropy(train, train)


def test_an_iterator_that_is_dropped_ends_its_thread(prefixes, tmp_path):
    train, _ = datasets(tmp_path, config(prefixes["a"]))
    before = threading.active_count()
    batches = microbatches(train, first_sample=0, end_sample=40, global_batch=8, micro_batch=1, dp_rank=0, dp_size=1)
    next(batches)
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("microbatches"):
            thread.join(5)
    assert threading.active_count() <= before


@pytest.mark.parametrize("blended", [False, True])
def test_unigram_cross_entropy(blended, prefixes, tmp_path, monkeypatch):
    # Chunks shorter than the data, so that their seams are crossed.
    monkeypatch.setattr("megatron_ptrl.data.batches.UNIGRAM_CHUNK", 100)
    a, b = prefixes["a"], prefixes["b"]
    data = config("0.25", a, "0.75", b, split="80,20") if blended else config(a, split="80,20")
    train, valid = datasets(tmp_path, data, valid_samples=7)
    vocab_size = resolve_tokenizer(data).vocab_size
    spans = [(a, 96, 0.25), (b, 48, 0.75)] if blended else [(a, 96, 1.0)]
    probability, total = numpy.zeros(vocab_size), 0
    for prefix, end, weight in spans:
        counts = Counter(token for ids in itertools.islice(IndexedDataset(prefix), end) for token in ids.tolist())
        total += counts.total()
        for token, count in counts.items():
            probability[token] += weight * count / counts.total()
    smoothed = (probability * total + 1) / (total + vocab_size)
    assert math.isclose(smoothed.sum(), 1.0)
    labels = [label for sample in range(7) for label in valid[sample]["labels"].tolist()]
    expected = -sum(math.log(smoothed[label]) for label in labels) / len(labels)
    assert math.isclose(unigram_cross_entropy(train, valid), expected, rel_tol=1e-12)


def _rank(rank: int, world_size: int, folder: str, data: DataConfig) -> list[list[list[list[int]]]]:
    options = {"dp_rank": rank, "dp_size": world_size}
    return [rows(samples, **options) for samples in datasets(Path(folder), data, valid_samples=6)]


def test_two_ranks_share_one_index(ranks, prefixes, tmp_path):
    data = config("0.5", prefixes["a"], "0.5", prefixes["b"], split="80,20")
    seen = ranks.run(2, _rank, str(tmp_path), data)
    alone = datasets(tmp_path / "alone", data, valid_samples=6)
    for which, samples in enumerate(alone):
        together = [row for turn in zip(seen[0][which], seen[1][which], strict=True) for part in turn for row in part]
        assert together[: len(samples)] == [samples[sample]["tokens"].tolist() for sample in range(len(samples))]
    assert len(list((tmp_path / "cache").glob("*-dataset_index.npy"))) == 2
