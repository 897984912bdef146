"""`loss.impl: linear` against the loss on logits: the same figures in training, whatever the layout."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from stage_runs import one_by_one
from test_against_megatron import MTP, TP_SP
from test_layouts import SHAPING, TOLERANCES
from tiny import Metrics, Settings, assert_close_metrics, parsed, pretraining, run_tiny, tiny_config, train

from megatron_ptrl.errors import InputError

# 2 x 64 tokens a microbatch: three chunks, the last one short.
LINEAR = {"loss__impl": "linear", "loss__chunk_tokens": 50}
ONCE = {**LINEAR, "loss__recompute_logits": False}
UNTIED = {"model__share_embeddings_and_output_weights": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "dp 2": (2, {}),
    "tp 2": (2, {"parallel__tp": 2}),
    "tp 2, sequence parallel": (2, TP_SP),
    "pp 2": (2, {"parallel__pp": 2}),
    "cp 2": (2, {"parallel__cp": 2}),
    "logits once, one rank": (1, ONCE),
    "logits once, tp 2, sequence parallel": (2, {**TP_SP, **ONCE}),
    "logits once, pp 2, microbatches of 1": (2, {"parallel__pp": 2, "train__micro_batch": 1, **ONCE}),
}
MODELS = {"tied": {}, "untied": UNTIED, "mtp": MTP}


# Prediction heads run through the same head; their own layers have tests of their own.
NAMES = {
    "one rank": MODELS,
    "tp 2, sequence parallel": MODELS,
    "pp 2": ("tied", "untied"),
    "logits once, one rank": ("untied",),
    "logits once, tp 2, sequence parallel": ("mtp",),
}


@pytest.fixture(scope="module")
def with_logits(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Metrics]]:
    """Each model, trained by the loss on logits on one rank."""
    folder = tmp_path_factory.mktemp("logits")
    runs = [tiny_config(prefix, folder / name, train__steps=4, **SHAPING, **MODELS[name]) for name in MODELS]
    return dict(zip(MODELS, ranks.run(1, one_by_one, train, runs)[0], strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_trains_like_the_loss_on_logits(ranks, prefix, tmp_path, with_logits, name):
    world_size, layout = LAYOUTS[name]
    names = NAMES.get(name, ("tied",))
    models = {model: MODELS[model] for model in names}
    runs = [
        tiny_config(prefix, tmp_path / model, train__steps=4, **{**SHAPING, **LINEAR, **layout, **models[model]})
        for model in models
    ]
    for model, metrics in zip(models, ranks.run(world_size, one_by_one, train, runs)[0], strict=True):
        assert_close_metrics(metrics, with_logits[model], TOLERANCES)


def test_bf16_stays_close_to_the_loss_on_logits(ranks, prefix, tmp_path):
    common = {**SHAPING, **TP_SP, "train__steps": 4, "train__precision": "bf16"}
    logits, linear, once = (
        run_tiny(ranks, 2, tiny_config(prefix, tmp_path / str(len(impl)), **common, **impl))
        for impl in ({}, LINEAR, ONCE)
    )
    for metrics in (linear, once):
        assert_close_metrics(metrics, logits, {"loss": 1e-3, "ce": 1e-3, "grad_norm": 1e-2})


def outputs(rank: int, world_size: int, settings: Settings, loss_mask: torch.Tensor) -> list[torch.Tensor]:
    """What the model returns with labels, without, and with them and a mask, with and without a gradient."""
    with pretraining(settings, world_size) as run:
        tokens = torch.arange(loss_mask.numel()).view(loss_mask.shape)
        positions = torch.arange(loss_mask.shape[1]).expand_as(tokens)
        masked = {"labels": tokens, "loss_mask": loss_mask}
        found = []
        for arguments, recording in (({"labels": tokens}, True), ({}, True), (masked, True), (masked, False)):
            with torch.set_grad_enabled(recording):
                found.append(run.chunks[0](tokens, positions, None, **arguments).detach())
        return found


@pytest.mark.parametrize("impl, shape", [(LINEAR, (2, 64)), (ONCE, ())], ids=["twice", "once"])
def test_the_model_returns_logits_without_labels_and_a_sum_where_its_gradient_comes_first(
    ranks, prefix, tmp_path, impl, shape
):
    loss_mask = (torch.arange(128).view(2, 64) % 3 == 0).float()
    settings = tiny_config(prefix, tmp_path, **impl)
    labelled, logits, recorded, unrecorded = ranks.run(1, outputs, settings, loss_mask)[0]
    assert logits.shape == (2, 64, 512) and recorded.shape == shape
    torch.testing.assert_close(unrecorded, labelled)
    total = recorded if shape == () else (recorded * loss_mask).sum()
    torch.testing.assert_close(total, (labelled * loss_mask).sum())


def main_grad(rank: int, world_size: int, settings: Settings, fused: bool) -> torch.Tensor:
    """Of the tied matrix after one microbatch, through Megatron's hooks or added by the loss itself."""
    with pretraining(settings, world_size) as run:
        from megatron_ptrl.training import loop, mcore

        model = mcore.unwrap(run.chunks[0])
        model.config.gradient_accumulation_fusion = fused
        run.chunks[0].zero_grad_buffer()
        output, loss = loop.forward_step(run._batches(), run.chunks[0])
        loss(output)[0].backward()
        return model.shared_embedding_or_output_weight().main_grad.clone()


@pytest.mark.parametrize("heads", [LINEAR, {**LINEAR, **MTP}, {**ONCE, **MTP}], ids=["", "mtp", "mtp, logits once"])
def test_fused_accumulation_gives_the_same_gradient_of_a_tied_matrix(ranks, prefix, tmp_path, heads):
    settings = tiny_config(prefix, tmp_path, **heads)
    plain, fused = (ranks.run(1, main_grad, settings, fused)[0] for fused in (False, True))
    assert plain.norm() > 0
    torch.testing.assert_close(fused, plain)


def refusal_and_plan(rank: int, world_size: int, settings: Settings) -> tuple[str, list[float]]:
    """What is said about deferred gradients of the embedding; the dry run's bytes of logits, made twice and once."""
    from dataclasses import replace

    config = parsed(settings)
    from megatron_ptrl.training import plan
    from megatron_ptrl.training.layout import check_layout

    layout = check_layout(config, 2)
    count = plan.count_parameters(config.model, 512, 128)
    logits = [
        plan.memory_per_rank(replace(config, loss=loss), layout, count, 512)["logits"]
        for loss in (config.loss, replace(config.loss, recompute_logits=False))
    ]
    try:
        check_layout(replace(config, model=replace(config.model, defer_embedding_wgrad_compute=True)), 2)
    except InputError as error:
        return str(error), logits
    return "", logits


def test_deferred_gradients_are_refused_and_the_plan_counts_one_chunk(ranks, prefix, tmp_path):
    said, logits = ranks.run(1, refusal_and_plan, tiny_config(prefix, tmp_path, **LINEAR, parallel__pp=2))[0]
    assert said.startswith("loss.impl is linear with model.defer_embedding_wgrad_compute")
    assert logits == [50 * 512 * 4, (50 + 64) * 512 * 4]
