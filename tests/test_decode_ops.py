"""The CPU kernels of generation against fp64: products with few rows, attention to the KV cache, draws."""

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from torch import Tensor

from megatron_ptrl import decode_ops, ops

pytestmark = pytest.mark.skipif(not ops.load_kernels(), reason="the kernels were not built")


# 700: two whole stretches under one sum and a rest. 83: whole tiles of outputs and a rest. 33: a lonely row at the end.
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 1, 1), (2, 5, 15), (16, 256, 16), (33, 700, 83), (40, 64, 300)])
def test_a_product_of_few_rows_is_as_accurate_as_torchs(rows, inputs, outputs):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 1, inputs) + 0.5, torch.randn(outputs, inputs)
    before = x.clone(), weight.clone()
    found = decode_ops.few_rows_linear(x, weight)
    assert found.shape == (rows, 1, outputs)
    assert_as_accurate(found, F.linear(x, weight), F.linear(x.double(), weight.double()))
    assert torch.equal(found[-1:], decode_ops.few_rows_linear(x[-1:], weight))
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize(
    "rows, dtype, served", [(1, "float32", 0), (2, "float32", 1), (999, "float32", 0), (2, "bfloat16", 0)]
)
def test_the_product_is_served_where_it_is_faster(monkeypatch, rows, dtype, served):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x, weight = torch.zeros(1, rows, 8, dtype=getattr(torch, dtype)), torch.zeros(4, 8, dtype=getattr(torch, dtype))
    assert decode_ops.multiplies_few_rows(x, weight) == bool(served)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not decode_ops.multiplies_few_rows(x, weight)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of (b, heads, d) by its definition: pairs of numbers turned like complex ones."""
    d = x.shape[-1]
    first = range(0, d, 2) if interleaved else range(d // 2)
    out = torch.empty_like(x)
    for i in first:
        j = i + 1 if interleaved else i + d // 2
        c, s = ((angle[:, None, i], angle[:, None, j]) for angle in (cos, sin))
        out[..., i] = x[..., i] * c[0] - x[..., j] * s[0]
        out[..., j] = x[..., j] * c[1] + x[..., i] * s[1]
    return out


def attended(query, key, value, angles, positions, keys, values, interleaved, scale):
    """The same row by row, in the precision of what comes in."""
    if angles is not None:
        query, key = (turned(x, *angles, interleaved) for x in (query, key))
    b, heads, d = query.shape
    out = []
    for row, at in enumerate(positions.tolist()):
        for head in range(heads):
            group = head // (heads // keys.shape[1])
            seen = torch.cat([keys[row, group, :at], key[row, group][None]])
            weights = (seen @ query[row, head] * (scale or d**-0.5)).softmax(0)
            out.append(weights @ torch.cat([values[row, group, :at], value[row, group][None]]))
    return torch.stack(out).view(b, heads * d)


@pytest.mark.parametrize("heads, groups, d", [(2, 2, 16), (6, 2, 64), (4, 1, 80), (1, 1, 128)])
@pytest.mark.parametrize("rotary", ["none", "halves", "interleaved"])
def test_attention_to_the_cache_is_as_accurate_as_torchs(heads, groups, d, rotary):
    torch.manual_seed(d)
    b, slots, room = 5, 6, 40
    # Key and value as views of one tensor, as a layer has them.
    mixed = torch.randn(b, groups, (heads // groups + 2) * d)
    query, key, value = mixed.split((heads // groups * d, d, d), -1)
    query = 3 * query.reshape(b, heads, d)
    angle = torch.rand(b, d) * 6
    angles = None if rotary == "none" else (angle.cos(), angle.sin())
    positions = torch.tensor([0, 1, 15, 16, 39])
    scale = None if d == 16 else 0.3
    keys, values = torch.randn(2, slots, groups, room, d)
    # What is behind a row's own token is left over from another one, and must not be read.
    behind = (torch.arange(room) >= positions[:, None])[:, None, :, None]
    for kept in (keys, values):
        kept[:b].masked_fill_(behind, math.nan)
    before = keys.clone(), values.clone()
    how = {"interleaved": rotary == "interleaved", "scale": scale}
    arguments = (query, key, value, angles, positions, keys, values)
    exact_angles = None if angles is None else tuple(x.double() for x in angles)
    exact_arguments = (*(x.double() for x in arguments[:3]), exact_angles, positions, keys.double(), values.double())
    eager, exact = attended(*arguments, **how), attended(*exact_arguments, **how)
    assert_as_accurate(decode_ops.decode_attention(*arguments, **how), eager, exact)

    # The cache has the new key, turned, and the new value where they belong, and nothing else is touched.
    expected = key if angles is None else turned(key, *angles, how["interleaved"])
    rows = torch.arange(b)
    torch.testing.assert_close(keys[rows, :, positions], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(values[rows, :, positions], value)
    for kept, was in zip((keys, values), before, strict=True):
        kept[rows, :, positions] = was[rows, :, positions]
        torch.testing.assert_close(kept, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_key_that_is_not_finite_shows_in_the_context(wrong):
    query, (keys, values) = torch.ones(1, 1, 16), torch.ones(2, 1, 1, 8, 16)
    keys[0, 0, 2, 3] = wrong
    at = torch.tensor([4])
    out = decode_ops.decode_attention(query, query, query, None, at, keys, values, interleaved=False, scale=None)
    assert out.isnan().all()


# 1, 256, 257: less than a vector, a block under one sum, one more. 200 of 5000: rows that lie apart.
@pytest.mark.parametrize("tokens, columns", [(1, 1), (256, 256), (257, 300), (5000, 5000), (200, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_draw_is_where_fp64_puts_it(tokens, columns, dtype):
    torch.manual_seed(columns)
    rows = 64
    logits = (torch.randn(rows, columns) * 3).to(dtype)[:, :tokens]
    logits[3, : tokens // 2] = -torch.inf
    temperature, uniform = torch.rand(rows).double() + 0.5, torch.rand(rows).double()
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    lowest = torch.full((rows,), -torch.inf)
    lowest[5:9] = logits[5:9].float().quantile(0.5, dim=-1)
    token, logprob = decode_ops.draw(logits, temperature, uniform, lowest)
    z = logits.double().masked_fill(logits < lowest[:, None], -torch.inf) / temperature[:, None]
    exact = z.log_softmax(-1)
    torch.testing.assert_close(logprob, exact.gather(-1, token[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    until = z.softmax(-1).cumsum(-1)
    after = until.gather(-1, token[:, None])[:, 0]
    prior = after - z.softmax(-1).gather(-1, token[:, None])[:, 0]
    assert (prior - 1e-6 <= uniform).all() and (uniform <= after + 1e-6).all()
    assert logprob.isfinite().all()


def test_what_does_not_fit_is_refused_by_name():
    x, eight = torch.zeros(2, 8), torch.zeros(8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"weight has shape \[3, 7\], expected"):
        decode_ops.few_rows_linear(x, torch.zeros(3, 7))
    with pytest.raises(RuntimeError, match=r"uniform has shape \[8\], expected"):
        decode_ops.draw(x, eight[:2], eight, eight[:2].float())
    query, cache = torch.zeros(1, 2, 16), torch.zeros(1, 2, 4, 16)
    with pytest.raises(RuntimeError, match="position is 4, expected 0 to 3"):
        decode_ops.decode_attention(
            query, query, query, None, torch.tensor([4]), cache, cache.clone(), interleaved=False, scale=None
        )
