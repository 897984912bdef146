"""Save and load: exact on the same layout, the same training on another, and never a silent start from nothing."""

import multiprocessing
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_adam import FusedAdam
from ranks import RankError
from saved_run import SAVED, STEPS, copy_until
from tiny import Settings, assert_close_metrics, pretraining, read_metrics, run_tiny, tiny_config

DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain, fp32": (1, {"parallel__distributed_optimizer": False}),
    "plain, bf16": (1, {"parallel__distributed_optimizer": False, "train__precision": "bf16"}),
    "distributed, fp32, dp 2": (2, {}),
    "distributed, bf16, dp 2": (2, {"train__precision": "bf16"}),
    "distributed, bf16, tp 2 sp": (
        2,
        {"train__precision": "bf16", "parallel__tp": 2, "parallel__sequence_parallel": True},
    ),
    "distributed, fp32, pp 2 interleaved": (2, {"parallel__pp": 2, "parallel__vpp": 2}),
}


def tensors(state: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of a nested state by its path."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return {name: state.detach().clone() if isinstance(state, torch.Tensor) else state}
    return {path: leaf for key, value in items for path, leaf in tensors(value, f"{name}/{key}").items()}


def everything(run: Any) -> dict[str, Any]:
    """All that a later step depends on, by path."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    parts = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    mains = [
        [main for group in getattr(part, name, []) for main in group if main is not None]
        for part in parts
        for name in ("fp32_from_float16_groups", "shard_fp32_from_float16_groups")
    ]
    order = [[p for group in part.optimizer.param_groups for p in group["params"]] for part in parts]
    state = {
        "weights": [dict(chunk.module.named_parameters()) for chunk in run.chunks],
        "main weights": mains,
        "moments": [[dict(part.optimizer.state[p]) for p in ps] for part, ps in zip(parts, order, strict=True)],
        # A load leaves a "step" in the groups, which nothing reads: torch's Adam counts in the moments.
        "rates": [[{**group, "params": None, "step": None} for group in part.optimizer.param_groups] for part in parts],
        "scheduler": run.scheduler.state_dict(),
        "random": [torch.get_rng_state(), get_cuda_rng_tracker().get_states()],
        "progress": [run.progress.step, run.progress.consumed_samples],
    }
    return tensors(state)


def saved_and_loaded(rank: int, world_size: int, settings: Settings) -> tuple[list[str], int]:
    """(paths of what differs after a save and a load, number of leaves compared)."""
    with pretraining(settings, world_size) as run:
        run._begin()
        for _ in range(SAVED):
            run._step()
        run._save()
        before = everything(run)
    with pretraining(settings, world_size) as run:
        after = everything(run)
    unequal = [
        path
        for path in before.keys() | after.keys()
        if not (path in before and path in after and _equal(before[path], after[path]))
    ]
    return sorted(unequal), len(before)


def loads_into_a_fused_adam(rank: int, world_size: int) -> Any:
    """The step that reaches an optimizer of Apex's kind from a checkpoint that torch's wrote."""
    from megatron_ptrl.training.optimizer import load_optimizer

    inner = FusedAdam([torch.nn.Parameter(torch.ones(2))], 1e-3, 0.1, (0.9, 0.95), 1e-8, adam_w_mode=True)
    loaded: list[dict[str, Any]] = []
    part = SimpleNamespace(optimizer=inner, param_groups=inner.param_groups, load_state_dict=loaded.append)
    load_optimizer(part, {"optimizer": {"param_groups": [{"step": 3.0}]}, "param_state": {}})  # type: ignore[arg-type]
    return loaded[0]["optimizer"]["param_groups"][0]["step"]


def test_a_fused_adam_gets_a_whole_step(ranks):
    assert repr(ranks.run(1, loads_into_a_fused_adam)[0]) == "3"


def processes_that_a_save_leaves(rank: int, world_size: int, settings: Settings) -> list[str]:
    before = multiprocessing.active_children()
    with pretraining(settings, world_size) as run:
        run._begin()
        run._step()
        run._save()
        return [child.name for child in multiprocessing.active_children() if child not in before]


def test_a_save_leaves_no_process(ranks, prefix, tmp_path):
    settings = tiny_config(prefix, tmp_path)
    assert ranks.run(1, processes_that_a_save_leaves, settings) == [[]]


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_restores_every_tensor_counter_and_random_state(ranks, prefix, tmp_path, kind):
    world_size, options = KINDS[kind]
    settings = tiny_config(prefix, tmp_path, train__steps=STEPS, **DROPOUT, **options)
    for unequal, count in ranks.run(world_size, saved_and_loaded, settings):
        assert unequal == []
        assert count > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_run_is_bitwise_the_uninterrupted_one(ranks, prefix, tmp_path, kind):
    world_size, options = KINDS[kind]
    common = {"train__steps": STEPS, "checkpoint__save_every": SAVED, **DROPOUT, **options}
    settings = tiny_config(prefix, tmp_path / "run", **common)
    whole = run_tiny(ranks, world_size, settings)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    continued = run_tiny(ranks, world_size, settings)
    assert "continuing from" in (tmp_path / "run" / "log.txt").read_text()
    assert continued == whole and len(whole) == STEPS


OTHER_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp 2": (2, {"parallel__pp": 2}),
    "pp 2 interleaved": (2, {"parallel__pp": 2, "parallel__vpp": 2}),
    "1 rank": (1, {}),
    "dp 2": (2, {}),
    "tp 2, pp 2, sp": (4, {"parallel__tp": 2, "parallel__pp": 2, "parallel__sequence_parallel": True}),
}


def save_on_a_full_disk(rank: int, world_size: int, settings: Settings, largest: int) -> str:
    """What a run tells that finds no room for files of more than `largest` bytes when it saves for the second time."""
    from megatron_ptrl.errors import InputError

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pretraining(settings, world_size) as run:
        save = run._save

        def save_with_less_room() -> None:
            if run.progress.step > SAVED:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
            save()

        run._save = save_with_less_room
        try:
            run.run()
        except (InputError, SystemExit) as end:
            return str(end)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    raise AssertionError("it was saved")


# Too little for the common state, which rank 0 alone writes, and for the tensors.
@pytest.mark.parametrize("world_size, largest", [(1, 10), (2, 100_000)])
def test_a_full_disk_is_told_in_one_line_and_the_same_command_goes_on(ranks, prefix, tmp_path, world_size, largest):
    settings = tiny_config(prefix, tmp_path / "run", train__steps=STEPS, checkpoint__save_every=SAVED)
    told, *others = ranks.run(world_size, save_on_a_full_disk, settings, largest)
    folder = tmp_path / "run" / "checkpoints"
    assert told.startswith(f"checkpoint {folder}/step_00000008 was not saved (") and "\n" not in told
    assert "MiB free there): a file was cut short; " in told
    assert f"{folder}/step_00000004, which takes " in told and " MiB, is whole. Make room" in told
    assert others == ["2"] * (world_size - 1), "told once"
    assert [path.name for path in folder.iterdir()] == ["step_00000004"], "nothing that keeps the disk full"
    assert len(run_tiny(ranks, world_size, settings)) == STEPS
    assert (folder / "step_00000008" / "run.json").is_file()


# The moments matter: with Adam starting anew the losses of the following steps differ in the third digit.
@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_another_layout_continues_with_the_same_training(ranks, prefix, tmp_path, saved_run, name):
    world_size, layout = OTHER_LAYOUTS[name]
    folder = copy_until(saved_run, tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    continued = run_tiny(ranks, world_size, tiny_config(prefix, folder, train__steps=STEPS, **layout))
    assert "the random state of dropout starts anew" in (folder / "log.txt").read_text()
    whole = read_metrics(saved_run)[SAVED:]
    assert_close_metrics(continued, whole, {"loss": 1e-6, "entropy": 1e-6, "learning_rate": 0.0, "grad_norm": 1e-4})


def test_only_the_wanted_checkpoints_stay(ranks, prefix, tmp_path):
    options = {"train__steps": 7, "checkpoint__save_every": 1, "checkpoint__keep_every": 3, "checkpoint__keep_last": 2}
    run_tiny(ranks, 1, tiny_config(prefix, tmp_path, **options, model__num_layers=1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in (3, 6, 7)
    ]


def test_a_checkpoint_of_another_model_is_refused_by_the_fields_name(ranks, prefix, tmp_path, saved_run):
    folder = copy_until(saved_run, tmp_path / "run")
    for field, value, saved in (("num_layers", 2, 4), ("qk_layernorm", False, True), ("num_moe_experts", 4, None)):
        with pytest.raises(RankError, match=f"InputError.*{field} {saved}, this run has {value}"):
            run_tiny(ranks, 1, tiny_config(prefix, folder, **{f"model__{field}": value}))


@pytest.mark.parametrize("masked", [False, True])
def test_a_vocabulary_that_another_layout_pads_otherwise(ranks, prefix, tmp_path, masked):
    """512 tokens padded to 513, then to 684: refused, as the loss would jump, unless the padding is not part of it."""
    common = {"train__steps": STEPS, "checkpoint__save_every": SAVED, "model__make_vocab_size_divisible_by": 171}
    common |= {"loss__mask_padding": masked, "loss__impl": "linear"}
    whole = run_tiny(ranks, 1, tiny_config(prefix, tmp_path / "run", **common))
    folder = copy_until(tmp_path / "run", tmp_path / "copy")
    (folder / "metrics.jsonl").unlink()
    settings = tiny_config(prefix, folder, parallel__tp=2, **common)
    if masked:
        continued = run_tiny(ranks, 2, settings)
        assert_close_metrics(continued, whole[SAVED:], {"loss": 1e-6, "entropy": 1e-6, "grad_norm": 1e-4})
        return
    for each in (settings, settings | {"run_dir": str(tmp_path / "new"), "checkpoint.load": str(folder)}):
        with pytest.raises(RankError, match="InputError.*vocabulary of 512 padded to 513, and parallel.tp 2 .* to 684"):
            run_tiny(ranks, 2, each)


def test_a_checkpoint_of_the_other_optimizer_is_refused(ranks, prefix, tmp_path, saved_run):
    folder = copy_until(saved_run, tmp_path / "run")
    with pytest.raises(RankError, match="InputError.*distributed_optimizer true, this run has false"):
        run_tiny(ranks, 1, tiny_config(prefix, folder, parallel__distributed_optimizer=False))


def first_weights(rank: int, world_size: int, settings: Settings) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """(weights before the first step, whether each fp32 main weight rounds to the weight it belongs to)."""
    with pretraining(settings, world_size) as run:
        assert run.progress.step == 0
        weights = {name: p.detach().clone() for name, p in run.chunks[0].module.named_parameters()}
        parts = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
        pairs = [
            (weight, main)
            for part in parts
            for weights_of, mains_of in zip(
                getattr(part, "float16_groups", []), getattr(part, "fp32_from_float16_groups", []), strict=True
            )
            for weight, main in zip(weights_of, mains_of, strict=True)
        ]
        return weights, [torch.equal(main.to(weight.dtype), weight) for weight, main in pairs]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_runs_weights_start_a_new_run_main_copies_included(ranks, prefix, tmp_path, saved_run, precision):
    common = {"parallel__distributed_optimizer": False, "train__precision": precision, "train__seed": 99}
    fresh, _ = ranks.run(1, first_weights, tiny_config(prefix, tmp_path / "fresh", **common))[0]
    for source in (saved_run, saved_run / "checkpoints", saved_run / "checkpoints" / f"step_{STEPS:08d}"):
        settings = tiny_config(prefix, tmp_path / "new", **common, checkpoint__load=str(source))
        loaded, main_is_copy = ranks.run(1, first_weights, settings)[0]
        assert all(not torch.equal(loaded[name], fresh[name]) for name in loaded if loaded[name].dim() == 2)
        assert all(main_is_copy) and len(main_is_copy) == (len(loaded) if precision == "bf16" else 0)


def loads_into_norms_with_extra_state(rank: int, world_size: int, settings: Settings) -> list[str]:
    """Norms as of Transformer Engine's: they have extra state. Loads the weights; the names that were asked for."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_ptrl.training import checkpoint

    class Norm(torch.nn.RMSNorm):
        def get_extra_state(self) -> torch.Tensor:
            return torch.empty(0)

        def set_extra_state(self, state: Any) -> None:
            assert state is None or state.numel() == 0

    source = settings.pop("checkpoint.load")
    with pretraining(settings, world_size) as run:
        model = run.chunks[0].module
        for layer in model.decoder.layers:
            attention = layer.self_attention
            attention.q_layernorm, attention.k_layernorm = Norm(16), Norm(16)
        model.decoder.final_layernorm = Norm(64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        checkpoint.load_weights(Path(source), run.chunks)
        assert all(not bool((parameter == 7).any()) for parameter in model.parameters())
        wanted = model.sharded_state_dict(prefix="", metadata={})
        return [each.unique_key for each in wanted.values() if isinstance(each, ShardedObject)]


def test_weights_load_into_a_model_whose_norms_have_extra_state(ranks, prefix, tmp_path, saved_run):
    source = saved_run / "checkpoints" / f"step_{STEPS:08d}"
    settings = tiny_config(prefix, tmp_path, checkpoint__load=str(source))
    names = ranks.run(1, loads_into_norms_with_extra_state, settings)[0]
    assert "decoder.final_layernorm._extra_state/shard_0_1" in names
    assert "decoder.layers.self_attention.q_layernorm._extra_state/shard_3_4" in names


def test_a_new_run_trains_on_from_another_runs_weights(ranks, prefix, tmp_path, saved_run):
    options = {"checkpoint__load": str(saved_run), "train__steps": 3, "optimizer__warmup_steps": 0}
    new = run_tiny(ranks, 1, tiny_config(prefix, tmp_path, **options))
    assert [row["step"] for row in new] == [1, 2, 3]
    assert new[0]["loss"] < read_metrics(saved_run)[0]["loss"] - 0.1


def test_weights_that_are_not_there_are_told(ranks, prefix, tmp_path):
    with pytest.raises(RankError, match="InputError.*checkpoint.load is .*nowhere, and there is no such folder"):
        run_tiny(ranks, 1, tiny_config(prefix, tmp_path, checkpoint__load=str(tmp_path / "nowhere")))
