"""The CPU kernels of generation, and whether they serve a tensor. What calls them has the same in torch beside it.

None of them communicates, and none is differentiable.
"""

import torch
from torch import Tensor

from megatron_ptrl.ops import load_kernels

# From this many rows on MKL's packed copy of the weight pays.
_FEW_ROWS = 128
_HEAD_MULTIPLE = 16


def draws(logits: Tensor) -> bool:
    """Whether `draw` takes these logits."""
    return _on_cpu(logits) and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor]:
    """`training.draw.draw` without memory of the logits' size, once the nucleus is known.

    logits: (b, v) fp32, bf16 or fp16   temperature, uniform: (b,) fp64
    lowest: (b,) fp32, the smallest logit that has a share in the softmax, -inf for all
    returns: token (b,) int64, logprob (b,) fp64, NaN where a logit is NaN or infinite

    Cost: two reads of the logits.
    """
    return torch.ops.megatron_ptrl.draw(logits, temperature.contiguous(), uniform.contiguous(), lowest.contiguous())


def multiplies_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows_linear` takes these and is faster than torch, as it is with AVX-512 alone."""
    few = 1 < x.numel() // max(x.shape[-1], 1) <= _FEW_ROWS and x.dtype == weight.dtype == torch.float32
    return few and weight.is_contiguous() and _on_cpu(x) and torch.backends.cpu.get_cpu_capability() == "AVX512"


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T: (..., k) and (n, k) fp32 -> (..., n). A row's result does not hang on the others.

    Cost: one read of the weight, as it lies, and a transposed copy of x.
    """
    out = torch.ops.megatron_ptrl.few_rows_linear(x.reshape(-1, x.shape[-1]).contiguous(), weight)
    return out.view(*x.shape[:-1], weight.shape[0])


def attends(query: Tensor) -> bool:
    """Whether `decode_attention` takes this query and what belongs to it."""
    return query.dtype == torch.float32 and query.shape[-1] % _HEAD_MULTIPLE == 0 and _on_cpu(query)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    interleaved: bool,
    scale: float | None,
) -> Tensor:
    """One new token for each row attends to what its slot holds, which its key and value join: (b, heads * d).

    query: (b, heads, d), key, value: (b, groups, d) fp32   angles: cos and sin, (b, d), to turn query and key by
    positions: (b,) int64, where the token stands   keys, values: (slots, groups, room, d) fp32, written in place
    scale: of the scores; None is d^-1/2

    Cost: one read of the keys and values up to each row's own position, for each head of a group.
    """
    cos, sin = angles or (None, None)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.megatron_ptrl.decode_attention(
        query, key, value, cos, sin, interleaved, scale, positions, keys, values
    )


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and load_kernels()
