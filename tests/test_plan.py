"""The dry run: its arithmetic against models that are really built, and that it leaves nothing behind."""

from typing import Any

import pytest
from stage_runs import command
from tiny import VOCAB, Settings, flags, parsed, pretraining, tiny_config

MODELS: dict[str, dict[str, Any]] = {
    "tied, grouped queries, QK norm": {},
    "untied, padded vocabulary": {
        "model__share_embeddings_and_output_weights": False,
        "model__make_vocab_size_divisible_by": 100,
    },
    "biases, a head per query": {"model__add_bias_linear": True, "model__num_query_groups": None},
    "bias of the queries, no QK norm": {"model__add_qkv_bias": True, "model__qk_layernorm": False},
    "wide heads, plain MLP": {
        "model__kv_channels": 24,
        "model__gated_linear_unit": False,
        "model__activation_func": "gelu",
    },
    "default MLP": {"model__ffn_hidden_size": None},
    "experts in some layers": {
        "model__num_moe_experts": 4,
        "model__moe_ffn_hidden_size": 32,
        "model__moe_layer_freq": [0, 1, 1, 0],
    },
    "experts in every second layer, a shared one": {
        "model__num_moe_experts": 2,
        "model__moe_layer_freq": 2,
        "model__moe_shared_expert_intermediate_size": 96,
    },
}
TP_SP = {"parallel__tp": 2, "parallel__sequence_parallel": True}


def counted_and_built(rank: int, world_size: int, settings: Settings) -> tuple[int, int, int, float]:
    """(parameters by arithmetic, of the whole model, on this rank; bytes of this rank's weights by the plan)."""
    with pretraining(settings, world_size) as run:
        from megatron_ptrl.training import mcore, plan

        padded = mcore.padded_vocab_size(run.tokenizer.vocab_size, run.config.model, run.config.parallel.tp)
        count = plan.count_parameters(run.config.model, padded, mcore.ffn_size(run.config.model))
        memory = plan.memory_per_rank(run.config, run.layout, count, padded)
        parameters = list(run.chunks[0].module.parameters())
        mine = sum(p.numel() for p in parameters)
        # A matrix that tensor parallelism splits counts wholly on its ranks together, anything else once.
        split = [p for p in parameters if getattr(p, "tensor_model_parallel", False)]
        whole = mine + sum(p.numel() for p in split) * (run.config.parallel.tp - 1)
        return count.total, whole, mine, memory["weights"]


@pytest.mark.parametrize("name", MODELS)
def test_the_counted_parameters_are_those_of_the_built_model(ranks, prefix, tmp_path, name):
    settings = tiny_config(prefix, tmp_path, **MODELS[name])
    counted, built, mine, weights = ranks.run(1, counted_and_built, settings)[0]
    assert counted == built == mine
    if "experts" not in name:
        assert weights == 4 * built


@pytest.mark.parametrize("name", ["biases, a head per query", "untied, padded vocabulary"])
def test_tensor_parallel_ranks_hold_the_counted_parameters_together(ranks, prefix, tmp_path, name):
    settings = tiny_config(prefix, tmp_path, **MODELS[name], **TP_SP)
    for counted, built, mine, weights in ranks.run(2, counted_and_built, settings):
        assert counted == built
        assert 4 * mine == pytest.approx(weights, rel=0.02), "norms, which every rank holds, are estimated as split"


def pipeline_sum(rank: int, world_size: int, settings: Settings) -> tuple[int, int, int]:
    counted, _, mine, _ = counted_and_built(rank, world_size, settings)
    return counted, mine, VOCAB * settings["model.hidden_size"]


def test_pipeline_stages_hold_the_counted_parameters_and_a_second_copy_of_a_tied_matrix(ranks, prefix, tmp_path):
    (counted, first, embedding), (_, last, _) = ranks.run(
        2, pipeline_sum, tiny_config(prefix, tmp_path, parallel__pp=2)
    )
    assert first + last == counted + embedding


def test_experts_over_ranks_hold_the_counted_parameters(ranks, prefix, tmp_path):
    settings = tiny_config(prefix, tmp_path, **MODELS["experts in some layers"], parallel__ep=2)
    (counted, _, mine, _), _ = ranks.run(2, counted_and_built, settings)
    expert = 3 * 64 * 32
    assert mine == counted - 2 * 2 * expert, "two layers, two of four experts elsewhere"


def estimates(rank: int, world_size: int, runs: list[tuple[Settings, int]]) -> list[dict[str, float]]:
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    from megatron_ptrl.training import mcore, plan
    from megatron_ptrl.training.layout import check_layout

    found = []
    for settings, size in runs:
        config = parsed(settings)
        count = plan.count_parameters(config.model, VOCAB, mcore.ffn_size(config.model))
        found.append(plan.memory_per_rank(config, check_layout(config, size), count, VOCAB))
    return found


def test_memory_shrinks_with_what_shares_it(ranks, prefix, tmp_path):
    def settings(**layout: Any) -> Settings:
        return tiny_config(prefix, tmp_path, train__precision="bf16", train__micro_batch=1, **layout)

    one, dp, replicated, tp, pp = ranks.run(
        1,
        estimates,
        [
            (settings(), 1),
            (settings(), 4),
            (settings(parallel__distributed_optimizer=False), 4),
            (settings(**TP_SP), 2),
            (settings(parallel__pp=2), 2),
        ],
    )[0]
    assert all(size > 0 for size in one.values())
    # Bytes of a parameter: bf16 weight 2, fp32 gradient 4, fp32 weight and two moments 12.
    assert (one["gradients"], one["optimizer"]) == (2 * one["weights"], 6 * one["weights"])
    assert dp == {**one, "optimizer": one["optimizer"] / 4} and replicated == one
    assert all(tp[name] == pytest.approx(one[name] / 2) for name in one)
    assert one["weights"] / 2 < pp["weights"] < one["weights"]


def dry_run(rank: int, world_size: int, words: list[str], stage: str = "pretrain") -> tuple[int, str, str]:
    return command(rank, world_size, stage, "--dry_run=true", *words)


def test_a_dry_run_prints_the_plan_and_creates_nothing(ranks, prefix, tmp_path):
    settings = tiny_config(prefix, tmp_path / "run", data__cache=str(tmp_path / "cache"), optimizer__min_lr=1e-4)
    code, text, err = ranks.run(1, dry_run, flags(settings))[0]
    assert (code, err) == (0, "")
    assert "10 steps, 5,120 tokens" in text
    assert "cosine, lr 0.002 -> 0.0001, warm-up 2 steps" in text
    assert "1 = tp 1 x pp 1 x cp 1 x dp 1" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_on_one_process_plans_for_many_ranks(ranks, prefix, tmp_path):
    layout = {"parallel__tp": 4, "parallel__pp": 2, "parallel__cp": 2, "parallel__sequence_parallel": True}
    sizes = {"model__num_query_groups": 4, "train__global_batch": 64, "dry_run_world_size": 64}
    settings = tiny_config(prefix, tmp_path / "run", **layout, **sizes)
    code, text, _ = ranks.run(1, dry_run, flags(settings))[0]
    assert code == 0
    assert "64 = tp 4 x pp 2 x cp 2 x dp 4" in text and "8 microbatches, bubble 11.1%" in text
    code, text, _ = ranks.run(1, dry_run, flags(settings | {"dry_run_world_size": None}))[0]
    assert code == 0 and "16 = tp 4 x pp 2 x cp 2 x dp 1" in text
    code, _, err = ranks.run(1, dry_run, flags(settings | {"dry_run_world_size": 24}))[0]
    assert code == 2 and "24 ranks do not divide" in err
