"""Logits -> tokens that are drawn from them, and the log-probabilities they were drawn with."""

import torch
from torch import Tensor

from megatron_ptrl import decode_ops

# A nucleus is looked for among this many tokens before the whole vocabulary is sorted.
_NUCLEUS = 256


def draw(
    logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The next token of each row, (b,) int64, and its log-probability, (b,) float64, in nats.

    logits: (b, v)   temperature, top_p, uniform: (b,) float64, uniform in [0, 1)
    vocab_size: real tokens, where the columns behind them pad the vocabulary to v

    p = softmax(logits / temperature) over the most probable tokens whose mass reaches top_p, those included that are as
    probable as the last of them; the log-probability is that of p. Temperature 0 is the argmax, with probability 1.
    The token is where `uniform` falls among the running sums of p, so that a row's draw follows from its own numbers,
    and rounding moves it only at an edge.

    Padding is neither drawn nor in the softmax: `ptrl rl` has none of it in the trainer's log-probabilities either, and
    servers have no such columns.

    Cost: a pass of b v exponentials and sums, on CPUs by a kernel; with a top_p below 1, another one and the largest
    256 logits, or a sort where a nucleus is larger.
    """
    logits = logits[:, :vocab_size]
    greedy = temperature == 0
    lowest = uniform.new_full(uniform.shape, -torch.inf, dtype=torch.float32)
    served = decode_ops.draws(logits)
    if served and bool((top_p == 1).all()):
        return decode_ops.draw(logits, temperature, uniform, lowest)
    scaled = logits.float() / temperature.where(~greedy, 1.0).float()[:, None]
    top = scaled.amax(-1, keepdim=True)
    weight = (scaled - top).exp_()
    if bool((top_p < 1).any()):
        lowest = _lowest(logits.float(), weight, top_p)
    if served:
        return decode_ops.draw(logits, temperature, uniform, lowest)
    weight = weight.where(logits >= lowest[:, None], 0.0)
    # fp64: a running sum over a whole vocabulary in fp32 is off by more than its rare tokens.
    until = weight.cumsum(-1, dtype=torch.float64)
    total = until[:, -1:]
    token = torch.searchsorted(until, uniform[:, None] * total, right=True).clamp(max=logits.shape[-1] - 1)
    logprob = (scaled - top).gather(-1, token).double() - total.log()
    token = token[:, 0].where(~greedy, logits.argmax(-1))
    # Not 0 at once for the argmax, so that logits which are not finite show.
    return token, logprob[:, 0].where(~greedy, logprob[:, 0] * 0)


def _lowest(logits: Tensor, weight: Tensor, top_p: Tensor) -> Tensor:
    """(b,) the smallest logit that each row's nucleus needs; -inf for a top_p of 1."""
    mass = weight.sum(-1, dtype=torch.float64) * top_p
    count = min(_NUCLEUS, weight.shape[-1])
    while True:
        largest, places = logits.topk(count, dim=-1)
        until = weight.gather(-1, places).cumsum(-1, dtype=torch.float64)
        reached = (until[:, -1] >= mass) | (top_p >= 1)
        if count == weight.shape[-1] or bool(reached.all()):
            break
        count = weight.shape[-1]
    last = torch.searchsorted(until, mass[:, None]).clamp(max=count - 1)
    return largest.gather(-1, last)[:, 0].where(top_p < 1, -torch.inf)
