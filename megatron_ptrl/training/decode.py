"""Next tokens from a model with a KV cache, for many rows at once, under tensor and pipeline parallelism.

    prompt --admit--> a slot --step--> a token and its log-probability --step--> ... --leave--> the slot is free

Rows come and go at any time. All but the last token of a prompt is read when a row is admitted, once for all rows that
share it; the last one goes into the first step. What a row draws follows from its own logits, which do not hang on its
neighbours, and from its own stream of uniform numbers.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ptrl.errors import InputError
from megatron_ptrl.training import host
from megatron_ptrl.training.draw import draw
from megatron_ptrl.training.kv_cache import KVCache
from megatron_ptrl.training.mcore import unwrap

# Tokens of one pass over prompts, padding included, unless a single prompt is longer.
_PROMPT_TOKENS = 8192
_UNIFORMS = 256


@dataclass(eq=False)
class Row:
    """A prompt of one token or more, and what is written behind it."""

    prompt: list[int]
    temperature: float
    top_p: float
    seed: int
    written: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stream = numpy.random.Generator(numpy.random.Philox(key=self.seed % 2**64))
        self._uniforms: list[float] = []

    def next_uniform(self) -> float:
        """The number in [0, 1) that the next token is drawn with."""
        place = len(self.written) % _UNIFORMS
        if place == 0:
            self._uniforms = self._stream.random(_UNIFORMS).tolist()
        return self._uniforms[place]


class Decoder:
    """Up to `slots` rows of up to `capacity` tokens. Every rank of a model-parallel group makes the same calls.

    model: this rank's pipeline stage, under `generating.generating`

    Cost of a step beside the forward pass: an all-gather of b x v logits over the tensor-parallel ranks; with pipeline
    stages a send of b x h between each two and a broadcast of 16 bytes a row. One stage works at a time.
    """

    def __init__(self, model: torch.nn.Module, slots: int, capacity: int) -> None:
        self._model, self._gpt = model, unwrap(model)
        self._device = next(self._gpt.parameters()).device
        self._cache = KVCache(slots, capacity)
        self._rows: list[Row | None] = []  # by slot
        self._held: list[list[int]] = []  # the prompt that was read into each slot, also where its row has left
        self._slots = slots

    @property
    def rows(self) -> list[Row]:
        """Those that are under way."""
        return [row for row in self._rows if row is not None]

    @property
    def free(self) -> int:
        """How many rows can be admitted."""
        return self._slots - len(self.rows)

    @torch.no_grad()
    def admit(self, rows: Sequence[Row]) -> None:
        """Let rows take part from the next step on. Those of one prompt should follow each other."""
        unread: list[int] = []
        copies: list[tuple[int, int, int]] = []
        for row in rows:
            holders = [slot for slot, held in enumerate(self._held) if held == row.prompt]
            slot = self._free_slot(holders)
            if not holders:
                unread.append(slot)
            elif slot not in holders:
                copy = (holders[0], slot, len(row.prompt) - 1)
                if holders[0] in unread:
                    copies.append(copy)
                else:
                    self._cache.copy(*copy)
            self._rows[slot], self._held[slot] = row, row.prompt
        self._read_prompts(unread)
        for copy in copies:
            self._cache.copy(*copy)

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Write one token behind each row. Returns them.

        Raises InputError for logits that are not finite.
        """
        self._close_gaps()
        rows = self.rows
        self._cache.expect_tokens([len(row.prompt) + len(row.written) - 1 for row in rows], self._device)
        logits = self._forward([(row.written or row.prompt)[-1:] for row in rows])
        drawn = torch.empty(2, len(rows), dtype=torch.float64, device=self._device)
        if logits is not None:
            asked = [(row.temperature, row.top_p, row.next_uniform()) for row in rows]
            settings = torch.tensor(asked, dtype=torch.float64, device=self._device)
            temperature, top_p, uniform = settings.unbind(1)
            vocab_size = self._gpt.num_tokens_in_vocabulary
            token, logprob = draw(logits[:, -1], temperature, top_p, uniform, vocab_size)
            drawn[0], drawn[1] = token, logprob
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(drawn, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        for row, token_id, value in zip(rows, *drawn.tolist(), strict=True):
            if not value <= 0:
                raise InputError(
                    f"the model gives token {len(row.written)} of a response the log-probability {value}; expected a "
                    "finite one: its weights are broken, or too large for train.precision"
                )
            row.written.append(int(token_id))
            row.logprobs.append(value)
        return rows

    def leave(self, row: Row) -> None:
        """Take a row out."""
        self._rows[self._rows.index(row)] = None

    def _free_slot(self, preferred: Sequence[int]) -> int:
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        if not free:
            assert len(self._rows) < self._slots, "more rows than slots"
            self._rows.append(None)
            self._held.append([])
            return len(self._rows) - 1
        return next((slot for slot in free if slot in preferred), free[0])

    def _close_gaps(self) -> None:
        """Move rows from the end into slots that are free, so that a step takes the first slots as they are."""
        count = len(self.rows)
        for slot in [slot for slot, row in enumerate(self._rows[:count]) if row is None]:
            last = max(i for i, row in enumerate(self._rows) if row is not None)
            moved = self._rows[last]
            assert moved is not None
            self._cache.copy(last, slot, len(moved.prompt) + len(moved.written) - 1)
            self._rows[slot], self._rows[last] = moved, None
            self._held[slot] = self._held[last]

    def _read_prompts(self, slots: list[int]) -> None:
        """All but the last token of the prompts of these slots; those of about one length in one pass."""
        waiting = sorted((slot for slot in slots if len(self._held[slot]) > 1), key=lambda slot: len(self._held[slot]))
        while waiting:
            shortest, count = len(self._held[waiting[0]]), 1
            longest = shortest + max(shortest // 8, 8)
            while count < len(waiting):
                length = len(self._held[waiting[count]])
                if length > longest or (count + 1) * length > _PROMPT_TOKENS:
                    break
                count += 1
            batch, waiting = waiting[:count], waiting[count:]
            prompts = [self._held[slot][:-1] for slot in batch]
            length = len(prompts[-1])
            self._cache.expect_prompts(torch.tensor(batch, device=self._device), length)
            self._forward([prompt + [0] * (length - len(prompt)) for prompt in prompts])

    def _forward(self, tokens: list[list[int]]) -> Tensor | None:
        """tokens (b, s) -> logits (b, 1, v) behind the last of them; None before the last stage."""
        gpt, config = self._gpt, self._gpt.config
        group = parallel_state.get_pipeline_model_parallel_group()
        if not gpt.pre_process:
            shape = (len(tokens[0]), len(tokens), config.hidden_size)
            hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=self._device)
            dist.recv(hidden, src=parallel_state.get_pipeline_model_parallel_prev_rank(), group=group)
            gpt.set_input_tensor(hidden)
        ids = torch.tensor(tokens, device=self._device)
        # Rotary positions come from the cache; no mask, for the cache knows what each row may see.
        with host.undirected() if not config.num_moe_experts else contextlib.nullcontext():
            output = self._model(ids, None, None, inference_context=self._cache, runtime_gather_output=True)
        if gpt.post_process:
            return output
        dist.send(output.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank(), group=group)
        return None
