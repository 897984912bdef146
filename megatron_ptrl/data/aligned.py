"""Side-cars of log-probabilities -> those of a training sample's labels, by the very indices that gave its tokens."""

from collections.abc import Iterator

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch import Tensor

from megatron_ptrl.data.parts import Part
from megatron_ptrl.data.sidecar import SideCar
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError


def open_sidecars(prefixes: list[str], parts: list[Part], tokenizer: Tokenizer) -> list[SideCar]:
    """One side-car for each part, in their order. Raises InputError for another number, data set or tokenizer."""
    if len(prefixes) != len(parts):
        raise InputError(
            f"remit.sidecar has {len(prefixes)} prefixes and data.train {len(parts)}; expected one for each, in order"
        )
    sidecars = [SideCar.open(prefix) for prefix in prefixes]
    for sidecar, part in zip(sidecars, parts, strict=True):
        sidecar.check(part, tokenizer)
    return sidecars


def label_logprobs(dataset: GPTDataset | BlendedDataset, sidecars: list[SideCar], sample: int) -> Tensor:
    """log p of each label of a sample under the reference: fp32 [s], beside `dataset[sample]["labels"]`.

    sidecars: one for each part of a blend, or the one of a dataset that is none
    Raises InputError where a side-car holds no log-probability for a token.
    """
    part = 0
    if isinstance(dataset, BlendedDataset):
        part, sample = int(dataset.dataset_index[sample]), int(dataset.dataset_sample_index[sample])
        dataset = dataset.datasets[part]
    values = [sidecars[part].read(*piece) for piece in _pieces(dataset, sample)]
    # A label is the token behind the one that foretells it.
    return torch.from_numpy(numpy.concatenate(values)[1:])


def _pieces(dataset: GPTDataset, sample: int) -> Iterator[tuple[int, int, int | None]]:
    """(document, offset, length) of the tokens of a sample, the last label included; no length is all that is left."""
    shuffled = int(dataset.shuffle_index[sample])
    (first, begin), (last, end) = (map(int, dataset.sample_index[shuffled + i]) for i in (0, 1))
    for place in range(first, last + 1):
        offset = begin if place == first else 0
        yield int(dataset.document_index[place]), offset, end + 1 - offset if place == last else None
