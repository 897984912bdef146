"""What the examples share: their commands and the table of their runs."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(FOLDER))

from commands import Stages, run, run_side_by_side  # noqa: E402
from comparison import named_runs, table  # noqa: E402


def test_the_table_has_means_over_seeds_their_deviations_and_no_figure_that_a_run_lacks() -> None:
    measured = {
        "one": [{"right": 0.5, "weight": None}],
        "two": [{"right": 0.25, "weight": 1.0}, {"right": 0.75, "weight": 2.0}],
        "part": [{"right": 1.0, "weight": 3.0}, {"right": 1.0, "weight": None}],
    }
    # Of two values that lie d apart the deviation is d over the root of 2.
    assert table(measured, {"right": "{:.1%}", "weight": "{:.3f}"}).splitlines() == [
        "| | seeds | right | weight |",
        "|---|---:|---:|---:|",
        "| one | 1 | 50.0% | - |",
        "| two | 2 | 50.0% ± 35.4% | 1.500 ± 0.707 |",
        "| part | 2 | 100.0% ± 0.0% | - |",
    ]


def test_runs_are_named_by_their_method() -> None:
    words = ["cold start=a/b", "RLPT, strict reward=c-1,c-2"]
    assert named_runs(words) == {"cold start": [Path("a/b")], "RLPT, strict reward": [Path("c-1"), Path("c-2")]}


def test_a_command_that_fails_ends_the_example_with_its_code_and_what_it_said(capfd: pytest.CaptureFixture) -> None:
    broken = "import sys; print('what it did'); print('why it failed', file=sys.stderr); sys.exit(7)"
    with pytest.raises(SystemExit) as ended:
        run_side_by_side([["-c", "pass"], ["-c", broken]])
    assert ended.value.code == 7
    told = capfd.readouterr().out
    assert "what it did" in told and "why it failed" in told


def test_threads_are_those_of_the_call_unless_the_user_has_set_them(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ["-c", "import os; print('threads', os.environ['OMP_NUM_THREADS'])"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run(ask)
    run(ask, threads=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run(ask, threads=3)
    told = capfd.readouterr().out.splitlines()
    assert [line for line in told if line.startswith("threads")] == ["threads 1", "threads 3", "threads 2"]


def test_a_small_example_has_its_own_flags_and_one_rank() -> None:
    whole, small = (Stages(Path("configs"), flags) for flags in (None, {"sft": ["--train.steps", 2]}))
    file = ["--config", Path("configs/sft.yaml")]
    assert whole.flags("sft", "sft.yaml") == file and small.flags("sft", "sft.yaml") == [*file, "--train.steps", 2]
    assert whole.flags("data") == [] and small.ranks == [] and "torch.distributed.run" in whole.ranks
    with pytest.raises(KeyError, match="data"):
        small.flags("data")
