"""Megatron-LM's own pretrain_gpt.py, run: MEGATRON_LM=/path/to/checkout[:/another] pytest tests/test_megatron_lm.py"""

import os
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from sidecars import write_by_token

CHECKOUTS = [path for path in os.environ.get("MEGATRON_LM", "").split(":") if path]
pytestmark = pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_LM names no checkout of Megatron-LM to run")

HOST = Path(__file__).with_name("megatron_lm_host.py")
# What apex or Transformer Engine would be needed for is switched off.
BASE = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-3 --eval-iters 1 --eval-interval 2
    --tokenizer-type NullTokenizer --vocab-size 600 --make-vocab-size-divisible-by 512 --num-workers 0
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion
    --no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion --position-embedding-type rope
    --distributed-backend gloo --use-cpu-initialization --hidden-dropout 0 --attention-dropout 0
    --log-interval 1""".split()
MOCK = ("--mock-data",)
SHAPING = tuple("--ptrl-beta -0.25 --ptrl-lambda-head 0.5 --ptrl-lambda-tail -1 --ptrl-top-k 20".split())
TP = ("--tensor-model-parallel-size", "2")
PP = ("--pipeline-model-parallel-size", "2")
MTP = ("--mtp-num-layers", "1")
FIGURE = re.compile(r" ((?:lm|mtp_1) loss|ptrl [a-z ]+|grad norm): ([-+.0-9E]+) \|")


@cache
def launch(checkout: str, mode: str, flags: tuple[str, ...], world_size: int = 1, **environment: str) -> list[str]:
    """What each rank printed; a rank that fails fails the test."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    root = str(Path(__file__).parents[1])
    common = os.environ | environment | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "PYTHONPATH": root}
    common |= {"WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    common |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}
    if "PYTHONPATH" in os.environ:
        common["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    command = [sys.executable, str(HOST), mode, checkout, "pretrain_gpt.py", *BASE, *flags]
    ranks = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(output[-3000:] for output in outputs)
    return outputs


def figures(outputs: list[str]) -> list[dict[str, float]]:
    """The log lines of the steps, which the last rank prints."""
    lines = [line for line in outputs[-1].splitlines() if " iteration " in line and "lm loss:" in line]
    steps = [{name: float(value) for name, value in FIGURE.findall(line.replace("|", "| "))} for line in lines]
    assert len(steps) == 4 and "lm loss" in steps[0]
    return steps


def assert_same(actual: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        for name, value in theirs.items():
            bound = 2e-3 if name == "grad norm" else tolerance  # of three printed places
            assert mine[name] == pytest.approx(value, rel=bound, abs=1e-3 if name == "grad norm" else 0), name


@pytest.fixture(scope="module", params=CHECKOUTS)
def checkout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [((), 1), (("--cross-entropy-loss-fusion",), 1), (TP, 2), (PP, 2), (MTP, 1)],
    ids=["plain", "fused", "tp", "pp", "mtp"],
)
def test_defaults_change_no_number(checkout, flags, ranks):
    try:
        theirs = figures(launch(checkout, "plain", (*MOCK, *flags), ranks))
    except AssertionError as failure:
        if flags is not MTP:
            raise
        pytest.skip(f"without Transformer Engine Megatron-LM alone cannot run this: {str(failure).splitlines()[-1]}")
    ours = figures(launch(checkout, "enabled", (*MOCK, *flags), ranks))
    # Megatron's fused function rounds the gradient to bf16.
    assert_same(ours, theirs, 1e-4 if "--cross-entropy-loss-fusion" in flags else 2e-6)
    for step in ours:
        assert step["ptrl ce"] == pytest.approx(step["lm loss"], rel=2e-6)
        assert step["ptrl reward weight"] == 1 and 0 < step["ptrl entropy"] < 7


@pytest.mark.parametrize(("flags", "ranks"), [((), 1), (TP, 2)], ids=["plain", "tp"])
def test_shaping_begins_at_the_same_cross_entropy(checkout, flags, ranks):
    plain = figures(launch(checkout, "plain", (*MOCK, *flags), ranks))
    steps = figures(launch(checkout, "enabled", (*MOCK, *SHAPING, *flags), ranks))
    assert steps[0]["ptrl ce"] == pytest.approx(plain[0]["lm loss"], rel=2e-6)
    assert all(abs(step["lm loss"] - step["ptrl ce"]) > 0.1 for step in steps)
    assert all(1 < step["ptrl reward weight"] < 1.2 for step in steps)


@pytest.fixture(scope="module")
def scored(prefix, unscored, tmp_path_factory) -> tuple[str, ...]:
    """Flags: a blend of two data sets and their side-cars, the other way round, of the value -(token + 1) / 1024."""
    folder = tmp_path_factory.mktemp("megatron_lm")
    sidecars = [write_by_token(data, str(folder / name)) for name, data in (("first", prefix), ("second", unscored))]
    blend = ("--data-path", "0.6", prefix, "0.4", unscored, "--split", "90,10,0", "--data-cache-path", str(folder))
    return (*blend, "--ptrl-remit-sidecar", *sidecars[::-1])


def test_weights_meet_their_tokens(checkout, scored):
    unweighted = scored[: scored.index("--ptrl-remit-sidecar")]
    for ranks, layout in ((1, ()), (2, TP)):
        outputs = launch(checkout, "enabled", (*scored, *layout), ranks, CHECK_ALIGNMENT="1")
        assert outputs[0].count("aligned train") == 8 and "aligned held out" in outputs[0]
        steps, plain = figures(outputs), figures(launch(checkout, "plain", (*unweighted, *layout), ranks))
        assert steps[0]["ptrl ce"] == pytest.approx(plain[0]["lm loss"], rel=2e-6)
        for step in steps:
            assert abs(step["lm loss"] - step["ptrl ce"]) > 1e-4 and 0.9 < step["ptrl token weight"] < 1.1
    neutral = figures(launch(checkout, "enabled", (*scored, "--ptrl-remit-epsilon", "0")))
    assert_same(neutral, figures(launch(checkout, "plain", unweighted)), 2e-6)


def test_refusals_are_one_line(checkout, scored):
    flags = (*MOCK, *scored[scored.index("--ptrl-remit-sidecar") :])
    with pytest.raises(AssertionError, match=r"\n *megatron_lm: --mock-data with --ptrl-remit-sidecar: its tokens are"):
        launch(checkout, "enabled", flags)
