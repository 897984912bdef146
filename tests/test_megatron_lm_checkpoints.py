"""Megatron-LM's own script and ours go on with each other's checkpoints: as test_megatron_lm.py, MEGATRON_LM=... pytest

The same documents, split, seed and steps give both the same rows in the same order, so every loss can be compared.
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
from megatron_lm_runs import CHECKOUTS, TP, WITHOUT, launch
from ranks import Ranks
from test_convert import convert
from tiny import Metrics, Settings, tiny_config, train

pytestmark = pytest.mark.skipif(not CHECKOUTS, reason=WITHOUT)

STEPS, SAVED, BATCH = 6, 3, 8
OF_THE_RUN = f"""--train-iters {STEPS} --global-batch-size {BATCH} --lr 2e-3 --lr-warmup-iters 2 --lr-decay-style cosine
    --weight-decay 0.1 --adam-beta2 0.95 --vocab-size 511 --ckpt-format torch_dist""".split()
OF_THE_MODEL = """--normalization RMSNorm --qk-layernorm --swiglu --disable-bias-linear --group-query-attention
    --num-query-groups 2 --ffn-hidden-size 128""".split()
# GELU fused with its bias unless that is switched off.
GELU = """--normalization RMSNorm --qk-layernorm --group-query-attention --num-query-groups 2
    --ffn-hidden-size 128""".split()
OUR_GELU = {"model.gated_linear_unit": False, "model.activation_func": "gelu", "model.add_bias_linear": True}
WSD = ("--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "4")
OUR_WSD = {"optimizer.schedule": "wsd", "optimizer.decay_steps": 4, "optimizer.wsd_decay": "exponential"}
ISOLATED = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss", "--calculate-per-token-loss")
DISTRIBUTED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
PP = ("--pipeline-model-parallel-size", "2")
# Six places are equal only where both round to bf16 in the same places: without these their losses are 9e-5 apart.
BF16 = ("--bf16", "--no-bias-swiglu-fusion")
HOW_IT_IS_COMPUTED = ("loss.impl", "model.attention_softmax_in_fp32")
OURS_IN_BF16 = {"train.precision": "bf16", "loss.impl": "megatron", "model.attention_softmax_in_fp32": False}


@dataclass(frozen=True)
class Kind:
    """A run by Megatron-LM's flags and by our settings."""

    world_size: int = 1
    flags: tuple[str, ...] = ()
    """Of the run, which a checkpoint does not hold."""
    settings: Settings = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    model: tuple[str, ...] = tuple(OF_THE_MODEL)
    """More flags, which follow from the checkpoint or are printed."""
    is_blend: bool = False
    own_attention: bool = True
    knows_ends: bool = False
    """Whether Megatron-LM has the tokenizer, by which it finds where documents end."""


KINDS = {
    "plain optimizer": Kind(),
    "distributed optimizer, tp 2": Kind(
        2, (*TP, *DISTRIBUTED), {"parallel.tp": 2, "parallel.distributed_optimizer": True}, {"FUSED_ADAM": "1"}
    ),
    "plain optimizer, pp 2": Kind(2, PP, {"parallel.pp": 2}),
    "distributed optimizer, pp 2": Kind(
        2, (*PP, *DISTRIBUTED), {"parallel.pp": 2, "parallel.distributed_optimizer": True}, {"FUSED_ADAM": "1"}
    ),
    "blend": Kind(is_blend=True),
    "fused GELU, interleaved positions, WSD": Kind(
        flags=WSD,
        settings={**OUR_GELU, "model.bias_activation_fusion": True, "model.rotary_interleaved": True, **OUR_WSD},
        model=(*GELU, "--rotary-interleaved"),
    ),
    "GELU": Kind(settings=OUR_GELU, model=(*GELU, "--no-bias-gelu-fusion")),
    "isolated documents": Kind(
        settings={"data.isolate_documents": True}, model=(*OF_THE_MODEL, *ISOLATED), knows_ends=True
    ),
    "bf16": Kind(1, BF16, OURS_IN_BF16, own_attention=False),
    "distributed optimizer, dp 2, bf16": Kind(
        2,
        (*BF16, *DISTRIBUTED),
        {**OURS_IN_BF16, "parallel.distributed_optimizer": True},
        {"FUSED_ADAM": "1"},
        own_attention=False,
    ),
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


@pytest.fixture
def data(kind: str, prefix: str, unscored: str) -> list[str]:
    """The data set, or a blend of two by weights that are no shares: few documents, which repeat, and many."""
    return ["2", prefix, "3", unscored] if KINDS[kind].is_blend else [prefix]


def train_with_megatrons_attention(rank: int, world_size: int, settings: Settings) -> list[Metrics]:
    """As `train`; torch's attention, which the layers have otherwise, rounds to bf16 elsewhere."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_ptrl.training import layers

    with mock.patch.object(layers, "ScaledDotProductAttention", DotProductAttention):
        return train(rank, world_size, settings)


def run_ours(ranks: Ranks, run: Kind, settings: Settings) -> list[Metrics]:
    function = train if run.own_attention else train_with_megatrons_attention
    return ranks.run(run.world_size, function, settings)[0]


def tokenizer_flags(run: Kind, prefix: str, folder: Path) -> list[str]:
    if not run.knows_ends:
        return []
    (folder / "tokenizer").mkdir()
    shutil.copyfile(f"{prefix}.tokenizer.json", folder / "tokenizer" / "tokenizer.json")
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(described))
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")]


def data_flags(data: list[str], cache: Path) -> list[str]:
    # It cannot make a blend of which no sample is held out.
    held_out = ["--eval-iters", str(int(len(data) > 1)), "--eval-interval", str(STEPS)]
    return ["--data-path", *data, "--split", "90,10,0", "--data-cache-path", str(cache), *held_out]


@pytest.mark.parametrize("checkout", CHECKOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_megatron_lm_goes_on_here(checkout, kind, ranks, data, prefix, tmp_path):
    run, theirs, ours = KINDS[kind], tmp_path / "theirs", tmp_path / "ours"
    flags = [*run.model, *OF_THE_RUN, *data_flags(data, tmp_path), *run.flags, *tokenizer_flags(run, prefix, tmp_path)]
    flags += ["--save", str(theirs), "--save-interval", str(SAVED)]
    whole = rows_of(launch(checkout, "plain", tuple(flags), run.world_size, **run.environment))
    told = convert(ranks, theirs / f"iter_{SAVED:07d}", ours, "--tokenizer", f"{prefix}.tokenizer.json")
    assert f"continuing at step {SAVED} after {SAVED * BATCH} samples" in told
    continued = {"config": str(ours / "config.yaml"), "run_dir": str(ours), "data.train": data}
    continued |= {name: value for name, value in run.settings.items() if name in HOW_IT_IS_COMPUTED}
    continued |= {"train.eval_samples": 0, "log.tensorboard": False, "log.plots": False}
    assert_goes_on(run_ours(ranks, run, continued), whole)


def saved_by_us(ranks: Ranks, run: Kind, data: list[str], prefix: str, folder: Path) -> tuple[list[Metrics], list[str]]:
    """A whole run of ours: its metrics, and the flags that `ptrl convert` prints for what it had saved on the way."""
    ours = folder / "ours"
    settings = tiny_config(prefix, ours, train__steps=STEPS, checkpoint__save_every=SAVED, model__num_layers=2)
    settings |= {"data.train": data, "data.split": "90,10", "data.tokenizer": f"{prefix}.tokenizer.json"}
    settings |= {"parallel.distributed_optimizer": False} | run.settings
    whole = run_ours(ranks, run, settings)
    shutil.rmtree(ours / "checkpoints" / f"step_{STEPS:08d}")
    told = convert(ranks, ours, folder / "theirs", "--to", "megatron_lm")
    assert f"iteration {SAVED} with its optimizer" in told
    return whole, told.splitlines()[-1].split()


@pytest.mark.parametrize("checkout", CHECKOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_ours_goes_on_there(checkout, kind, ranks, data, prefix, tmp_path):
    run = KINDS[kind]
    whole, printed = saved_by_us(ranks, run, data, prefix, tmp_path)
    # The model is what the checkpoint says, and the flags that were printed.
    of_the_data = (*data_flags(data, tmp_path), *tokenizer_flags(run, prefix, tmp_path))
    flags = (*OF_THE_RUN, *of_the_data, *run.flags, *printed)
    assert_goes_on(rows_of(launch(checkout, "plain", flags, run.world_size, **run.environment)), whole)


@pytest.mark.parametrize("checkout", CHECKOUTS)
@pytest.mark.parametrize(("asked", "stages"), [((), 1), (("--use-mp-args-from-checkpoint-args",), 2)])
def test_the_printed_flags_alone_load_pipeline_stages(checkout, asked, stages, ranks, prefix, tmp_path):
    """On two data-parallel ranks, for any layout loads any, or on the stages that the checkpoint's arguments name."""
    run = KINDS["plain optimizer, pp 2"]
    whole, printed = saved_by_us(ranks, run, [prefix], prefix, tmp_path)
    outputs = launch(checkout, "plain", (*OF_THE_RUN, *data_flags([prefix], tmp_path), *printed, *asked), 2)
    assert f"pipeline-model-parallel size: {stages}" in outputs[0]
    assert_goes_on(rows_of(outputs), whole)
