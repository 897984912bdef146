"""Advantages and the policy loss against worked numbers and the formulas as the papers print them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_ptrl import PolicyLossConfig, group_advantages, policy_loss
from megatron_ptrl.errors import InputError

LENGTHS = (3, 1, 5, 2)
WIDTH = 7
ADVANTAGES = (1.3, -0.4, -0.9, 0.7)


def responses(seed: int = 0) -> dict[str, Tensor]:
    """Four responses, one a row, as a policy that has moved on from the one that drew them sees them; fp64."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]

    def near(logprobs: Tensor, spread: float) -> Tensor:
        return logprobs + spread * torch.randn(logprobs.shape, generator=generator, dtype=torch.float64)

    old = near(torch.full(mask.shape, -2.0, dtype=torch.float64), 0.5)
    return {
        "logprobs": near(old, 0.3),
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None].expand(mask.shape),
        "loss_mask": mask,
        "old_logprobs": old,
        "rollout_logprobs": near(old, 0.4),
        "reference_logprobs": near(old, 0.5),
    }


def printed(row: dict[str, Tensor], i: int, t: int, low: float, high: float, beta: float) -> float:
    """min(r A, clip(r, 1 - low, 1 + high) A) - beta KL of one token: what all three papers maximise."""
    r = math.exp(row["logprobs"][i, t] - row["old_logprobs"][i, t])
    advantage = ADVANTAGES[i]
    surrogate = min(r * advantage, min(max(r, 1 - low), 1 + high) * advantage)
    quotient = math.exp(row["reference_logprobs"][i, t] - row["logprobs"][i, t])
    return surrogate - beta * (quotient - math.log(quotient) - 1)


def mean_loss(row: dict[str, Tensor], config: PolicyLossConfig, **more: Any) -> float:
    loss = policy_loss(**row, config=config, **more)
    return float(loss.total / loss.divisor)


def test_advantages_are_worked_numbers():
    rewards = torch.tensor([[-1.0, 1.0], [4.0, 4.0]])
    root = 2**0.5
    expected = torch.tensor([[-1 / root, 1 / root], [0.0, 0.0]])  # the unbiased deviation of -1 and 1 is the root of 2
    torch.testing.assert_close(group_advantages(rewards), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(group_advantages(rewards, normalize_std=False), torch.tensor([[-1.0, 1], [0, 0]]))
    one_of_four = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(
        group_advantages(one_of_four), torch.tensor([[1.5, -0.5, -0.5, -0.5]]), rtol=1e-5, atol=0
    )


def test_a_sample_that_was_not_judged_takes_no_part():
    rewards = torch.tensor([[1.0, 0.0, math.nan, 0.0], [1.0, math.inf, math.nan, 7.0], [1.0, 1.0, 1.0, 0.0]])
    valid = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    found = group_advantages(rewards, valid=valid)
    three = group_advantages(torch.tensor([[1.0, 0.0, 0.0]]))[0]
    torch.testing.assert_close(found[0], torch.stack([three[0], three[1], torch.tensor(0.0), three[2]]))
    assert found[1].tolist() == [0.0] * 4, "one judged sample has nothing to be compared with"
    assert found[2].tolist() == [0.0] * 4, "the judged samples are alike"


@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_laws_of_advantages(rewards):
    rewards = torch.tensor(rewards)
    found = group_advantages(rewards)
    torch.testing.assert_close(found.sum(-1), torch.zeros(len(rewards)), rtol=0, atol=1e-5)
    alike = rewards.amax(-1) == rewards.amin(-1)
    assert (found[alike] == 0).all()
    torch.testing.assert_close(found[~alike].std(-1), torch.ones(int((~alike).sum())), rtol=1e-4, atol=0)
    torch.testing.assert_close(group_advantages(rewards + 3), found, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_published_one():
    row = responses()
    low, high, beta = 0.2, 0.28, 0.04
    terms = [[printed(row, i, t, low, high, beta) for t in range(n)] for i, n in enumerate(LENGTHS)]
    grpo = sum(sum(tokens) / len(tokens) for tokens in terms) / len(terms)
    doctor = sum(sum(tokens) / 16 for tokens in terms) / len(terms)
    dapo = sum(sum(tokens) for tokens in terms) / sum(LENGTHS)
    common = {"clip_low": low, "clip_high": high, "kl_coef": beta}
    for aggregation, objective in (("sequence_mean", grpo), ("constant", doctor), ("token_mean", dapo)):
        config = PolicyLossConfig(aggregation=aggregation, normalizer=16, **common)
        assert mean_loss(row, config) == pytest.approx(-objective, rel=1e-12)
    assert len({round(x, 6) for x in (grpo, doctor, dapo)}) == 3


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("importance", ["off", "token", "sequence_mask"])
def test_packing_responses_into_rows_changes_nothing(aggregation, importance):
    row = responses()
    config = PolicyLossConfig(
        aggregation=aggregation, importance_sampling=importance, importance_cap=1.5, kl_coef=0.1, clip_high=0.28
    )
    apart = policy_loss(**row, config=config)
    # Responses 0 and 2 in one row, 1 and 3 in the other, which ends in padding that holds anything.
    packed = {}
    for name, values in row.items():
        rows = [torch.cat([values[i, : LENGTHS[i]] for i in pair]) for pair in ((0, 2), (1, 3))]
        filler = torch.full((2, 9), False if values.dtype == torch.bool else math.nan, dtype=values.dtype)
        for i, content in enumerate(rows):
            filler[i, : len(content)] = content
        packed[name] = filler
    ids = torch.tensor([[0] * 3 + [1] * 5 + [0], [4] + [0] * 2 + [9] * 6])
    together = policy_loss(**packed, config=config, sequence_ids=ids)
    for name, a, b in zip(apart._fields, together, apart, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert together.divisor == (11 if aggregation == "token_mean" else 4)


def test_the_first_update_is_reinforce():
    row = responses()
    logprobs = row["logprobs"].float().requires_grad_()
    mask = row["loss_mask"]
    config = PolicyLossConfig(clip_low=0.0, clip_high=0.0)
    loss = policy_loss(logprobs, row["advantages"].float(), mask, config)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    # REINFORCE: the gradient of -A log p.
    assert torch.equal(gradient, -row["advantages"].float() * mask)
    assert (loss.ratio, loss.ratio_max, loss.clipped) == (11, 1, 0)


def test_the_gradient_is_that_of_the_loss():
    row = responses()
    logprobs = row.pop("logprobs").requires_grad_()
    for config in (
        PolicyLossConfig(kl_coef=0.3, clip_high=0.1, clip_low=0.1),
        PolicyLossConfig(kl_coef=0.3, kl_estimator="k2", aggregation="sequence_mean", importance_sampling="token"),
        PolicyLossConfig(kl_coef=0.3, kl_estimator="k1", aggregation="constant", importance_sampling="sequence_mask"),
    ):
        assert torch.autograd.gradcheck(lambda x, c=config: policy_loss(x, config=c, **row).total, logprobs)


def test_the_clip_stops_what_has_gone_far_enough():
    old = torch.zeros(1, 4, dtype=torch.float64)
    logprobs = torch.tensor([[1.3, 0.7, 1.3, 0.7]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.28)
    loss = policy_loss(logprobs, advantages, torch.ones(1, 4), config, old_logprobs=old)
    # A > 0: 1.28 is the ceiling, 0.7 may still rise. A < 0: 1.3 may still fall, 0.8 is the floor.
    assert float(loss.total) == pytest.approx(-1.28 - 0.7 + 1.3 + 0.8)
    assert loss.clipped == 2 and float(loss.ratio_max) == pytest.approx(1.3)
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.7, 1.3, 0.0]], dtype=torch.float64))


def test_importance_sampling_weights_what_the_sampler_preferred():
    old = torch.tensor([[3.0, 0.5], [3.0, 0.5]], dtype=torch.float64).log()
    ones = torch.ones(2, 2, dtype=torch.float64)
    drawn = {"rollout_logprobs": torch.tensor([[1.0, 1.0], [3.0, 0.5]], dtype=torch.float64).log()}

    def total(**settings: Any) -> tuple[float, float]:
        loss = policy_loss(old, ones, ones, PolicyLossConfig(**settings), **drawn)
        return float(loss.total), float(loss.importance)

    assert total() == (-4.0, 4.0)
    assert total(importance_sampling="token") == pytest.approx((-(2 + 0.5 + 1 + 1), 4.5))
    assert total(importance_sampling="sequence_mask") == pytest.approx((-(1.5 + 1.5 + 1 + 1), 5.0))
    assert total(importance_sampling="sequence_mask", importance_cap=1.4) == pytest.approx((-2.0, 2.0))


def test_the_kl_estimators_are_what_they_are_called():
    logprobs = torch.tensor([[0.5]], dtype=torch.float64).log()
    reference = torch.tensor([[0.25]], dtype=torch.float64).log()
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 + math.log(2) - 1}
    for estimator, value in expected.items():
        config = PolicyLossConfig(kl_coef=2.0, kl_estimator=estimator)
        loss = policy_loss(logprobs, torch.zeros(1, 1), torch.ones(1, 1), config, reference_logprobs=reference)
        assert float(loss.kl) == pytest.approx(value) and float(loss.total) == pytest.approx(2 * value)


def test_masked_tokens_have_no_gradient_and_no_say():
    row = {name: values.clone() for name, values in responses().items()}
    config = PolicyLossConfig(kl_coef=0.1, importance_sampling="token")
    expected = mean_loss(row, config)
    for name, values in row.items():
        if name != "loss_mask":
            values[~row["loss_mask"]] = math.nan
    logprobs = row.pop("logprobs").requires_grad_()
    loss = policy_loss(logprobs, config=config, **row)
    assert float(loss.total / loss.divisor) == expected
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    assert (gradient[~row["loss_mask"]] == 0).all() and gradient.isfinite().all()


def test_a_batch_without_tokens_is_nothing():
    empty = {name: torch.zeros_like(values) for name, values in responses().items()}
    for aggregation in ("token_mean", "sequence_mean"):
        loss = policy_loss(**empty, config=PolicyLossConfig(aggregation=aggregation))
        assert [float(value) for value in loss] == [0.0] * len(loss)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages(torch.zeros(3)), r"rewards has shape \[3\]"),
        (lambda: group_advantages(torch.zeros(3, 2).long()), "int64; expected floats"),
        (lambda: group_advantages(torch.tensor([[0.0, math.nan]])), r"rewards\[0, 1\] is nan"),
        (lambda: group_advantages(torch.zeros(1, 2), valid=torch.ones(2, 1).bool()), r"expected bool \[1, 2\]"),
        (lambda: policy_loss(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3)), r"advantages has shape \[2\]"),
        (lambda: policy_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2)), r"floats \(b, s\)"),
        (
            lambda: policy_loss(*[torch.zeros(1, 1)] * 3, PolicyLossConfig(kl_coef=1.0)),
            "expected reference_logprobs with it",
        ),
        (
            lambda: policy_loss(*[torch.zeros(1, 1)] * 3, PolicyLossConfig(importance_sampling="token")),
            "expected rollout_logprobs with it",
        ),
        (lambda: PolicyLossConfig(clip_low=1.5), "policy.clip_low is 1.5"),
        (lambda: PolicyLossConfig(normalizer=0), "policy.normalizer is 0"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(InputError, match=message):
        call()
