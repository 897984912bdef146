"""A weighted step against fp64 from the logits of both models, and what must leave it as it was."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, Ranks
from stage_runs import one_by_one
from test_rho1 import by_hand
from tiny import Metrics, Settings, assert_close_metrics, parsed, pretraining, run_tiny, tiny_config, train

from megatron_ptrl import reference
from megatron_ptrl.config import RewardShaping

SEEN = ("loss", "ce", "remit_weight_mean", "remit_gap", "reference_ce", "grad_norm", "num_tokens")
SHAPES = {
    "remit by row": {},
    "remit by document, shaped": {
        "remit__center": "document",
        "remit__epsilon": 0.1,
        "data__isolate_documents": True,
        "loss__beta": -0.25,
        "loss__lambda_tail": -0.1,
        "loss__top_k": 20,
    },
    "remit, linear head": {"loss__impl": "linear", "loss__chunk_tokens": 48},
    "rho1 by document": {"remit__weighting": "rho1", "remit__center": "document", "data__isolate_documents": True},
    "remit with heads for later tokens": {"model__mtp_num_layers": 1},
}


@pytest.fixture(scope="module")
def opinion(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run directory of a reference of another size that has learned a little: gaps on both sides of the clip.

    It was trained with dropout, which must not be drawn when it is only asked.
    """
    run_dir = tmp_path_factory.mktemp("opinion") / "run"
    size = {
        "model__num_layers": 4,
        "model__hidden_size": 32,
        "model__num_attention_heads": 2,
        "model__hidden_dropout": 0.1,
    }
    run_tiny(ranks, 1, tiny_config(prefix, run_dir, train__steps=6, optimizer__lr=8e-3, **size))
    return str(run_dir)


def weighted(prefix: str, run_dir: Path, opinion: str, **options: Any) -> Settings:
    known = {"remit__weighting": "remit", "remit__reference": opinion, "train__steps": 3}
    return tiny_config(prefix, run_dir, **{**known, **options})


def step_and_truth(rank: int, world_size: int, runs: list[Settings]) -> list[tuple[Metrics, Metrics]]:
    """The figures of each run's first step, and the same from logits in fp64."""
    from megatron.core import parallel_state

    found = []
    for settings in runs:
        with pretraining(settings, world_size) as run:
            truth = by_logits(run)
            run._begin()
            found.append((run._step(), truth))
        parallel_state.destroy_model_parallel()
    return found


def by_logits(run: Any) -> Metrics:
    """All rows of the first step at once; the gradient of the main loss by autograd, without Megatron's hooks."""
    from megatron_ptrl.training.mcore import unwrap

    config, batches = run.config, run._batches()
    rows = [next(batches) for _ in range(run.layout.num_microbatches)]
    batch = {name: torch.cat([row[name] for row in rows]) for name, x in rows[0].items() if x is not None}
    inputs = (batch["tokens"], batch["position_ids"], batch.get("attention_mask"))
    labels, mask = batch["labels"], batch["loss_mask"].double()
    model = unwrap(run.chunks[0])
    heads, model.config.mtp_num_layers = model.config.mtp_num_layers, None
    # Without that number the logits of the other heads follow those of the main one.
    logits = model(*inputs)[:, : labels.shape[1], : run.tokenizer.vocab_size].double()
    model.config.mtp_num_layers = heads
    with torch.no_grad():
        theirs = run.reference._chunks[0](*inputs).double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    mine = logits.detach().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    ids = batch.get("document_ids")
    remit, loss = config.remit, config.loss
    if remit.weighting == "rho1":
        weights = by_hand(mine, theirs, mask, remit.keep, ids).double()
    else:
        weights = reference.remit_weights(mine, theirs, mask, remit.epsilon, ids)
    shaping = RewardShaping(loss.beta, loss.lambda_head, loss.lambda_tail, min(loss.top_k, run.tokenizer.vocab_size))
    per_token = reference.reward_shaped_cross_entropy(logits, labels, shaping)
    divisor = (weights * mask).sum() if remit.weighting == "rho1" else mask.sum()
    total = (weights * per_token * mask).sum() / divisor
    gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    assert 0 < mask.sum() and (ids is None or mask.sum() < mask.numel())

    def mean(x: torch.Tensor) -> float:
        return float((x * mask).sum() / mask.sum())

    truth = {"step": 1, "loss": float(total), "ce": -mean(mine), "num_tokens": float(mask.sum()), "grad_norm": norm}
    truth |= {"remit_weight_mean": mean(weights), "remit_gap": mean(theirs - mine), "reference_ce": -mean(theirs)}
    if remit.weighting == "remit":
        low, high = 1 - remit.epsilon, 1 + remit.epsilon
        truth |= {"remit_low_share": mean(weights == low), "remit_high_share": mean(weights == high)}
        kept = weights[mask == 1]
        bins = torch.histc(kept, 10, low, high) / mask.sum()
        truth |= {f"remit_weight_bin_{i}": float(share) for i, share in enumerate(bins)}
    return truth


def test_a_step_is_that_of_fp64(ranks, prefix, tmp_path, opinion):
    runs = [weighted(prefix, tmp_path / str(i), opinion, **more) for i, more in enumerate(SHAPES.values())]
    for name, (seen, truth) in zip(SHAPES, ranks.run(1, step_and_truth, runs)[0], strict=True):
        # fp32 logits of a few units: 1e-6 a token, less on average. Heads for later tokens have gradients of their own.
        figures = [figure for figure in SEEN if figure != "grad_norm" or "heads" not in name]
        assert_close_metrics([seen], [truth], dict.fromkeys(figures, 2e-5))
        if "rho1" in name:
            assert 0.75 < truth["remit_weight_mean"] < 0.85 and truth["loss"] > truth["ce"] + 0.01
            continue
        assert min(truth["remit_low_share"], truth["remit_high_share"]) > 0.01, "both edges are reached"
        assert truth["remit_low_share"] + truth["remit_high_share"] < 0.9, "and much lies between them"
        for figure in truth:
            if "share" in figure or "bin" in figure:
                assert abs(seen[figure] - truth[figure]) < 1.5 / truth["num_tokens"], figure


def test_a_reference_that_is_the_model_changes_nothing(ranks, prefix, tmp_path, opinion):
    """And an epsilon of 0 never does, not even what dropout draws, with the reference's weights kept elsewhere."""
    start = {
        "checkpoint__load": opinion,
        "model__hidden_size": 32,
        "model__num_attention_heads": 2,
        "train__steps": 4,
    }
    noisy = {"train__steps": 4, "model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
    plain, same, half, plain_noisy, unweighted = ranks.run(
        1,
        one_by_one,
        train,
        [
            weighted(prefix, tmp_path / "0", opinion, **start, remit__weighting="none"),
            weighted(prefix, tmp_path / "1", opinion, **start),
            weighted(prefix, tmp_path / "2", opinion, **start, remit__weighting="rho1", remit__keep=0.5),
            weighted(prefix, tmp_path / "3", opinion, **noisy, remit__weighting="none"),
            weighted(prefix, tmp_path / "4", opinion, **noisy, remit__epsilon=0.0, remit__offload_reference=True),
        ],
    )[0]
    assert "remit.reference is not used: remit.weighting is none" in (tmp_path / "0" / "log.txt").read_text()
    for rows in (same, half):
        assert {name: rows[0][name] for name in plain[0]} == plain[0]
        assert (rows[0]["remit_weight_mean"], rows[0]["remit_gap"]) == (1.0, 0.0)
        assert abs(rows[-1]["remit_gap"]) > 1e-3, "the model has moved away"
    assert 0.5 <= half[-1]["remit_weight_mean"] < 0.7, "more than half where tokens tie"
    assert [{name: row[name] for name in plain_noisy[0]} for row in unweighted] == plain_noisy
    assert unweighted[0]["remit_gap"] != 0


def test_a_run_continues_exactly_with_its_tokens(ranks, prefix, tmp_path, opinion):
    theirs = tmp_path / "opinion"
    shutil.copytree(opinion, theirs)
    settings = weighted(
        prefix, tmp_path / "run", str(theirs), train__steps=6, checkpoint__save_every=3, model__hidden_dropout=0.1
    ) | {"log.every": 2}
    whole = run_tiny(ranks, 1, settings)
    tokens = (tmp_path / "run" / "token_weights.jsonl").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    # The reference's own run goes on, and at last drops the checkpoint that was used.
    used, newer = theirs / "checkpoints" / "step_00000006", theirs / "checkpoints" / "step_00000009"
    shutil.copytree(used, newer)
    assert run_tiny(ranks, 1, settings) == whole
    assert (tmp_path / "run" / "token_weights.jsonl").read_text() == tokens
    shutil.rmtree(used)
    run_tiny(ranks, 1, settings)
    notes = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "weights of tokens" in line]
    comes = "the weights of tokens come from {}".format
    gone = f"{used} gave the weights of tokens so far and is gone"
    assert notes == [comes(used), comes(used), gone, comes(newer)]
    lines = [json.loads(line) for line in tokens.splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6]
    for line in lines:
        assert {len(line[name]) for name in ("text", "weight", "gap", "loss_mask")} == {64}
        order = sorted(range(64), key=lambda i: (line["weight"][i], line["gap"][i]))
        assert [token["position"] for token in line["lowest"]] == order[:10]
        assert [token["position"] for token in line["highest"]] == order[:-11:-1]
        assert all(token["text"] == line["text"][token["position"]] for token in line["highest"])
        gap = torch.tensor(line["gap"], dtype=torch.float64)
        expected = (2 * (gap - gap.mean()).sigmoid()).clamp(0.8, 1.2)
        torch.testing.assert_close(torch.tensor(line["weight"], dtype=torch.float64), expected, rtol=0, atol=1e-6)


def spoilt(rank: int, world_size: int, settings: Settings) -> list[Any]:
    """Weights and sums of a batch without a token in the loss; what a reference of NaN is told."""
    from megatron_ptrl.errors import InputError

    with pretraining(settings, world_size) as run:
        x, batch = torch.full((2, 8), -1.0), {"loss_mask": torch.zeros(2, 8), "labels": torch.zeros(2, 8).long()}
        batch["online_reference_logprob"] = torch.full((2, 8), torch.nan)
        weights, sums = run.weighting.weigh(x, batch)
        next(run.reference._chunks[0].parameters()).data.fill_(torch.nan)
        try:
            run._begin()
            run._step()
        except InputError as error:
            return [weights.tolist(), [float(value) for value in sums], str(error)]
    return []


def test_rows_without_tokens_and_a_reference_that_is_not_finite(ranks, prefix, tmp_path, opinion):
    weights, sums, error = ranks.run(1, spoilt, weighted(prefix, tmp_path, opinion))[0]
    assert weights == [[0.0] * 8] * 2 and sums == [0.0] * 15
    assert f"remit, {opinion}: logprob or reference_logprob is not finite at an unmasked token of row 0" in error


def check(rank: int, world_size: int, settings: Settings) -> str:
    """What is refused before anything is built, or the plan of a dry run."""
    config = parsed(settings)
    from megatron_ptrl.training import pretrain

    pretrain._check(config, world_size)
    return pretrain._dry_run(config, world_size)


def test_references_that_cannot_work_are_refused_and_others_planned(ranks, prefix, tmp_path, opinion):
    def refused(said: str, **options: Any) -> None:
        with pytest.raises(RankError, match=said):
            ranks.run(1, check, weighted(prefix, tmp_path / "run", opinion, **options))

    refused("remit.reference is .*none, and there is no such folder", remit__reference=str(tmp_path / "none"))
    refused("remit.weighting is remit with loss.impl megatron", loss__impl="megatron")
    refused(
        "remit.weighting is remit with loss.recompute_logits false", loss__impl="linear", loss__recompute_logits=False
    )
    foreign = tmp_path / "foreign"
    shutil.copytree(Path(opinion) / "checkpoints", foreign)
    manifest = foreign / "step_00000006" / "run.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer": "', '"tokenizer": "0'))
    refused("remit.reference: .* was trained with another tokenizer", remit__reference=str(foreign))
    plan = ranks.run(1, check, weighted(prefix, tmp_path / "run", opinion))[0]
    assert "reference 0.00" in plan and f"remit, epsilon 0.2, by row, reference {opinion}" in plan
