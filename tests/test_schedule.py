"""Learning rate and weight decay: the closed forms, and what a step really applies."""

import math
from typing import Any

import pytest
import torch
from tiny import Settings, pretraining, tiny_config

PEAK, FLOOR, WARMUP, STEPS = 1e-2, 1e-3, 4, 20


def used_and_logged(rank: int, world_size: int, settings: Settings) -> list[tuple[float, float]]:
    """Of every step, the rate while the optimizer ran and the one in the figures."""
    with pretraining(settings, world_size) as run:
        used: list[float] = []
        step = run.optimizer.step

        def recording() -> Any:
            used.append(run.optimizer.param_groups[0]["lr"])
            assert len({group["lr"] for group in run.optimizer.param_groups}) == 1
            return step()

        run.optimizer.step = recording
        run._begin()
        return [(used[-1], logged) for logged in (run._step()["learning_rate"] for _ in range(STEPS))]


def cosine(step: int, end: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min((step - WARMUP) / (end - WARMUP), 1.0)))


def wsd(step: int, decay: int, shape: Any) -> float:
    part = (step - (STEPS - decay)) / decay
    return shape(part) if part > 0 else 1.0


SCHEDULES: dict[str, tuple[dict[str, Any], Any]] = {
    "constant": ({"schedule": "constant"}, lambda step: 1.0),
    "cosine": ({"schedule": "cosine"}, lambda step: cosine(step, STEPS)),
    "cosine to step 12": ({"schedule": "cosine", "decay_steps": 12}, lambda step: cosine(step, 12)),
    "wsd, a tenth": ({"schedule": "wsd"}, lambda step: wsd(step, 2, lambda part: 1 - part)),
    "wsd cosine": (
        {"schedule": "wsd", "decay_steps": 8, "wsd_decay": "cosine"},
        lambda step: wsd(step, 8, lambda part: 0.5 * (1 + math.cos(math.pi * part))),
    ),
    "wsd exponential": (
        {"schedule": "wsd", "decay_steps": 8, "wsd_decay": "exponential"},
        lambda step: wsd(step, 8, lambda part: 2 * 0.5**part - 1),
    ),
    "wsd minus_sqrt": (
        {"schedule": "wsd", "decay_steps": 8, "wsd_decay": "minus_sqrt"},
        lambda step: wsd(step, 8, lambda part: 1 - math.sqrt(part)),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_step_uses_and_logs_the_rate_of_the_closed_form(ranks, prefix, tmp_path, name):
    options, share = SCHEDULES[name]
    settings = tiny_config(
        prefix,
        tmp_path,
        **{"model__num_layers": 1, "train__steps": STEPS, "optimizer__lr": PEAK, "optimizer__min_lr": FLOOR},
        optimizer__warmup_steps=WARMUP,
        **{f"optimizer__{option}": value for option, value in options.items()},
    )
    expected = [
        PEAK * step / WARMUP if step <= WARMUP else FLOOR + (PEAK - FLOOR) * share(step) for step in range(STEPS)
    ]
    rates = ranks.run(1, used_and_logged, settings)[0]
    assert [used for used, _ in rates] == [logged for _, logged in rates]
    assert [logged for _, logged in rates] == pytest.approx(expected, rel=1e-9)


def weights_after_a_step(rank: int, world_size: int, settings: Settings) -> tuple[dict, dict]:
    """Weights by name before and after the first step."""
    with pretraining(settings, world_size) as run:
        weights = dict(run.chunks[0].module.named_parameters())
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        run._begin()
        run._step()
        return before, {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.parametrize("distributed", [False, True])
def test_matrices_decay_and_norms_and_biases_are_spared(ranks, prefix, tmp_path, distributed):
    common = {"model__num_layers": 1, "model__add_bias_linear": True, "optimizer__warmup_steps": 0}
    common |= {"parallel__distributed_optimizer": distributed, "optimizer__lr": PEAK}
    results = {}
    for decay in (0.0, 0.5):
        settings = tiny_config(prefix, tmp_path / str(decay), optimizer__weight_decay=decay, **common)
        results[decay] = ranks.run(1, weights_after_a_step, settings)[0]
    before, without = results[0.0]
    _, decayed = results[0.5]
    spared = {name for name in before if torch.equal(without[name], decayed[name])}
    assert spared == {name for name, weight in before.items() if weight.dim() == 1} and spared
    for name in before.keys() - spared:
        torch.testing.assert_close(without[name] - decayed[name], PEAK * 0.5 * before[name], rtol=1e-3, atol=1e-7)
