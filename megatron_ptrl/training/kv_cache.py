"""Keys and values of what is being generated, and the attention that reads them: rows of any lengths side by side.

    slot 0   p p p p g g . .      p: read from the prompt, g: generated, .: free
    slot 1   p p g . . . . .
    slot 2   p p p p p p g .

Megatron-Core's static batching has all rows stand at one position, and turns every key anew in each step. Here each
row has a position of its own and keys are kept turned, so that a row can end and another one take its slot.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import _rotate_half
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ptrl import decode_ops

# Slots grow to this many tokens at least.
_BLOCK = 64


class KVCache(StaticInferenceContext):
    """What the layers of one pipeline stage remember of up to `slots` rows of up to `capacity` tokens.

    Cost: keys and values of 2 x layers x slots x groups x head size for each token of the longest row so far, and at
    most as much again that is not used yet.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity)
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        self._room = 0  # tokens of a slot
        self._prompts: Tensor | None = None
        self._rows, self._at = torch.empty(0), torch.empty(0)
        self._until = 0
        self._ragged = False
        # Alike for all layers of a forward pass.
        self._turns: tuple[Tensor, Tensor] | None = None
        self._mask: Tensor | None = None

    def expect_prompts(self, slots: Tensor, length: int) -> None:
        """The next forward pass reads the beginnings of these slots, (b,): tokens (b, length), padded on the right.

        What padding leaves behind is never read: the row's own tokens overwrite it, one by one.
        """
        self._grow(length)
        self._prompts, self._until = slots, length
        self._turns = self._mask = None

    def expect_tokens(self, positions: list[int], device: torch.device) -> None:
        """The next forward pass reads one token for each of the first len(positions) slots, at these positions."""
        self._until = max(positions) + 1
        self._grow(self._until)
        self._prompts, self._ragged = None, min(positions) + 1 < self._until
        self._rows, self._at = torch.tensor([range(len(positions)), positions], device=device)
        self._turns = self._mask = None

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one slot into another."""
        for pair in self._memory.values():
            for kept in pair:
                kept[target, :, :length] = kept[source, :, :length]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: Tensor | None,
        *,
        interleaved: bool,
        scale: float | None,
    ) -> Tensor:
        """Core attention of a layer to what the slots hold, which `key` and `value` join.

        query: (s, b, heads, d)   key, value: (s, b, groups, d)   angles: (capacity, 1, 1, d), of the rotary embedding
        returns: (s, b, heads * d)
        """
        s, b, heads, d = query.shape
        groups = key.shape[2]
        turn = None if angles is None else self._turn(angles, query.dtype)
        if layer not in self._memory:
            # Zeros, because what stands in a masked place is multiplied by 0, and must not be NaN.
            shape = (self.max_batch_size, groups, self._room, d)
            self._memory[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self._memory[layer]
        if self._prompts is None and decode_ops.attends(query):
            by = None if turn is None else (turn[0].view(b, d), turn[1].view(b, d))
            return decode_ops.decode_attention(
                query[0], key[0], value[0], by, self._at, keys, values, interleaved=interleaved, scale=scale
            )[None]
        if turn is not None:
            cos, sin = turn
            query, key = (x * cos + _rotate_half(x, interleaved) * sin for x in (query, key))
        if self._prompts is not None:
            key, value = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)  # (b, groups, s, d)
            keys[self._prompts, :, :s], values[self._prompts, :, :s] = key, value
            query = query.permute(1, 2, 0, 3)
            context = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=heads != groups
            )
            return context.permute(2, 0, 1, 3).reshape(s, b, -1)
        keys[self._rows, :, self._at], values[self._rows, :, self._at] = key[0], value[0]
        # The heads of a group stand as queries that see the same keys, which so need no copy for each head.
        context = F.scaled_dot_product_attention(
            query.view(b, groups, heads // groups, d),
            keys[:b, :, : self._until],
            values[:b, :, : self._until],
            attn_mask=self._lengths_mask(query.dtype),
            scale=scale,
        )
        return context.reshape(1, b, -1)

    def _turn(self, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._turns is None:
            here = angles[: self._until] if self._prompts is not None else angles[self._at].permute(1, 0, 2, 3)
            self._turns = here.cos().to(dtype), here.sin().to(dtype)
        return self._turns

    def _lengths_mask(self, dtype: torch.dtype) -> Tensor | None:
        """0 where a row has a token, -inf behind its last one: (b, 1, 1, until); None where all are equally long."""
        if self._ragged and self._mask is None:
            behind = torch.arange(self._until, device=self._at.device) > self._at[:, None]
            self._mask = torch.zeros(behind.shape, dtype=dtype, device=behind.device)
            self._mask = self._mask.masked_fill_(behind, -math.inf)[:, None, None]
        return self._mask

    def _grow(self, length: int) -> None:
        if length <= self._room:
            return
        assert length <= self.max_sequence_length
        more = min(max(length, 2 * self._room, _BLOCK), self.max_sequence_length) - self._room
        for layer, (keys, values) in self._memory.items():
            self._memory[layer] = F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))
        self._room += more


class CachedSelfAttention(SelfAttention):
    """Megatron-Core's, which with a `KVCache` as the inference context attends to what that holds."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *rest: Any,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(inference_context, KVCache):
            return super().forward(
                hidden_states,
                attention_mask,
                *rest,
                inference_context=inference_context,
                rotary_pos_emb=rotary_pos_emb,
                **settings,
            )
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        skips = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        context = inference_context.attend(
            self.layer_number,
            query,
            key,
            value,
            None if skips else rotary_pos_emb,
            interleaved=self.config.rotary_interleaved,
            scale=self.config.softmax_scale,
        )
        return self.linear_proj(context)
