"""Layouts that cannot work are refused before anything is built, with the sizes and what to change."""

import dataclasses
from typing import Any

import pytest

from megatron_ptrl.config import DataConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.training.layout import check_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelWithExperts(ModelConfig):
    num_moe_experts: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None


PARTS = {"model": ModelWithExperts, "parallel": ParallelConfig, "data": DataConfig, "train": TrainConfig}


def config(**changed: Any) -> PretrainConfig:
    """`parallel__tp=2` sets `parallel.tp`."""
    split = [(*name.split("__", 1), value) for name, value in changed.items()]
    return PretrainConfig(
        **{part: kind(**{field: v for p, field, v in split if p == part}) for part, kind in PARTS.items()}
    )


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "ranks": (6, {"parallel__tp": 2, "parallel__pp": 2}, "6 ranks do not divide by .*tp 2 x pp 2 x cp 1 = 4; launch"),
    "batch": (3, {}, "global_batch 16 does not divide by train.micro_batch 4 x 3 .* = 12; make it a multiple of 12"),
    "groups": (1, {"model__num_query_groups": 3}, "num_attention_heads 8 does not divide by model.num_query_groups 3"),
    "heads": (
        3,
        {"parallel__tp": 3, "model__num_query_groups": None},
        "num_attention_heads 8 does not divide by parallel.tp 3",
    ),
    "groups over tp": (8, {"parallel__tp": 8}, "num_query_groups 4 does not divide by parallel.tp 8"),
    "mlp": (
        4,
        {"parallel__tp": 4, "model__ffn_hidden_size": 66},
        "ffn_hidden_size 66 does not divide by parallel.tp 4",
    ),
    "sp alone": (1, {"parallel__sequence_parallel": True}, "sequence_parallel is true with parallel.tp 1.*set tp > 1"),
    "sp sequence": (
        2,
        {"parallel__tp": 2, "parallel__sequence_parallel": True, "data__seq_length": 33},
        "seq_length 33 does not divide by parallel.cp x tp 2",
    ),
    "cp sequence": (
        2,
        {"parallel__cp": 2, "data__seq_length": 34},
        "seq_length 34 does not divide by 2 x parallel.cp 4",
    ),
    "vpp alone": (1, {"parallel__vpp": 2}, "vpp is 2 with parallel.pp 1; .*leave parallel.vpp null"),
    "one chunk": (2, {"parallel__pp": 2, "parallel__vpp": 1}, "vpp is 1 with parallel.pp 2"),
    "interleaved microbatches": (
        2,
        {"parallel__pp": 2, "parallel__vpp": 2, "train__global_batch": 12},
        "number of microbatches 3 does not divide by parallel.pp",
    ),
    "layers": (3, {"parallel__pp": 3}, "num_layers 4 does not divide by parallel.pp x vpp 3"),
    "interleaved layers": (
        2,
        {"parallel__pp": 2, "parallel__vpp": 2, "model__num_layers": 6},
        "num_layers 6 does not divide by parallel.pp x vpp 4",
    ),
    "ep alone": (2, {"parallel__ep": 2}, "parallel.ep is 2 and model.num_moe_experts is not set"),
    "experts": (
        2,
        {"parallel__ep": 2, "model__num_moe_experts": 3},
        "num_moe_experts 3 does not divide by parallel.ep 2",
    ),
    "expert ranks": (
        2,
        {"parallel__ep": 4, "model__num_moe_experts": 4},
        "number of ranks 2 does not divide by parallel.etp x ep x pp 4",
    ),
    "experts without sp": (
        2,
        {"parallel__tp": 2, "model__num_moe_experts": 4},
        "experts with parallel.tp > 1 need parallel.sequence_parallel true",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_cannot_work_is_refused(name):
    world_size, changed, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        check_layout(config(**changed), world_size)
    assert "\n" not in str(caught.value)


ALLOWED: dict[str, tuple[int, dict[str, Any], tuple[int, int]]] = {
    "one": (1, {}, (1, 4)),
    "dp": (4, {}, (4, 1)),
    "tp x pp x dp": (8, {"parallel__tp": 2, "parallel__pp": 2}, (2, 2)),
    "interleaved": (2, {"parallel__pp": 2, "parallel__vpp": 2}, (1, 4)),
    "cp": (2, {"parallel__cp": 2}, (1, 4)),
    "uneven stages": (
        2,
        {"parallel__pp": 2, "model__num_layers": 5, "model__num_layers_in_first_pipeline_stage": 2},
        (1, 4),
    ),
    "experts": (2, {"parallel__ep": 2, "model__num_moe_experts": 4}, (2, 2)),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_data_parallel_ranks_and_microbatches_follow_from_the_rest(name):
    world_size, changed, expected = ALLOWED[name]
    layout = check_layout(config(**changed), world_size)
    assert (layout.dp, layout.num_microbatches) == expected and layout.world_size == world_size
