"""Megatron-LM's own pretrain_gpt.py, run: MEGATRON_LM=/path/to/checkout[:/another] pytest tests/test_megatron_lm.py"""

import re

import pytest
from megatron_lm_runs import CHECKOUTS, TP, WITHOUT, launch
from sidecars import write_by_token

pytestmark = pytest.mark.skipif(not CHECKOUTS, reason=WITHOUT)

MOCK = ("--mock-data",)
SHAPING = tuple("--ptrl-beta -0.25 --ptrl-lambda-head 0.5 --ptrl-lambda-tail -1 --ptrl-top-k 20".split())
PP = ("--pipeline-model-parallel-size", "2")
MTP = ("--mtp-num-layers", "1")
FIGURE = re.compile(r" ((?:lm|mtp_1) loss|ptrl [a-z ]+|grad norm): ([-+.0-9E]+) \|")


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
