"""The collective calls of real steps, counted, against the formulas that docs/scaling.md shows."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_ptrl.errors import InputError
from megatron_ptrl.training.collectives import OURS, Collective

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Every part of the formulas that two ranks can have, once; benchmarks/collectives.py has more of their products.
NAMES = [
    "tp",
    "tp, sequence parallel",
    "tp, linear sum, sequence parallel",
    "tp, ReMiT online",
    "pp, tied",
    "cp, ReMiT by document",
    "cp, RHO-1",
    "dp",
    "score, tp",
    "rl, pp",
    "generate, pp",
]

Counts = dict[str, list[Collective]]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder on the path, here and in the pool's processes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def count(rank: int, world_size: int, names: list[str]) -> dict[str, Counts]:
    from collective_cases import CASES
    from collective_steps import counted

    return {name: counted(rank, world_size, CASES[name]) for name in names}


def wrong(results: list[dict[str, Counts]]) -> list[str]:
    from collective_calls import differences

    return [
        f"{name}: {line}"
        for rank, found in enumerate(results)
        for name, result in found.items()
        for line in differences(result, rank)
    ]


def test_the_calls_of_a_step_are_those_of_the_formulas(ranks, benchmarks):
    results = ranks.run(2, count, NAMES)
    assert wrong(results) == []
    ours = {one.operation for found in results for result in found.values() for one in result["counted"]}
    assert ours == {"all-gather", "all-reduce", "reduce-scatter", "send", "receive", "broadcast"}


def with_a_call_too_many(rank: int, world_size: int) -> Counts:
    """The loss sums a number over the tensor-parallel ranks that nobody asked for."""
    import torch
    import torch.distributed as dist

    from megatron_ptrl.losses import reward_shaped_ce

    right = reward_shaped_ce.exchange

    def exchange(numbers: Any, keys: Any, call: Any) -> Any:
        dist.all_reduce(torch.zeros(3), group=call.tp_group)
        return right(numbers, keys, call)

    reward_shaped_ce.exchange = exchange
    try:
        return count(rank, world_size, ["tp"])["tp"]
    finally:
        reward_shaped_ce.exchange = right


def test_a_call_too_many_is_seen(ranks, benchmarks):
    from collective_calls import differences

    for rank, result in enumerate(ranks.run(2, with_a_call_too_many)):
        assert differences(result, rank) == [f"rank {rank}: {OURS}, tp, all-reduce of 12 bytes: 4, not 0"]


def test_a_call_of_another_size_is_a_call_too_many_and_one_too_few(benchmarks):
    from collective_calls import differences

    one = Collective(OURS, "tp", "all-gather", bytes=64, count=2)
    found = {"counted": [one], "expected": [dataclasses.replace(one, bytes=32)]}
    assert differences(found) == [
        "rank 0: megatron_ptrl, tp, all-gather of 32 bytes: 0, not 2",
        "rank 0: megatron_ptrl, tp, all-gather of 64 bytes: 2, not 0",
    ]


def test_a_model_that_the_formulas_do_not_know_is_refused(ranks, prefix, tmp_path):
    ranks.run(1, refuse_experts, prefix, str(tmp_path))


def refuse_experts(rank: int, world_size: int, prefix: str, folder: str) -> None:
    from tiny import parsed, tiny_config

    config = parsed(tiny_config(prefix, folder, model__num_moe_experts=4))
    from megatron_ptrl.training.collectives import sizes_of
    from megatron_ptrl.training.layout import check_layout

    with pytest.raises(InputError, match="num_moe_experts is 4"):
        sizes_of(config, check_layout(config, 1), 512, 128)
