"""`.bin/.idx` + a frozen model -> sums of log-probability and entropy of every chunk, from all data-parallel ranks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ptrl.config import PretrainConfig
from megatron_ptrl.data.indexed import open_indexed
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.data.windows import Windows
from megatron_ptrl.training.scorer import Scorer

FIGURES = ("logprob", "entropy")


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
    dp = parallel_state.get_data_parallel_world_size()
    for begin in range(0, len(missing), dp):
        yield _together(
            missing[begin : begin + dp], lambda number, count: _sums(scorer, number, count), scorer, settings
        )


def _together(
    at_once: list[int], sums: Callable[[int, int], dict[str, Any] | None], scorer: Scorer, settings: PretrainConfig
) -> list[dict[str, Any]]:
    rank, shared = parallel_state.get_data_parallel_rank(), settings.parallel.ep > 1
    mine: dict[str, Any] | None = None
    if rank < len(at_once) or shared:
        # Experts are shared between data-parallel ranks, so those run as often as the one with the most rows.
        number = at_once[rank] if rank < len(at_once) else at_once[0]
        counted = at_once if shared else [number]
        mine = sums(number, max(scorer.num_microbatches(scorer.pack(each)) for each in counted))
    every: list[dict[str, Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    found = {line["chunk"]: line for line in every if line is not None}
    return [found[number] for number in at_once]


def _sums(scorer: Scorer, number: int, count: int) -> dict[str, Any] | None:
    """None on ranks without the last pipeline stage."""
    values = scorer.score(scorer.pack(number), count)
    if values is None:
        return None
    return {
        "chunk": number,
        "tokens": values.shape[1],
        **dict(zip(FIGURES, values.sum(1, dtype=float).tolist(), strict=True)),
    }
