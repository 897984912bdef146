"""A frozen model with Megatron-Core's KV cache: rows of tokens grow together, and each step costs one token a row.

    rows of one length  --extend-->  logits behind their last token  --keep-->  the rows that go on

All rows stand at the same position, so that no row is padded and no attention mask is needed: the local layers and
Transformer Engine's take the same calls, and a row's numbers do not hang on its neighbours.
"""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_ptrl.training.mcore import unwrap


class CachedRows:
    """Up to `capacity` tokens in each of `rows` rows, on one rank that holds the whole model.

    model: a single pipeline stage in eval mode, built without isolated documents and without sequence parallelism

    Cost: keys and values of 2 x layers x capacity x rows x groups x head size, allocated by the first call.
    """

    def __init__(self, model: torch.nn.Module, rows: int, capacity: int) -> None:
        self._model = model
        self._context = StaticInferenceContext(rows, capacity)
        self._vocab_size = unwrap(model).num_tokens_in_vocabulary

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """tokens (b, s) int64 behind those so far -> logits (b, v) fp32 on the CPU behind the last of them.

        The first call takes any s, the later ones one token a row. The columns that pad the vocabulary are left out.
        """
        begin, count = self._context.sequence_len_offset, tokens.shape[1]
        assert begin == 0 or count == 1, "Transformer Engine masks nothing behind the first call"
        device = next(self._model.parameters()).device
        positions = torch.arange(begin, begin + count, device=device).expand(tokens.shape[0], -1)
        logits = self._model(
            tokens.to(device), positions, None, inference_context=self._context, runtime_gather_output=True
        )
        self._context.increment_sequence_len_offset(count)
        self._context.enable_decode_mode()
        return logits[:, -1, : self._vocab_size].float().cpu()

    def keep(self, rows: list[int]) -> None:
        """Go on with these of the rows alone, in this order."""
        cache = self._context.key_value_memory_dict
        for layer, (keys, values) in cache.items():
            index = torch.tensor(rows, device=keys.device)
            cache[layer] = (keys[:, index], values[:, index])


def draw(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """The next token of each row, (b,) int64: from the most probable ones whose mass reaches top_p, at a temperature.

    logits: (b, v)   temperature, top_p, uniform: (b,) float64, uniform in [0, 1)

    Temperature 0 is the argmax. The token is where `uniform` falls among the probabilities, the largest first, so that
    a row's draw follows from its own numbers, and rounding moves it only at an edge.
    """
    # fp64: a running sum over a whole vocabulary in fp32 is off by more than its rare tokens.
    scaled = logits.double() / temperature.where(temperature > 0, 1.0)[:, None]
    probability, token = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    until = probability.cumsum(-1)
    allowed = probability.where(until - probability < top_p[:, None], 0.0)
    until = allowed.cumsum(-1)
    place = torch.searchsorted(until, (uniform * until[:, -1])[:, None], right=True)
    last = (allowed > 0).sum(-1, keepdim=True) - 1
    drawn = token.gather(-1, place.minimum(last))[:, 0]
    return drawn.where(temperature > 0, logits.argmax(-1))
