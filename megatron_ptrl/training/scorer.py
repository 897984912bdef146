"""Pieces of documents -> packed rows -> Megatron's schedule, forward only -> figures of every token."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ptrl.config import PretrainConfig
from megatron_ptrl.data.sidecar import first_invalid
from megatron_ptrl.data.windows import Piece, Windows, pack
from megatron_ptrl.errors import InputError
from megatron_ptrl.training.generate import next_logits
from megatron_ptrl.training.mcore import RewardShapedGPTModel, unwrap

# Rows of a microbatch: tokens, labels, positions, and the number of the piece that each of them belongs to.
_PLANES = 4
_PADDING = -1


class Documents(Protocol):
    """What is asked of an `IndexedDataset`."""

    path_prefix: str

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> numpy.ndarray: ...


@dataclass
class Packed:
    """The pieces of a chunk and where they lie in its rows."""

    pieces: list[Piece]
    places: list[tuple[int, int]]
    rows: int


class Scorer:
    """One frozen model on this rank's share of the layout, and the data it scores.

    config: data.seq_length is the width of a row, train.micro_batch the rows of a forward pass, documents are isolated
    figures: names of `TokenStats`' fields
    """

    def __init__(
        self,
        config: PretrainConfig,
        chunks: list[torch.nn.Module],
        indexed: Documents,
        windows: Windows,
        figures: Sequence[str] = ("logprob",),
    ) -> None:
        self._config, self._chunks, self._indexed, self._windows = config, chunks, indexed, windows
        self._figures = tuple(figures)
        self._of_first: numpy.ndarray | None = None

    @torch.no_grad()
    def score_first_tokens(self, eod: int, vocab_size: int) -> None:
        """Get the figures of a document's first token, those after `eod` alone: one forward pass for all.

        Collective over all ranks; comes before `score`. Raises InputError where memory cannot hold a row.
        """
        with self._in_memory(rows=1):
            logprob = next_logits(self._config, self._chunks, [eod]).log_softmax(-1)
        known = {
            "logprob": logprob,
            "entropy": -(logprob.exp() * logprob).sum().expand_as(logprob),
            "target_in_head": (logprob == logprob.max()).float(),
        }
        self._of_first = torch.stack([known[name] for name in self._figures])[:, :vocab_size].cpu().numpy()

    def pack(self, number: int) -> Packed:
        """The rows of chunk `number`."""
        pieces = list(self._windows.pieces(number))
        filled = [piece.inputs for piece in pieces if piece.inputs]
        places = iter(pack(filled, self._windows.window))
        placed = [next(places) if piece.inputs else (0, 0) for piece in pieces]
        return Packed(pieces, placed, 1 + max((row for row, _ in placed), default=-1) if filled else 0)

    def num_microbatches(self, packed: Packed) -> int:
        """Forward passes for a chunk; the interleaved schedule takes them in groups of pp."""
        group = self._config.parallel.pp if self._config.parallel.vpp else 1
        return -(-packed.rows // (self._config.train.micro_batch * group)) * group

    @torch.no_grad()
    def score(self, packed: Packed, num_microbatches: int) -> numpy.ndarray | None:
        """float32 (figures, tokens), of a chunk's tokens in their order; None on ranks without the last pipeline stage.

        num_microbatches: at least what the chunk needs; where experts are shared, all ranks must run the same number.
        Collective over the model-parallel ranks. Raises InputError for a token id that the model does not know, a
        log-probability that is not finite, or where memory cannot hold the rows of a microbatch.
        """
        with self._in_memory(rows=self._config.train.micro_batch):
            return self._score(packed, num_microbatches)

    def _score(self, packed: Packed, num_microbatches: int) -> numpy.ndarray | None:
        batches = [self._batches(packed, num_microbatches) for _ in self._chunks]
        micro_batch, width = self._config.train.micro_batch, self._windows.window
        collected: list[Tensor] = []
        if num_microbatches:
            collected = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, self._figures),
                data_iterator=batches if len(batches) > 1 else batches[0],
                model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
                num_microbatches=num_microbatches,
                seq_length=width,
                micro_batch_size=micro_batch,
                decoder_seq_length=width,
                forward_only=True,
                collect_non_loss_data=True,
            )
        last = bool(unwrap(self._chunks[-1]).post_process)
        if not last:
            return None
        if not collected:
            return self._gather(packed, numpy.empty((len(self._figures), 0, width), numpy.float32))
        return self._gather(packed, torch.cat(collected, dim=1).cpu().numpy())

    @contextlib.contextmanager
    def _in_memory(self, *, rows: int) -> Iterator[None]:
        """Tells in one line that a forward pass over `rows` rows does not fit."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _no_memory(error):
                raise
            window, micro_batch = self._windows.window, self._config.train.micro_batch
            said = str(error).partition("\n")[0]
            fewer = f", or micro_batch, which is {micro_batch}" if rows > 1 else ""
            raise InputError(
                f"window is {window}, and memory cannot hold a forward pass over {rows} x {window} tokens, whose "
                f"attention mask alone has {rows * window**2:,} bytes ({said}); lower window"
                f"{fewer}"
            ) from error

    def _batches(self, packed: Packed, num_microbatches: int) -> Iterator[Tensor]:
        """int64 [4, b, s] for each microbatch, on the device of the model."""
        micro_batch, width = self._config.train.micro_batch, self._windows.window
        by_row: list[list[int]] = [[] for _ in range(num_microbatches * micro_batch)]
        for number, (piece, (row, _)) in enumerate(zip(packed.pieces, packed.places, strict=True)):
            if piece.inputs:
                by_row[row].append(number)
        for begin in range(0, len(by_row), micro_batch):
            planes = numpy.zeros((_PLANES, micro_batch, width), dtype=numpy.int64)
            planes[3] = _PADDING
            for row, numbers in enumerate(by_row[begin : begin + micro_batch]):
                for number in numbers:
                    self._put(planes[:, row], number, packed.pieces[number], packed.places[number][1])
            batch = torch.from_numpy(planes)
            yield batch.pin_memory().cuda(non_blocking=True) if torch.cuda.is_available() else batch

    def _put(self, row: numpy.ndarray, number: int, piece: Piece, column: int) -> None:
        tokens = self._tokens(piece.document, piece.begin, piece.inputs + 1)
        place = slice(column, column + piece.inputs)
        row[0, place], row[1, place] = tokens[:-1], tokens[1:]
        row[2, place] = numpy.arange(piece.inputs)
        row[3, place] = number

    def _tokens(self, document: int, offset: int, length: int) -> numpy.ndarray:
        tokens = self._indexed.get(document, offset, length)
        vocab_size = unwrap(self._chunks[0]).num_tokens_in_vocabulary
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            wrong = offset + int(numpy.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
            raise InputError(
                f"{self._indexed.path_prefix}, document {document}, token {wrong}: its id is not one of the "
                f"{vocab_size} that the reference knows; tokenize the data again"
            )
        return tokens

    def _gather(self, packed: Packed, found: numpy.ndarray) -> numpy.ndarray:
        """(figures, rows, s) in the order of the rows -> (figures, tokens) in the order of the tokens."""
        tokens = sum(piece.end - piece.first for piece in packed.pieces)
        values = numpy.empty((len(self._figures), tokens), numpy.float32)
        at = 0
        for piece, (row, column) in zip(packed.pieces, packed.places, strict=True):
            first = piece.first
            start = at
            if first == 0:
                assert self._of_first is not None
                values[:, at] = self._of_first[:, self._tokens(piece.document, 0, 1)[0]]
                at, first = at + 1, 1
            count = piece.end - first
            # The value of token i is read where token i - 1 went in.
            begin = column + first - 1 - piece.begin
            values[:, at : at + count] = found[:, row, begin : begin + count] if count else 0
            at += count
            logprob = values[self._figures.index("logprob"), start:at]
            invalid = first_invalid(logprob)
            if invalid is not None:
                raise InputError(
                    f"{self._indexed.path_prefix}, document {piece.document}, token {piece.first + invalid}: the "
                    f"reference gives it the log-probability {logprob[invalid]}; expected a finite one, not "
                    "above 0: look at the checkpoint, or score in fp32"
                )
        return values


def _no_memory(error: BaseException) -> bool:
    """Whether NumPy, torch on a GPU or torch on a CPU could not allocate, which the last has no class of errors for."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(said in str(error) for said in ("can't allocate memory", "Storage size calculation overflowed"))


def _forward_step(figures: tuple[str, ...], batches: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, Any]:
    tokens, labels, positions, pieces = next(batches)
    # The largest first: where it does not fit, nothing else was made for it.
    barred = pieces[:, :, None] != pieces[:, None, :]
    barred |= torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu_(1)
    return model(tokens, positions, barred[:, None], labels=labels), partial(_stats, figures, unwrap(model))


def _stats(figures: tuple[str, ...], model: RewardShapedGPTModel, loss: Tensor, non_loss_data: bool) -> Tensor:
    """(figures, b, s) fp32 of the last microbatch, those of the plain softmax, whatever the loss."""
    assert model.token_stats is not None
    found = torch.stack([getattr(model.token_stats, name).t().float() for name in figures])
    model.token_stats = None
    return found
