"""Megatron-LM's own script and ours go on with each other's checkpoints: as test_megatron_lm.py, MEGATRON_LM=... pytest

The same documents, split, seed and steps give both the same rows in the same order, so every loss can be compared.
"""

import re
import shutil
from pathlib import Path

import pytest
from megatron_lm_runs import CHECKOUTS, TP, WITHOUT, launch
from test_convert import convert
from tiny import Metrics, run_tiny, tiny_config

pytestmark = pytest.mark.skipif(not CHECKOUTS, reason=WITHOUT)

STEPS, SAVED, BATCH = 6, 3, 8
OF_THE_RUN = f"""--train-iters {STEPS} --global-batch-size {BATCH} --lr 2e-3 --lr-warmup-iters 2 --lr-decay-style cosine
    --weight-decay 0.1 --adam-beta2 0.95 --vocab-size 511 --eval-iters 0 --ckpt-format torch_dist""".split()
OF_THE_MODEL = """--normalization RMSNorm --qk-layernorm --swiglu --disable-bias-linear --group-query-attention
    --num-query-groups 2 --ffn-hidden-size 128""".split()
DISTRIBUTED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
KINDS: dict[str, tuple[int, tuple[str, ...], dict[str, str]]] = {
    "plain optimizer": (1, (), {}),
    "distributed optimizer, tp 2": (2, (*TP, *DISTRIBUTED), {"FUSED_ADAM": "1"}),
}
LINE = re.compile(r" iteration +(\d+)/.* consumed samples: +(\d+) .* lm loss: ([-+.0-9E]+) .* grad norm: ([.0-9]+) ")


def rows_of(outputs: list[str]) -> list[Metrics]:
    """What Megatron-LM's last rank logged, by our names.

    After the first step of a process it does not reset its sum, so that the second figure is the mean of two.
    """
    found = [LINE.search(line) for line in outputs[-1].splitlines() if " lm loss: " in line]
    rows = [
        {"step": int(m[1]), "consumed_samples": int(m[2]), "loss": float(m[3]), "grad_norm": float(m[4])}
        for m in found
        if m
    ]
    rows[1]["loss"] = 2 * rows[1]["loss"] - rows[0]["loss"]
    return rows


def assert_goes_on(actual: list[Metrics], expected: list[Metrics]) -> None:
    """Steps and samples equal, losses to the six printed places, of which one may be taken twice, norms to three."""
    assert [row["step"] for row in actual] == list(range(SAVED + 1, STEPS + 1))
    for mine, whole in zip(actual, expected[SAVED:], strict=True):
        assert (mine["step"], mine["consumed_samples"]) == (whole["step"], whole["consumed_samples"])
        assert mine["loss"] == pytest.approx(whole["loss"], abs=4e-6)
        assert mine["grad_norm"] == pytest.approx(whole["grad_norm"], abs=1.5e-3)


def data_flags(prefix: str, cache: Path) -> list[str]:
    return ["--data-path", prefix, "--split", "90,10,0", "--data-cache-path", str(cache)]


@pytest.mark.parametrize("checkout", CHECKOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_megatron_lm_goes_on_here(checkout, kind, ranks, prefix, tmp_path):
    world_size, layout, environment = KINDS[kind]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    flags = [*OF_THE_MODEL, *OF_THE_RUN, *data_flags(prefix, tmp_path), *layout]
    flags += ["--save", str(theirs), "--save-interval", str(SAVED)]
    whole = rows_of(launch(checkout, "plain", tuple(flags), world_size, **environment))
    told = convert(ranks, theirs / f"iter_{SAVED:07d}", ours, "--tokenizer", f"{prefix}.tokenizer.json")
    assert f"continuing at step {SAVED} after {SAVED * BATCH} samples" in told
    continued = {"config": str(ours / "config.yaml"), "run_dir": str(ours), "data.train": [prefix]}
    continued |= {"train.eval_samples": 0, "log.tensorboard": False, "log.plots": False}
    assert_goes_on(run_tiny(ranks, world_size, continued), whole)


@pytest.mark.parametrize("checkout", CHECKOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_ours_goes_on_there(checkout, kind, ranks, prefix, tmp_path):
    world_size, layout, environment = KINDS[kind]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    settings = tiny_config(prefix, ours, train__steps=STEPS, checkpoint__save_every=SAVED, model__num_layers=2)
    settings |= {"data.split": "90,10", "data.tokenizer": f"{prefix}.tokenizer.json"}
    settings |= {"parallel.tp": world_size, "parallel.distributed_optimizer": bool(layout)}
    whole = run_tiny(ranks, world_size, settings)
    shutil.rmtree(ours / "checkpoints" / f"step_{STEPS:08d}")
    told = convert(ranks, ours, theirs, "--to", "megatron_lm")
    assert f"iteration {SAVED} with its optimizer" in told
    # The model is what the checkpoint says, and the flags that were printed.
    flags = [*OF_THE_RUN, *data_flags(prefix, tmp_path), *layout, *told.splitlines()[-1].split()]
    assert_goes_on(rows_of(launch(checkout, "plain", tuple(flags), world_size, **environment)), whole)
