"""The training model itself as the rollout engine: no copy of the weights, no other process.

    requests --the longest prompts first--> a batch whose rows are replaced as they end --> responses in their order

The rows that are asked for one prompt follow each other, so that it is read once. A response follows from its request
and the weights alone, whatever the batch, the layout and the other requests are, up to rounding of the logits.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.nn import Module

from megatron_ptrl.config import RunConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.engine import Generation, Request, check_request
from megatron_ptrl.training.decode import Decoder, Row
from megatron_ptrl.training.generating import generating
from megatron_ptrl.training.mcore import unwrap

# Settings of a model that its cached attention does not have, and what they are without it.
_WITHOUT_CACHE = {
    "window_size": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "mtp_num_layers": None,
}


def check_can_generate(config: RunConfig) -> None:
    """InputError where the model or its layout is one that `MegatronEngine` cannot generate with."""
    parallel = config.parallel
    for name in ("vpp", "cp", "ep"):
        value = getattr(parallel, name)
        if value not in (None, 1):
            raise InputError(
                f"parallel.{name} is {value}, and the training model generates with tensor and pipeline parallelism "
                f"only; leave parallel.{name}, or generate with servers"
            )
    for name, neutral in _WITHOUT_CACHE.items():
        value = getattr(config.model, name, neutral)
        if value != neutral:
            raise InputError(
                f"model.{name} is {value}, which the training model cannot generate with; leave it, or generate with "
                "servers"
            )


class MegatronEngine:
    """A `RolloutEngine` on the chunks that are trained.

    chunks: the one chunk of this rank, as the training loop has it   eod: the token that ends a response
    vocab_size: tokens of the tokenizer; what pads them is neither drawn nor in the softmax
    batch: rows of a forward pass, at most

    Prompt and response share data.seq_length tokens. Memory while it generates: `kv_cache.KVCache`'s for `batch` rows.
    Raises InputError for a layout or a model that it cannot generate with.
    """

    name = "megatron"

    def __init__(self, config: RunConfig, chunks: Sequence[Module], *, eod: int, vocab_size: int, batch: int) -> None:
        check_can_generate(config)
        if batch < 1:
            raise InputError(f"the rollout engine's batch is {batch}; expected >= 1")
        (self._chunk,) = chunks
        known = unwrap(self._chunk).num_tokens_in_vocabulary
        if vocab_size != known:
            raise InputError(f"the tokenizer has {vocab_size} tokens, and the model knows {known}; expected the same")
        self._window, self._eod, self._vocab_size, self._batch = config.data.seq_length, eod, vocab_size, batch
        self.weight_version = 0

    def generate(
        self,
        requests: Sequence[Request],
        *,
        temperature: float,
        top_p: float,
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """As `RolloutEngine.generate`. A response ends with `eod`, at its max_tokens or where the window is full.

        Temperature 0 takes the most probable token each time, with a log-probability of 0.
        Raises InputError for a request that cannot be answered, before any is, and for logits that are not finite.
        """
        if not temperature >= 0 or not 0 < top_p <= 1:
            raise InputError(f"temperature {temperature}, top_p {top_p}; expected temperature >= 0 and 0 < top_p <= 1")
        for number, request in enumerate(requests):
            check_request(number, request, self._window, self._vocab_size)
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), requests[i].prompt_ids))
        done: dict[int, Generation] = {}
        with generating(self._chunk):
            for number, generation in self._run(requests, order, temperature, top_p):
                done[number] = generation
                if on_done is not None:
                    on_done(number, generation)
        return [done[number] for number in range(len(requests))]

    def _run(
        self, requests: Sequence[Request], order: Iterable[int], temperature: float, top_p: float
    ) -> Iterable[tuple[int, Generation]]:
        """The number and the response of each request, as they are complete."""
        ends = [self._end(request) for request in requests]
        waiting = [Row(requests[i].prompt_ids, temperature, top_p, requests[i].seed) for i in order]
        numbers = dict(zip(waiting, order, strict=True))
        decoder = Decoder(self._chunk, min(self._batch, len(requests)), max(ends, default=1))
        while waiting or decoder.rows:
            count = min(decoder.free, len(waiting))
            decoder.admit(waiting[:count])
            waiting = waiting[count:]
            for row in decoder.step():
                stopped = row.written[-1] == self._eod
                if stopped or len(row.prompt) + len(row.written) == ends[numbers[row]]:
                    decoder.leave(row)
                    yield numbers[row], Generation(row.written, row.logprobs, "stop" if stopped else "length")

    def _end(self, request: Request) -> int:
        """Tokens of prompt and response, at most."""
        return min(len(request.prompt_ids) + request.max_tokens, self._window)

    def sync(self, version: int, export: Callable[[Path], Any]) -> None:
        """The weights that are trained are those that generate: remembers their version, writes nothing."""
        self.weight_version = version

    def close(self) -> None:
        """Nothing is held between calls."""
