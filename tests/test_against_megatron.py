"""Megatron-Core's own loss, prediction heads and experts as the measure of ours."""

import pytest
import torch
from ranks import Ranks
from test_layouts import SHAPING, TOLERANCES
from tiny import Metrics, Settings, assert_close_metrics, pretraining, run_tiny, tiny_config

from megatron_ptrl.config import RewardShaping
from megatron_ptrl.losses.reward_shaped_ce import reward_shaped_cross_entropy

MTP = {"model__mtp_num_layers": 1}
MOE = {
    "model__num_layers": 2,
    "model__num_moe_experts": 4,
    "model__moe_ffn_hidden_size": 64,
    "model__moe_router_topk": 2,
    "train__steps": 12,
}
TP_SP = {"parallel__tp": 2, "parallel__sequence_parallel": True}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("heads", [{}, MTP], ids=["", "mtp"])
def test_beta_0_trains_like_megatrons_loss(ranks, prefix, tmp_path, world_size, heads):
    common = {"parallel__tp": world_size, "train__steps": 6, **heads}
    ours = run_tiny(ranks, world_size, tiny_config(prefix, tmp_path / "ours", **common))
    theirs = run_tiny(ranks, world_size, tiny_config(prefix, tmp_path / "theirs", loss__impl="megatron", **common))
    assert all(row["loss"] == row["ce"] for row in theirs)
    assert all(abs(row["loss"] - row["ce"]) <= 1e-6 * row["ce"] for row in ours)
    assert_close_metrics(ours, theirs, {"loss": 1e-6, "grad_norm": 1e-4})


def mtp_losses(rank: int, world_size: int, settings: Settings) -> tuple[float, float, float]:
    """Of one microbatch: the prediction head's loss as Megatron logs it, the same from its logits shaped by hand, and
    the plain cross entropy of those logits."""
    with pretraining(settings, world_size) as run:
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

        from megatron_ptrl.training import loop, mcore

        model, seen = mcore.unwrap(run.chunks[0]), []
        compute = model.compute_language_model_loss

        def recording(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            seen.append((labels.clone(), logits.detach().clone()))
            return compute(labels, logits)

        model.compute_language_model_loss = recording
        MTPLossLoggingHelper.tracker.clear()
        loop.forward_step(run._batches(), run.chunks[0])
        logged = MTPLossLoggingHelper.tracker["values"].item()
    assert len(seen) == 2, "one call for the prediction head, one for the next token"
    labels, logits = seen[0]
    # The head predicts the token after the next; the last position has none and is masked.
    keep = torch.ones_like(labels, dtype=torch.bool)
    keep[:, -1] = False
    shaping = RewardShaping(settings["loss.beta"], settings["loss.lambda_head"], settings["loss.lambda_tail"], 20)
    by_hand, plain = (
        reward_shaped_cross_entropy(logits, labels.t().contiguous(), s, vocab_size=run.tokenizer.vocab_size).t()[keep]
        for s in (shaping, RewardShaping())
    )
    return logged, by_hand.mean().item(), plain.mean().item()


def test_prediction_heads_use_the_shaped_loss(ranks, prefix, tmp_path):
    settings = tiny_config(prefix, tmp_path, **SHAPING, **MTP)
    logged, by_hand, plain = ranks.run(1, mtp_losses, settings)[0]
    assert logged == pytest.approx(by_hand, rel=1e-6)
    assert abs(by_hand - plain) > 1e-3


def test_prediction_heads_train_alike_over_tensor_ranks(ranks, prefix, tmp_path):
    common = {**SHAPING, **MTP, "train__steps": 8}
    alone = run_tiny(ranks, 1, tiny_config(prefix, tmp_path / "1", **common))
    assert alone[-1]["ce"] < alone[0]["ce"]
    for name, layout in (("tp", {"parallel__tp": 2}), ("sp", TP_SP)):
        spread = run_tiny(ranks, 2, tiny_config(prefix, tmp_path / name, **common, **layout))
        assert_close_metrics(spread, alone, TOLERANCES)


@pytest.fixture(scope="module")
def experts_on_one_rank(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> list[Metrics]:
    return run_tiny(ranks, 1, tiny_config(prefix, tmp_path_factory.mktemp("moe"), **SHAPING, **MOE))


def test_experts_learn(experts_on_one_rank):
    assert experts_on_one_rank[-1]["ce"] < experts_on_one_rank[0]["ce"] - 0.2


@pytest.mark.parametrize("layout", [{}, TP_SP, {"parallel__ep": 2}], ids=["dp 2", "tp 2", "ep 2"])
def test_experts_train_alike(ranks, prefix, tmp_path, experts_on_one_rank, layout):
    spread = run_tiny(ranks, 2, tiny_config(prefix, tmp_path, **SHAPING, **MOE, **layout))
    assert_close_metrics(spread, experts_on_one_rank, TOLERANCES)


def layer_kinds(rank: int, world_size: int, settings: Settings) -> list[str]:
    with pretraining(settings, world_size) as run:
        from megatron_ptrl.training import mcore

        return [type(layer.mlp).__name__ for layer in mcore.unwrap(run.chunks[0]).decoder.layers]


def test_fields_of_megatrons_config_reach_the_model(ranks, prefix, tmp_path):
    settings = tiny_config(prefix, tmp_path, **{**MOE, "model__num_layers": 4}, model__moe_layer_freq=[0, 1, 1, 0])
    assert ranks.run(1, layer_kinds, settings)[0] == ["MLP", "MoELayer", "MoELayer", "MLP"]
