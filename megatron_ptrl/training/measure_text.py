"""`.bin/.idx` + a frozen model -> sums of log-probability and entropy of every chunk, from all data-parallel ranks."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ptrl.config import PretrainConfig
from megatron_ptrl.data.indexed import open_indexed
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.data.windows import Windows
from megatron_ptrl.training.scorer import Scorer

FIGURES = ("logprob", "entropy")
T = TypeVar("T")


def chunks_of(prefix: str, *, window: int, overlap: int, chunk: int) -> Windows:
    """The chunks that the data of `prefix` are measured in. Raises InputError as `open_indexed` does."""
    indexed, _ = open_indexed(prefix)
    return Windows(indexed.sequence_lengths, window=window, overlap=overlap, chunk=chunk)


def measure(
    settings: PretrainConfig,
    chunks: list[torch.nn.Module],
    tokenizer: Tokenizer,
    prefix: str,
    windows: Windows,
    missing: list[int],
) -> Iterator[list[dict[str, Any]]]:
    """For each few of the `missing` chunks {"chunk", "tokens", "logprob", "entropy"}, sums in nats; alike on all ranks.

    Every token of a document is measured, the first after the end-of-document token, as `ptrl score` does.
    Collective over all ranks. Raises InputError for a token that the model does not know, and for a log-probability
    that is not finite.
    """
    indexed, _ = open_indexed(prefix)
    scorer = Scorer(settings, chunks, indexed, windows, FIGURES)
    scorer.score_first_tokens(tokenizer.eod, tokenizer.vocab_size)

    def sums(number: int, values: numpy.ndarray) -> dict[str, Any]:
        totals = values.sum(1, dtype=float).tolist()
        return {"chunk": number, "tokens": values.shape[1], **dict(zip(FIGURES, totals, strict=True))}

    yield from from_all_ranks(scorer, settings, missing, sums)


def from_all_ranks(
    scorer: Scorer, settings: PretrainConfig, numbers: list[int], reduce: Callable[[int, numpy.ndarray], T]
) -> Iterator[list[T]]:
    """What `reduce` makes of each chunk's number and values, some chunks at a time, in their order, on all ranks.

    The data-parallel ranks score them side by side. Collective over all ranks.
    """
    rank, dp = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    shared = settings.parallel.ep > 1
    for begin in range(0, len(numbers), dp):
        at_once = numbers[begin : begin + dp]
        mine: tuple[int, T] | None = None
        if rank < len(at_once) or shared:
            # Experts are shared between data-parallel ranks, so those run as often as the one with the most rows.
            number = at_once[rank] if rank < len(at_once) else at_once[0]
            packed = {each: scorer.pack(each) for each in (at_once if shared else [number])}
            values = scorer.score(packed[number], max(map(scorer.num_microbatches, packed.values())))
            mine = None if values is None else (number, reduce(number, values))
        every: list[tuple[int, T] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        found = dict(pair for pair in every if pair is not None)
        yield [found[number] for number in at_once]
