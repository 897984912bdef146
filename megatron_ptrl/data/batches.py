"""`.bin/.idx` -> Megatron-Core datasets -> the microbatches of one data-parallel rank.

    parts.open_parts  ->  build_datasets  ->  Samples (train, valid)  ->  microbatches  ->  Megatron's batch dict

A sample is `seq_length` tokens of documents packed end to end, and its number alone decides where it goes: the layout
of the ranks and the microbatch size cut the same global batches differently. The datasets and their order are those
of Megatron-Core's BlendedMegatronDatasetBuilder; its parts are put together here because the builder loops for ever
on a split without documents and repeats held-out documents to fill a request.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor

from megatron_ptrl.config import DataConfig, RemitConfig
from megatron_ptrl.data.aligned import label_logprobs, open_sidecars
from megatron_ptrl.data.index_cache import building_in
from megatron_ptrl.data.parts import Part, check_enough, index_identity, open_parts
from megatron_ptrl.data.sidecar import SideCar
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError

Batch: TypeAlias = dict[str, Tensor | None]

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
EXTRA_KEYS = REFERENCE_LOGPROB, DOCUMENT_IDS = "reference_logprob", "document_ids"
PREFETCHED_MICROBATCHES = 4
# Samples built in excess for each part of a blend, as Megatron-Core's builder does: the draw may overshoot by one.
SURPLUS = 0.005
# More training tokens than this do not change a unigram distribution.
UNIGRAM_TOKENS = 100_000_000
UNIGRAM_CHUNK = 1 << 22


class Rows(Protocol):
    """Samples by their number; each a batch without the dimension `b`."""

    @property
    def vocab_size(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, sample: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Samples:
    """The first `count` samples of a Megatron-Core dataset, which may hold more."""

    dataset: GPTDataset | BlendedDataset
    count: int
    vocab_size: int
    sidecars: list[SideCar] | None = None
    """One for each part of a blend; gives a sample the log-probabilities of its labels."""
    with_document_ids: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """One sample: a batch without the dimension `b`, with attention_mask only when documents are isolated."""
        row = self.dataset[sample]
        if self.sidecars is not None:
            row[REFERENCE_LOGPROB] = label_logprobs(self.dataset, self.sidecars, sample)
        if self.with_document_ids:
            # Of the label: behind the end of a document it belongs to the next one.
            row[DOCUMENT_IDS] = (row["tokens"] == self.dataset.config.tokenizer.eod).cumsum(0)
        return row


@dataclass(frozen=True)
class _DatasetTokenizer:
    """What Megatron-Core's datasets ask of a tokenizer. Without a pad id they leave every token in the loss."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]
    """Goes into the name of the cached sample index."""


def build_datasets(
    data: DataConfig,
    *,
    seed: int,
    train_samples: int,
    valid_samples: int,
    tokenizer: Tokenizer,
    cache: str | Path,
    remit: RemitConfig = RemitConfig(),  # noqa: B008 (frozen)
) -> tuple[Samples, Samples | None]:
    """(train, valid): open the prefixes, build their sample indices; valid is None when `valid_samples` is 0.

    Called on every rank, with torch.distributed initialised. Rank 0 builds, the others load its files from `cache`,
    a folder that all ranks see; one barrier a dataset. Nothing needs CUDA.

    Order: a function of the seed, the documents, `seq_length` and how many epochs `train_samples` needs. Within that
    many epochs asking for more samples appends; another epoch reshuffles all (a last one under 80 % stays apart).
    Parts of a blend are drawn so that their shares are right at any moment; each repeats when it runs out.

    Held-out samples never repeat: `len(valid)` is `valid_samples`, or what there is until the first part runs out.
    Training samples carry what the weights of `remit` need: its side-cars' log-probabilities, ids of documents.
    Raises InputError for broken files, another tokenizer, no held-out documents, less than one sequence of tokens, or
    side-cars that do not belong to the training prefixes.
    """
    assert train_samples > 0 and valid_samples >= 0
    weighs = remit.weighting != "none"
    by_document = weighs and remit.center == "document"
    train_parts, valid_parts = open_parts(data, tokenizer, needs_ends="remit.center document" if by_document else None)
    sidecars = open_sidecars(remit.sidecar, train_parts, tokenizer) if weighs and remit.sidecar else None
    for part in train_parts:
        check_enough(part, "train", data)
    for part in valid_parts if valid_samples else []:
        check_enough(part, "valid", data)
    with building_in(Path(cache)):
        train = _build(train_parts, Split.train, train_samples, data, seed, tokenizer, cache)
        valid = None
        if valid_samples:
            valid = _build(valid_parts, Split.valid, valid_samples, data, seed, tokenizer, cache)
    return replace(train, sidecars=sidecars, with_document_ids=by_document), valid


def _build(
    parts: list[Part], split: Split, samples: int, data: DataConfig, seed: int, tokenizer: Tokenizer, cache: str | Path
) -> Samples:
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=data.seq_length,
        blend=([part.prefix for part in parts], None),
        split="1" if data.valid else data.split,
        path_to_cache=str(cache),
        tokenizer=_DatasetTokenizer(tokenizer.vocab_size, tokenizer.eod, index_identity(parts, tokenizer)),
        reset_position_ids=data.isolate_documents,
        reset_attention_mask=data.isolate_documents,
        create_attention_mask=data.isolate_documents,
        eod_mask_loss=data.isolate_documents,
    )

    def built(kind: type, *arguments: object) -> GPTDataset | BlendedDataset:
        return BlendedMegatronDatasetBuilder.build_generic_dataset(kind, lambda: True, True, *arguments)

    def wanted(part: Part) -> int | None:
        if split is Split.valid:
            return None  # exactly one pass
        return samples if len(parts) == 1 else ceil(ceil(samples * part.weight) * (1 + SURPLUS))

    datasets = [
        built(
            GPTDataset,
            part.indexed,
            part.prefix,
            numpy.arange(part.begin, part.end, dtype=numpy.int32),
            wanted(part),
            split,
            config,
        )
        for part in parts
    ]
    if len(parts) == 1:
        return Samples(datasets[0], min(samples, len(datasets[0])), tokenizer.vocab_size)
    weights = [part.weight for part in parts]
    if split is Split.valid:
        samples = _until_exhausted(weights, [len(dataset) for dataset in datasets], samples)
    return Samples(built(BlendedDataset, datasets, weights, samples, config), samples, tokenizer.vocab_size)


def _until_exhausted(weights: list[float], lengths: list[int], samples: int) -> int:
    """How many samples a blend gives, up to `samples`, before it asks a part for more than it has."""
    size = min(samples, sum(lengths))
    dataset_index, sample_index = numpy.zeros(size, dtype=numpy.int16), numpy.zeros(size, dtype=numpy.int64)
    helpers.build_blending_indices(dataset_index, sample_index, weights, len(weights), size, False)
    beyond = numpy.flatnonzero(sample_index >= numpy.array(lengths)[dataset_index])
    return int(beyond[0]) if beyond.size else size


def microbatches(
    samples: Rows,
    *,
    first_sample: int,
    end_sample: int,
    global_batch: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's microbatches of samples [first_sample, end_sample), in order, prepared ahead in a thread.

    tokens, labels, position_ids: int64 [b, s]     loss_mask: fp32 [b, s]
    attention_mask: bool [b, 1, s, s], True where attention is barred, or None for plain causal attention
    reference_logprob: fp32 [b, s], document_ids: int64 [b, s], of the labels, where `build_datasets` was asked for them

    Global batch g holds samples first_sample + [g * global_batch, (g + 1) * global_batch), whatever the layout;
    within it `dp_size` ranks take `micro_batch` samples each in turn, as in Megatron. Every rank gets the same number
    of microbatches: the last global batch is filled up with rows whose loss_mask is all zero.
    Raises InputError when the batch sizes do not divide or a token id lies outside the tokenizer's vocabulary.
    """
    if global_batch % (micro_batch * dp_size):
        raise InputError(
            f"train.global_batch is {global_batch}; expected a multiple of train.micro_batch {micro_batch} times "
            f"the data-parallel size {dp_size}"
        )
    assert 0 <= first_sample and end_sample <= len(samples), f"[{first_sample}, {end_sample}) of {len(samples)} samples"
    padded_end = first_sample + ceil((end_sample - first_sample) / global_batch) * global_batch
    starts = range(first_sample + dp_rank * micro_batch, padded_end, micro_batch * dp_size)
    batches = (_collate(samples, start, start + micro_batch, end_sample, pin_memory) for start in starts)
    return _prefetched(batches)


def _collate(samples: Rows, begin: int, end: int, end_sample: int, pin_memory: bool) -> Batch:
    # A filler repeats the last sample: its values are ordinary, so only the loss mask tells it apart.
    rows = [samples[min(sample, end_sample - 1)] for sample in range(begin, end)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in (*BATCH_KEYS, *EXTRA_KEYS) if key in rows[0]}
    batch["loss_mask"][max(end_sample - begin, 0) :] = 0.0
    for key in ("tokens", "labels"):
        _check_ids(batch[key].min(), batch[key].max(), samples.vocab_size, f"samples {begin} to {end - 1}")
    if pin_memory:
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return dict.fromkeys(BATCH_KEYS) | batch


def _check_ids(smallest: Any, largest: Any, vocab_size: int, where: str) -> None:
    if smallest < 0 or largest >= vocab_size:
        raise InputError(
            f"{where}: token ids from {smallest} to {largest}, but the tokenizer has {vocab_size}; "
            "name the tokenizer that the data were made with by data.tokenizer"
        )


def _prefetched(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same items, made by a thread a few ahead; its exception is raised here, at the item that failed."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED_MICROBATCHES)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                pass

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=produce, name="microbatches", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def unigram_cross_entropy(train: Samples, valid: Samples) -> float:
    """Nats/token of the held-out samples' labels under the frequencies of the training tokens.

    What a model reaches that knows how often each token occurs and nothing of its context. Frequencies are those of
    the training documents (of the leading 100 million tokens of each part), mixed by the blend's weights, plus one
    for every token of the vocabulary. Reads both datasets in this process, no collectives.
    """
    blended = isinstance(train.dataset, BlendedDataset)
    parts = train.dataset.datasets if blended else [train.dataset]
    weights = train.dataset.weights if blended else [1.0]
    counted = [_token_counts(part, train.vocab_size) for part in parts]
    total = sum(int(counts.sum()) for counts in counted)
    mixed = sum(weight * counts / counts.sum() for weight, counts in zip(weights, counted, strict=True))
    logprob = numpy.log((total * mixed + 1) / (total + train.vocab_size))
    loss = targets = 0.0
    for sample in range(len(valid)):
        row = valid[sample]
        mask = row["loss_mask"].double().numpy()
        loss -= float(logprob[row["labels"].numpy()] @ mask)
        targets += float(mask.sum())
    return loss / targets


def _token_counts(dataset: GPTDataset, vocab_size: int) -> numpy.ndarray:
    """Occurrences of each id in the dataset's documents, which lie end to end in the `.bin`: float64 [vocab_size]."""
    index = dataset.dataset.index
    begin, end = int(dataset.indices[0]), int(dataset.indices[-1]) + 1
    offset = int(index.sequence_pointers[begin])
    tokens = min(int(index.sequence_lengths[begin:end].sum(dtype=numpy.int64)), UNIGRAM_TOKENS)
    counts = numpy.zeros(vocab_size, dtype=numpy.int64)
    for start in range(0, tokens, UNIGRAM_CHUNK):
        count = min(UNIGRAM_CHUNK, tokens - start)
        ids = dataset.dataset.bin_reader.read(index.dtype, count, offset + start * index.dtype_size)
        _check_ids(ids.min(), ids.max(), vocab_size, dataset.dataset_path)
        counts += numpy.bincount(ids, minlength=vocab_size)
    return counts.astype(numpy.float64)
