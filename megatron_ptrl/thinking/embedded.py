"""A finished run as the generator: no server, one process, its model sampled with a KV cache.

    requests, at any time  -->  waiting  --the oldest, as rows become free-->  training/decode.py's rows  -->  replies

What a reply draws follows from its request's seed and its own logits, whatever it shares a batch with.

The model runs on the event loop's thread, between whose other tasks it gives way after each step: the layer that stands
in for CUDA on a CPU (training/host.py) holds for one thread only.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking.generators import GenerationError, Reply, Request

if TYPE_CHECKING:
    from megatron_ptrl.training.decode import Row

DEFAULT_BATCH = 16
OPEN, CLOSE = "<think>", "</think>"


def join_messages(messages: list[dict[str, str]]) -> str:
    """The text that a model without a chat template goes on from: the messages' contents, a blank line between them."""
    return "\n\n".join(message["content"] for message in messages)


@dataclass(eq=False)
class _Asked:
    """A request on its way."""

    request: Request
    prompt: list[int]
    reply: "asyncio.Future[Reply]"


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
        self._waiting: list[_Asked] = []
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
        asked = _Asked(request, prompt, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await asked.reply

    async def close(self) -> None:
        """Stop; requests that are under way are cancelled."""
        from megatron_ptrl.training import mcore

        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        mcore.shutdown()

    async def _work(self) -> None:
        under_way: dict[Any, _Asked] = {}
        try:
            await self._answer(under_way)
        except asyncio.CancelledError:
            for asked in [*under_way.values(), *self._waiting]:
                asked.reply.cancel()
            raise
        except Exception as error:  # nobody awaits this task; those who wait for its replies must hear of it
            for asked in [*under_way.values(), *self._waiting]:
                if not asked.reply.done():
                    asked.reply.set_exception(error)
            self._waiting = []

    async def _answer(self, under_way: "dict[Row, _Asked]") -> None:
        """Answer what is waiting, until nothing is; `under_way` is kept for whoever must tell of a failure."""
        from megatron_ptrl.training.decode import Decoder, Row
        from megatron_ptrl.training.generating import generating

        decoder = Decoder(self.model, self._batch, self._window)
        with generating(self.model):
            while self._waiting or under_way:
                # Whoever asks in the same turn of the loop comes into the same batch.
                await asyncio.sleep(0)
                coming = {}
                for asked in self._waiting[: decoder.free]:
                    settings = asked.request
                    coming[Row(asked.prompt, settings.temperature, settings.top_p, settings.seed)] = asked
                self._waiting = self._waiting[len(coming) :]
                under_way.update(coming)
                decoder.admit(sorted(coming, key=lambda row: row.prompt))
                for row in decoder.step():
                    self._look(under_way[row], row.written)
                    if under_way[row].reply.done():
                        decoder.leave(row)
                        del under_way[row]

    def _look(self, asked: _Asked, written: list[int]) -> None:
        """End a request with its reply, if the token that was just written behind the others says so."""
        if asked.reply.done():
            return
        if written[-1] == self.tokenizer.eod:
            self._end(asked, written[:-1], "stop")
            return
        # A token stands for a byte at least, so a stop string that is complete now lies within these.
        longest = max((len(stop.encode()) for stop in asked.request.stop), default=0)
        tail = self.tokenizer.decode(written[-longest - 8 :])
        if any(stop in tail for stop in asked.request.stop):
            self._end(asked, written, "stop")
        elif len(written) == asked.request.max_tokens or len(asked.prompt) + len(written) == self._window:
            self._end(asked, written, "length")

    def _end(self, asked: _Asked, written: list[int], reason: str) -> None:
        request, text = asked.request, self.tokenizer.decode(written)
        found = [place for stop in request.stop if (place := text.find(stop)) >= 0]
        cut = min(found, default=len(text))
        # Which stop it was is told as servers tell it, so that thinking without its end can be known.
        closed = CLOSE if CLOSE in request.stop and text.startswith(CLOSE, cut) else ""
        opened = request.messages[-1]["content"].rstrip().endswith(OPEN)
        text = text[:cut]
        thinking = text if opened else None
        reply = Reply(text + closed, reason, len(asked.prompt), len(written), self.name, thinking=thinking)
        asked.reply.set_result(reply)


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
