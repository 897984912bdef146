"""`ptrl report --scaling`: which points are fitted, and what is written of them."""

import json
from pathlib import Path

import pytest
from test_report import make_run

from megatron_ptrl.config import ReportConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation.metrics import read_metrics
from megatron_ptrl.evaluation.report import run
from megatron_ptrl.evaluation.scaling_report import points_of


def law_run(path: Path, points: int = 12, valid: bool = True) -> Path:
    """A run whose reward is 0.8 - 0.6 (tokens / 1000)^-0.5, and whose held-out CE is twice that."""
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("w") as stream:
        for step in range(1, points + 1):
            reward = 0.8 - 0.6 * step**-0.5
            stream.write(json.dumps({"step": step, "consumed_tokens": 1000 * step, "loss": 1, "reward": reward}) + "\n")
            if valid and step % 2 == 0:
                stream.write(json.dumps({"step": step, "valid_ce": 2 * reward}) + "\n")
    return path


def test_the_law_of_a_run_is_written_and_printed(tmp_path, capsys):
    runs = [law_run(tmp_path / "a"), law_run(tmp_path / "b", points=30)]
    config = ReportConfig(
        runs=[str(r) for r in runs], output=str(tmp_path / "o"), scaling=["reward"], scaling_unit=1000, bootstrap=20
    )
    run(config)
    table = (tmp_path / "o" / "scaling_reward.md").read_text()
    assert table.strip() in capsys.readouterr().out
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in table.splitlines() if line.startswith("| ")}
    power = rows["| a", "y = E + A x^-b"]
    assert [part.split(" [")[0] for part in power[3].split(", ") if "=" in part] == ["E = 0.8", "A = -0.6", "b = 0.5"]
    assert power[2] == "1000" and power[4] == "1.0000" and power[6] == "12"
    assert power[7].startswith(f"{0.8 - 0.6 * 24**-0.5:.4g} [") and "(?)" not in power[3]
    assert rows["| b", "y = E + A x^-b"][6] == "30" and ("| a", "y = a exp(b x^c)") in rows
    assert (tmp_path / "o" / "scaling_reward.png").stat().st_size > 10_000


def test_points_of_evaluations_during_and_after_the_run(tmp_path):
    metrics = read_metrics(law_run(tmp_path / "a"))
    tokens, values = points_of(metrics, "valid_ce")
    assert tokens == [2000, 4000, 6000, 8000, 10000, 12000] and values[0] == pytest.approx(2 * (0.8 - 0.6 * 2**-0.5))
    for step in (6, 2):
        folder = tmp_path / "a" / "evaluations" / f"step_{step}"
        folder.mkdir(parents=True)
        results = {"consumed_tokens": 1000 * step, "figures": {"gsm8k/pass@1": {"value": step / 10}}}
        (folder / "results.json").write_text(json.dumps(results))
    assert points_of(metrics, "gsm8k/pass@1") == ([2000.0, 6000.0], [0.2, 0.6])
    (folder / "results.json").write_text("{}")
    with pytest.raises(InputError, match=r"step_2/results.json: KeyError\('consumed_tokens'\)"):
        points_of(metrics, "gsm8k/pass@1")


def test_what_is_refused(tmp_path):
    one = make_run(tmp_path / "a", steps=4)
    with pytest.raises(InputError, match="has no rewardd; expected one of ce, consumed_samples"):
        run(ReportConfig(runs=[str(one)], scaling=["rewardd"]))
    with pytest.raises(InputError, match="ce of a: 4 points with different numbers"):
        run(ReportConfig(runs=[str(one)], scaling=["ce"]))
    assert "| steps " in (one / "plots" / "summary.md").read_text(), "the table is lost with the law"
    with pytest.raises(InputError, match="bootstrap is 3"):
        ReportConfig(bootstrap=3)
