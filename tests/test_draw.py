"""Tokens are drawn as often as their probabilities say, with the log-probabilities they were drawn with."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from megatron_ptrl import decode_ops, ops

COUNT = 20_000
# p^2 of these over the sum: 0.029 0.725 0.181 0.065.
PROBABILITY = torch.tensor([0.1, 0.5, 0.25, 0.15], dtype=torch.float64)


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def how(request, monkeypatch) -> None:
    """Each test once by the CPU kernel and once by what GPUs run."""
    if request.param == "torch":
        monkeypatch.setattr(decode_ops, "draws", lambda logits: False)
    elif not ops.load_kernels():
        pytest.skip("the kernels were not built")


def drawn(logits: Tensor, temperature: float, top_p: float, count: int = COUNT) -> tuple[Counter, dict[int, float]]:
    """How often each token is drawn by evenly spread numbers, and its log-probability."""
    from megatron_ptrl.training.draw import draw

    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ones = torch.ones(count, dtype=torch.float64)
    token, logprob = draw(logits.expand(count, -1), ones * temperature, ones * top_p, uniform)
    return Counter(token.tolist()), dict(zip(token.tolist(), logprob.tolist(), strict=True))


@pytest.mark.parametrize(
    "temperature, top_p, allowed", [(1, 1, 4), (0.5, 1, 4), (0.5, 0.9, 2), (1, 0.45, 1), (2, 0.8, 3)]
)
def test_a_draw_follows_the_probabilities_within_the_nucleus(temperature, top_p, allowed):
    sharp = PROBABILITY ** (1 / temperature)
    kept = sharp.argsort(descending=True)[:allowed]
    expected = {int(i): float(sharp[i] / sharp[kept].sum()) for i in kept}
    often, logprob = drawn((PROBABILITY.log() + 30).float(), temperature, top_p)
    assert set(often) == set(expected)
    for i, probability in expected.items():
        assert math.isclose(often[i] / COUNT, probability, abs_tol=2 / COUNT)
        assert math.isclose(logprob[i], math.log(probability), abs_tol=1e-5)


def test_temperature_0_is_the_most_probable_token_for_certain():
    often, logprob = drawn(PROBABILITY.log().float(), 0, 1e-9)
    assert set(often) == {1} and logprob == {1: 0.0}


def test_tokens_as_probable_as_the_last_of_a_nucleus_belong_to_it():
    often, logprob = drawn(torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]), 1, 0.5)
    assert set(often) == {0, 1, 2, 3}
    assert math.isclose(sum(map(math.exp, logprob.values())), 1, abs_tol=1e-6)


@pytest.mark.parametrize("temperature, top_p", [(1, 1), (2, 1), (0, 1), (1, 0.5), (1, 1e-9)])
def test_padding_is_neither_in_the_softmax_nor_drawn(temperature, top_p):
    from megatron_ptrl.training.draw import draw

    # Two of four columns are padding, one of them more probable than any token, as a model without training has it.
    sharp = torch.tensor([0.2, 0.3, 0.5, 0.1], dtype=torch.float64) ** (1 / max(temperature, 1))
    uniform = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    ones = torch.ones(COUNT, dtype=torch.float64)
    logits = (max(temperature, 1) * sharp.log() + 3).float().expand(COUNT, -1)
    token, logprob = draw(logits, ones * temperature, ones * top_p, uniform, vocab_size=2)
    often = Counter(token.tolist())
    if temperature == 0:
        assert set(often) == {1} and set(logprob.tolist()) == {0.0}
    elif top_p == 1:
        assert often[1] / COUNT == pytest.approx(float(sharp[1] / sharp[:2].sum()), abs=2 / COUNT)
        expected = (sharp / sharp[:2].sum()).log()[token].double()
        torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-6)
    else:
        assert set(often) == {1} and logprob.abs().max() < 1e-6, "the nucleus of the tokens is token 1"


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_a_nucleus_of_a_large_vocabulary_is_found_whatever_its_size(top_p):
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    probability = logits.double().softmax(0).sort(descending=True)
    size = int((probability.values.cumsum(0) < top_p).sum()) + 1
    often, logprob = drawn(logits, 1, top_p, count=300)
    assert set(often) <= set(probability.indices[:size].tolist())
    mass = probability.values[:size].sum()
    best = int(probability.indices[0])
    assert math.isclose(logprob[best], float((probability.values[0] / mass).log()), abs_tol=1e-6)


def test_rows_of_different_settings_do_not_touch_each_other():
    from megatron_ptrl.training.draw import draw

    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.5], dtype=torch.float64)
    top_p = torch.tensor([1.0, 1.0, 0.5, 0.99], dtype=torch.float64)
    uniform = torch.tensor([0.1, 0.9, 0.4, 0.6], dtype=torch.float64)
    together = draw(logits, temperature, top_p, uniform)
    for i in range(4):
        one = draw(*(x[i : i + 1] for x in (logits, temperature, top_p, uniform)))
        assert [x.tolist() for x in one] == [x[i : i + 1].tolist() for x in together]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_finite_show_in_the_logprob(temperature, wrong):
    logits = torch.tensor([0.5, wrong, 1.0])
    assert not any(value <= 0 for value in drawn(logits, temperature, 1)[1].values())
