"""A finished run as the generator: no server, one process, its model sampled with a KV cache.

    requests, at any time  -->  waiting  --the oldest, and those nearest to it in length-->  one batch  -->  replies

The rows of a batch go through the model at the same position. The shortest prompt is read in one pass; from there each
step is a token a row, the next one of a longer prompt or the one that was drawn. A row leaves the batch when it is
done. What a row draws follows from its request's seed and its own logits, whatever batch it is in.

The model runs on the event loop's thread, between whose other tasks it gives way after each step: the layer that stands
in for CUDA on a CPU (training/host.py) holds for one thread only.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking.generators import GenerationError, Reply, Request

DEFAULT_BATCH = 16
OPEN, CLOSE = "<think>", "</think>"


def join_messages(messages: list[dict[str, str]]) -> str:
    """The text that a model without a chat template goes on from: the messages' contents, a blank line between them."""
    return "\n\n".join(message["content"] for message in messages)


@dataclass
class _Row:
    """A request on its way through a batch."""

    request: Request
    prompt: list[int]
    reply: "asyncio.Future[Reply]"
    written: list[int] = field(default_factory=list)
    draws: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.draws.manual_seed(self.request.seed)

    def at(self, position: int) -> int:
        """The token of the prompt and what is written."""
        behind = position - len(self.prompt)
        return self.prompt[position] if behind < 0 else self.written[behind]

    def uniform(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self.draws))


class EmbeddedGenerator:
    """Answers requests with one frozen model; made by `open_embedded`.

    model: a whole GPT in eval mode on this rank   window: tokens of prompt and reply at most
    eod_first: whether the model knows documents as standing behind an end-of-document token
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: Tokenizer, *, window: int, eod_first: bool, batch: int, name: str
    ) -> None:
        self.name = name
        self.model, self.tokenizer = model, tokenizer
        self._window, self._eod_first, self._batch = window, eod_first, batch
        self._waiting: list[_Row] = []
        self._worker: asyncio.Task[None] | None = None

    async def generate(self, request: Request) -> Reply:
        """The model's text up to a stop string, the end of the document, `max_tokens` or the window.

        It is thinking all of it where the last message ends in <think>, as for a model that was trained on documents
        with their thinking. A reply that stopped at </think> ends in it.

        Raises GenerationError for a prompt that fills the window.
        """
        prompt = self.tokenizer.encode(join_messages(request.messages))
        if self._eod_first or not prompt:
            prompt.insert(0, self.tokenizer.eod)
        if len(prompt) >= self._window:
            detail = f"the prompt has {len(prompt)} tokens, the model's window {self._window}"
            raise GenerationError("bad_request", detail)
        row = _Row(request, prompt, asyncio.get_running_loop().create_future())
        self._waiting.append(row)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await row.reply

    async def close(self) -> None:
        """Stop; requests that are under way are cancelled."""
        from megatron_ptrl.training import mcore

        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        mcore.shutdown()

    async def _work(self) -> None:
        rows: list[_Row] = []
        try:
            while self._waiting:
                # Whoever asks in the same turn of the loop comes into the same batch.
                await asyncio.sleep(0)
                rows = self._next_batch()
                await self._answer(rows)
        except asyncio.CancelledError:
            for row in [*rows, *self._waiting]:
                row.reply.cancel()
            raise
        except Exception as error:  # nobody awaits this task; those who wait for its replies must hear of it
            for row in [*rows, *self._waiting]:
                if not row.reply.done():
                    row.reply.set_exception(error)
            self._waiting = []

    def _next_batch(self) -> list[_Row]:
        """The oldest request and those nearest to it in length; the others keep their order."""
        oldest = len(self._waiting[0].prompt)
        nearest = sorted(self._waiting, key=lambda row: abs(len(row.prompt) - oldest))[: self._batch]
        self._waiting = [row for row in self._waiting if all(row is not other for other in nearest)]
        return nearest

    async def _answer(self, rows: list[_Row]) -> None:
        from megatron_ptrl.training.decode import CachedRows, draw

        ends = [min(len(row.prompt) + row.request.max_tokens, self._window) for row in rows]
        cached = CachedRows(self.model, len(rows), max(ends))
        begin, end = 0, min(len(row.prompt) for row in rows)
        while rows:
            logits = cached.extend(torch.tensor([[row.at(i) for i in range(begin, end)] for row in rows]))
            drawing = [i for i, row in enumerate(rows) if len(row.prompt) <= end]
            asked = [(rows[i].request.temperature, rows[i].request.top_p, rows[i].uniform()) for i in drawing]
            drawn = draw(logits[drawing], *torch.tensor(asked, dtype=torch.float64).T).tolist() if drawing else []
            for i, token in zip(drawing, drawn, strict=True):
                self._write(rows[i], token)
            going_on = [i for i, row in enumerate(rows) if not row.reply.done()]
            if going_on and len(going_on) < len(rows):
                cached.keep(going_on)
            rows = [rows[i] for i in going_on]
            begin, end = end, end + 1
            await asyncio.sleep(0)

    def _write(self, row: _Row, token: int) -> None:
        """Put a token behind the others, or end the row with its reply."""
        if row.reply.done():
            return
        if token == self.tokenizer.eod:
            self._end(row, "stop")
            return
        row.written.append(token)
        # A token stands for a byte at least, so a stop string that is complete now lies within these.
        longest = max((len(stop.encode()) for stop in row.request.stop), default=0)
        tail = self.tokenizer.decode(row.written[-longest - 8 :])
        if any(stop in tail for stop in row.request.stop):
            self._end(row, "stop")
        elif len(row.written) == row.request.max_tokens or len(row.prompt) + len(row.written) == self._window:
            self._end(row, "length")

    def _end(self, row: _Row, reason: str) -> None:
        text = self.tokenizer.decode(row.written)
        found = [place for stop in row.request.stop if (place := text.find(stop)) >= 0]
        cut = min(found, default=len(text))
        # Which stop it was is told as servers tell it, so that thinking without its end can be known.
        closed = CLOSE if CLOSE in row.request.stop and text.startswith(CLOSE, cut) else ""
        opened = row.request.messages[-1]["content"].rstrip().endswith(OPEN)
        text = text[:cut]
        reply = Reply(
            text + closed, reason, len(row.prompt), len(row.written), self.name, thinking=text if opened else None
        )
        row.reply.set_result(reply)


def open_embedded(
    checkpoint: str, *, tokenizer: str | None = None, window: int | None = None, batch: int = DEFAULT_BATCH
) -> EmbeddedGenerator:
    """The generator of a run directory of `ptrl pretrain`, or of one of its checkpoints, in this process alone.

    tokenizer: null for the one of the run's data   window: null for the sequence length of its training
    Raises InputError for a checkpoint that is not whole, or of another tokenizer.
    """
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron_ptrl.config import DataConfig, PretrainConfig, TrainConfig
    from megatron_ptrl.training import layers, mcore
    from megatron_ptrl.training.checkpoint import newest_whole, read_manifest
    from megatron_ptrl.training.frozen import check_vocabulary, load_frozen_model, model_of
    from megatron_ptrl.training.resume import find_source

    path, _ = find_source(checkpoint, "checkpoint", newest_whole)
    manifest = read_manifest(path)
    trained: dict[str, Any] = manifest["settings"]
    known = Tokenizer(tokenizer) if tokenizer else _tokenizer_of(path)
    check_vocabulary(path, manifest, known, "checkpoint")
    window = window or trained["data.seq_length"]
    config = PretrainConfig(
        model=model_of(manifest),
        data=DataConfig(seq_length=window),
        train=TrainConfig(precision=trained["train.precision"]),
    )
    layers.check_supported(config)
    mcore.initialize(config)
    (model,) = load_frozen_model(config, path, known.vocab_size)
    eod_first = not trained["data.isolate_documents"]
    return EmbeddedGenerator(model, known, window=window, eod_first=eod_first, batch=batch, name=str(path))


def _tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer that the run of a checkpoint used, by the run's config.yaml."""
    from megatron_ptrl.cli import parse
    from megatron_ptrl.config import PretrainConfig
    from megatron_ptrl.data.indexed import resolve_tokenizer

    settings = path.parents[1] / "config.yaml"
    if not settings.is_file():
        raise InputError(f"{settings}: no such file, so the tokenizer of {path} is unknown; name it by tokenizer")
    return resolve_tokenizer(parse(PretrainConfig, ["--config", str(settings)], prog="ptrl think").data)
