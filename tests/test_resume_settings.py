"""What a resumed run takes from its checkpoint and what from its config, and the layouts that pad gradient buckets."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import RankError, Ranks
from sidecars import any_values, write_sidecar
from tiny import Settings, pretraining, read_metrics, run_tiny, tiny_config

from megatron_ptrl.config import TokenizeConfig
from megatron_ptrl.data.tokenize_stage import run as tokenize


def saved_at(run: Path, step: int, copy: Path) -> Path:
    """A copy of the run directory as it was when `step` was saved."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name > f"step_{step:08d}":
            shutil.rmtree(path)
    return copy


@pytest.fixture(scope="module")
def run_of_four(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps on one rank, saved every second one."""
    folder = tmp_path_factory.mktemp("four") / "run"
    run_tiny(ranks, 1, tiny_config(prefix, folder, train__steps=4, checkpoint__save_every=2, log__tensorboard=False))
    return folder


def resumed(ranks: Ranks, prefix: str, run: Path, copy: Path, **changes: Any) -> tuple[list[dict], str]:
    settings = tiny_config(prefix, saved_at(run, 2, copy), train__steps=4, checkpoint__save_every=2, **changes)
    metrics = run_tiny(ranks, 1, settings)
    return metrics, (copy / "log.txt").read_text()


def test_resume_is_exact_where_buckets_are_padded(ranks, prefix, tmp_path):
    """A tied embedding over pipeline stages has a bucket of its own, which dp 3 pads."""
    common = {"parallel__pp": 2, "train__global_batch": 6, "train__micro_batch": 1, "optimizer__lr": 3e-3}
    settings = tiny_config(prefix, tmp_path / "whole", train__steps=4, checkpoint__save_every=2, **common)
    whole = run_tiny(ranks, 6, settings)
    copy = saved_at(tmp_path / "whole", 2, tmp_path / "copy")
    assert run_tiny(ranks, 6, {**settings, "run_dir": str(copy)}) == whole


def test_resume_under_overlapped_gathering_is_exact(ranks, prefix, tmp_path):
    """The weights of a checkpoint are those after the step, also where the other ranks' share comes late."""
    overlap = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
    common = {"train__precision": "bf16", "train__steps": 4, "checkpoint__save_every": 2, "optimizer__lr": 3e-3}
    settings = tiny_config(prefix, tmp_path / "whole", **common, **overlap)
    whole = run_tiny(ranks, 2, settings)
    copy = saved_at(tmp_path / "whole", 2, tmp_path / "copy")
    assert run_tiny(ranks, 2, {**settings, "run_dir": str(copy)}) == whole


def test_the_rate_of_a_resumed_run_is_that_of_its_config(ranks, prefix, run_of_four, tmp_path):
    changes = {"optimizer__lr": 1e-5, "optimizer__min_lr": 1e-5, "optimizer__schedule": "constant"}
    metrics, log = resumed(ranks, prefix, run_of_four, tmp_path / "run", **changes)
    assert [row["learning_rate"] for row in metrics[2:]] == [1e-5, 1e-5]
    assert "optimizer.lr was 0.002, from here on it is 1e-05" in log


def test_a_changed_loss_is_noted_and_used(ranks, prefix, run_of_four, tmp_path):
    metrics, log = resumed(ranks, prefix, run_of_four, tmp_path / "run", loss__beta=0.5)
    assert metrics[2]["loss"] != metrics[2]["ce"] and metrics[1]["loss"] == metrics[1]["ce"]
    assert "loss.beta was 0.0, from here on it is 0.5" in log


def test_side_cars_are_compared_by_their_values_and_not_by_their_place(ranks, prefix, tmp_path):
    first = write_sidecar(prefix, str(tmp_path / "a"), any_values(prefix, 0))
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(first + suffix, str(tmp_path / "moved") + suffix)
    options = {"train__steps": 2, "optimizer__warmup_steps": 1, "remit__weighting": "remit", "model__num_layers": 1}
    for place in ("a", "moved"):
        settings = tiny_config(prefix, tmp_path / "run", **options, remit__sidecar=[str(tmp_path / place)])
        run_tiny(ranks, 1, settings)
    log = tmp_path / "run" / "log.txt"
    assert "continuing from" in log.read_text() and "sidecar" not in log.read_text()
    write_sidecar(prefix, str(tmp_path / "moved"), any_values(prefix, 1))
    run_tiny(ranks, 1, settings)
    assert log.read_text().count("remit.sidecar has other values than when the checkpoint was saved") == 1


def test_another_batch_is_refused(ranks, prefix, run_of_four, tmp_path):
    with pytest.raises(RankError, match=r"train.global_batch 8, this run has 4, and the position in the data"):
        resumed(ranks, prefix, run_of_four, tmp_path / "run", train__global_batch=4)


def test_what_does_not_define_the_model_may_change(ranks, prefix, run_of_four, tmp_path):
    recompute = {
        "model__recompute_granularity": "full",
        "model__recompute_method": "uniform",
        "model__recompute_num_layers": 1,
    }
    metrics, told = resumed(ranks, prefix, run_of_four, tmp_path / "run", **recompute)
    assert metrics == read_metrics(run_of_four)
    assert "model.recompute_granularity was None, from here on it is full" in told


@pytest.mark.parametrize("start", ["run_dir", "checkpoint.load"])
def test_another_network_of_the_same_shapes_is_refused(ranks, prefix, run_of_four, tmp_path, start):
    other = {"model__rotary_interleaved": True}
    with pytest.raises(RankError, match=r"holds a model with rotary_interleaved False, this run has True"):
        if start == "run_dir":
            resumed(ranks, prefix, run_of_four, tmp_path / "run", **other)
        else:
            settings = tiny_config(prefix, tmp_path / "run", checkpoint__load=str(run_of_four), **other)
            run_tiny(ranks, 1, settings)


def test_another_tokenizer_of_the_same_size_is_refused(ranks, prefix, run_of_four, tmp_path):
    source = tmp_path / "other.jsonl"
    source.write_text("".join(json.dumps({"text": "el perro come pan y agua " * n}) + "\n" for n in range(1, 200)))
    vocab = json.loads(Path(prefix + ".json").read_text())["vocab_size"]
    other = json.loads(Path(prefix + ".tokenizer.json").read_text())
    merges = other["model"]["merges"]
    other["model"]["merges"] = [*merges[:-2], merges[-1], merges[-2]]
    (tmp_path / "swapped.json").write_text(json.dumps(other))
    output = str(tmp_path / "other")
    tokenize(TokenizeConfig(input=[str(source)], output=output, tokenizer=str(tmp_path / "swapped.json")))
    assert json.loads(Path(output + ".json").read_text())["vocab_size"] == vocab
    copy = saved_at(run_of_four, 2, tmp_path / "run")
    with pytest.raises(RankError, match="was trained with another tokenizer"):
        run_tiny(ranks, 1, tiny_config(output, copy, train__steps=4))


def test_repeating_a_complete_run_leaves_its_config(ranks, prefix, run_of_four, tmp_path):
    shutil.copytree(run_of_four, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    run_tiny(ranks, 1, tiny_config(prefix, tmp_path / "run", train__steps=4, loss__beta=0.5))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def bad_data_on_one_rank(rank: int, world_size: int, settings: Settings) -> tuple[str, str]:
    """(class and rank of what each rank raises, when only the second one's share of the data is bad)."""
    from unittest.mock import patch

    from megatron_ptrl.errors import InputError

    with pretraining(settings, world_size) as run:
        config, layout, tokenizer = run.config, run.layout, run.tokenizer
    from megatron_ptrl.training import mcore, pretrain

    def fails(self: Any) -> None:
        if rank == 1:
            raise InputError("token id 999999 in sample 3")

    with (
        patch.object(pretrain, "_check", lambda *_: (layout, tokenizer)),
        patch.object(pretrain.Pretraining, "run", fails),
        patch.object(mcore, "shutdown", lambda: None),
    ):
        try:
            pretrain.run(config)
        except InputError as error:
            return str(error), str(error.rank)
    return "", ""


def test_an_error_of_one_rank_carries_its_number(ranks, prefix, tmp_path):
    results = ranks.run(2, bad_data_on_one_rank, tiny_config(prefix, tmp_path))
    assert results == [("", ""), ("token id 999999 in sample 3", "1")]
