"""The layers that stand in for Transformer Engine's, against plain formulas in fp64."""

import math
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate
from test_layouts import TOLERANCES, TP_PP_SP
from tiny import Settings, assert_close_metrics, parsed, pretraining, run_tiny, tiny_config
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, forbidden: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v, each key/value head repeated for its queries; (s, b, heads, d) -> (s, b, heads * d)"""
    repeat = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    probabilities = scores.masked_fill(forbidden, -math.inf).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", probabilities, value).flatten(2)


def attend(
    rank: int, world_size: int, settings: Settings, inputs: tuple[Tensor, ...], mask: Tensor | None, scale: float | None
) -> Tensor:
    config = parsed(settings)
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_ptrl.training import layers, mcore

    transformer = mcore.transformer_config(config)
    module = layers.ScaledDotProductAttention(transformer, 1, AttnMaskType.causal, "self", softmax_scale=scale)
    return module(*inputs, mask)


# 7 of 7: a whole sequence. 3 of 8 and 1 of 8: new tokens behind a cache.
@pytest.mark.parametrize("s, s_total", [(7, 7), (3, 8), (1, 8)])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_the_softmax_of_the_allowed_scores(
    ranks, prefix, tmp_path, s, s_total, heads, groups, masked, scale
):
    b, d = 2, 16
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(s, b, heads, d, generator=draw)
    key, value = torch.randn(2, s_total, b, groups, d, generator=draw)
    causal = torch.arange(s_total)[None] > torch.arange(s_total - s, s_total)[:, None]
    mask = causal | (torch.rand(b, 1, s, s_total, generator=draw) < 0.3) if masked else None
    if mask is not None:
        mask[..., 0] = False
    out = ranks.run(1, attend, tiny_config(prefix, tmp_path), (query, key, value), mask, scale)[0]
    forbidden, factor = (causal if mask is None else mask), scale or d**-0.5
    exact = attention(query.double(), key.double(), value.double(), forbidden, factor)
    assert_as_accurate(out, attention(query, key, value, forbidden, factor), exact)


def normalise(rank: int, world_size: int, settings: Settings, x: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
    config = parsed(settings)
    from megatron_ptrl.training import layers, mcore

    norm = layers.RMSNorm(mcore.transformer_config(config), x.shape[-1], eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(weight)
    return norm(x).detach(), norm.weight.sequence_parallel


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_rms_norm_divides_by_the_root_mean_square(ranks, prefix, tmp_path, sequence_parallel):
    x, weight = torch.randn(5, 3, 64), torch.randn(64)
    layout = {"parallel__tp": 2, "parallel__sequence_parallel": sequence_parallel}
    out, mark = ranks.run(1, normalise, tiny_config(prefix, tmp_path, **layout), x, weight)[0]

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    assert_as_accurate(out, formula(x, weight), formula(x.double(), weight.double()))
    assert mark is sequence_parallel


def losses_with_another_past(rank: int, world_size: int, settings: Settings) -> tuple[Tensor, Tensor, int]:
    """(losses, losses after every token of the first document was changed, index of the EOD between the two)."""
    with pretraining(settings, world_size) as run:
        from megatron_ptrl.data.batches import microbatches

        eod = run.tokenizer.eod
        first = next(
            i
            for i in range(len(run.train_data))
            if (run.train_data[i]["tokens"][16:48] == eod).sum() == 1
            and (run.train_data[i]["tokens"] == eod).sum() == 1
        )
        sizes = {"global_batch": 1, "micro_batch": 1, "dp_rank": 0, "dp_size": 1}
        batch = next(microbatches(run.train_data, first_sample=first, end_sample=first + 1, **sizes))
        end = int((batch["tokens"][0] == eod).nonzero())
        results = []
        for shift in (0, 7):
            tokens = batch["tokens"].clone()
            tokens[0, :end] = (tokens[0, :end] + shift) % run.tokenizer.vocab_size
            assert shift == 0 or eod not in tokens[0, :end]
            mask = batch["attention_mask"]
            loss = run.chunks[0](tokens, batch["position_ids"], mask, labels=batch["labels"])
            results.append(loss[0].detach().clone())
        return results[0], results[1], end


def test_isolated_documents_do_not_see_each_other(ranks, prefix, tmp_path):
    common = {"train__steps": 400}
    isolated = tiny_config(prefix, tmp_path / "a", data__isolate_documents=True, **common)
    before, after, end = ranks.run(1, losses_with_another_past, isolated)[0]
    assert (before[:end] != after[:end]).sum() > end / 2
    # The EOD is the last token that may look at the first document.
    torch.testing.assert_close(after[end + 1 :], before[end + 1 :], rtol=1e-6, atol=0)
    packed = tiny_config(prefix, tmp_path / "b", **common)
    before, after, end = ranks.run(1, losses_with_another_past, packed)[0]
    assert ((before[end + 1 :] - after[end + 1 :]).abs() > 1e-5).sum() > (64 - end) / 2


@pytest.mark.parametrize("layout", [TP_PP_SP, {"parallel__cp": 2, "parallel__pp": 2}], ids=["tp pp sp", "cp pp"])
def test_isolated_documents_train_alike_over_ranks(ranks, prefix, tmp_path, layout):
    common = {"train__steps": 4, "data__isolate_documents": True}
    alone = run_tiny(ranks, 1, tiny_config(prefix, tmp_path / "1", **common))
    spread = run_tiny(ranks, 4, tiny_config(prefix, tmp_path / "4", **common, **layout))
    # A token whose probability is that of the last one in the head may fall on either side of its edge.
    assert_close_metrics(spread, alone, {**TOLERANCES, "head_mass": 1e-4, "tail_mass": 1e-4})
