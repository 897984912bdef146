"""The log of a run: what it writes, what a resumed run keeps, and one Weights & Biases chart for its whole life."""

import json
import sys
import types
from pathlib import Path

import pytest

from megatron_ptrl.config import LogConfig
from megatron_ptrl.training.runlog import RunLog


def open_log(run_dir: Path, *, first_step: int = 0, settings: str | None = "a: 1\n", **options) -> RunLog:
    config = LogConfig(tensorboard=False, **options)
    return RunLog(run_dir, config, first_step=first_step, last_step=9, settings=settings)


@pytest.mark.parametrize("name", ["metrics.jsonl", "token_weights.jsonl", "rejects.jsonl"])
def test_a_resumed_log_drops_later_steps_and_a_line_cut_short(tmp_path, name):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.record({"step": step, "ce": 1.0 / step})
        log.record_tokens([{"step": step, "tokens": []}])
        log.record_rejects([{"step": step, "reason": "too_long"}])
    log.close()
    with (tmp_path / name).open("a") as stream:
        stream.write('{"ce": 0.5}\n[]\n{"step": null}\n{"step": 2, "ce": 0.')
    open_log(tmp_path, first_step=2).close()
    lines = (tmp_path / name).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_new_run_starts_an_empty_metrics_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ce": 2.0}\n')
    open_log(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_config_and_environment_are_stored_only_when_there_is_something_to_train(tmp_path):
    open_log(tmp_path).close()
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    assert {"packages", "commit", "cores"} <= json.loads((tmp_path / "environment.json").read_text()).keys()
    open_log(tmp_path, first_step=9, settings=None).close()
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_progress_lines_carry_figures_rate_and_time_to_go(tmp_path, capsys):
    log = open_log(tmp_path, every=2)
    for step in (1, 2):
        log.progress({"step": step, "loss": 2.5, "ce": 2.25, "tokens_per_second": 1234.0})
    log.close()
    assert capsys.readouterr().out.splitlines()[0].startswith("step 2/9  loss 2.5000, ce 2.2500  1,234 tokens/s")
    assert "s to go" in (tmp_path / "log.txt").read_text()


def test_the_line_of_reinforcement_has_the_reward_by_task_and_what_the_gate_failed(tmp_path, capsys):
    log = open_log(tmp_path, every=1)
    figures = {"reward": 0.25, "reward_asr": 0.3, "reward_msr": 0.2, "gate_failed_share": 0.125, "entropy": 1.5}
    log.progress({"step": 1, "tokens_per_second": 1.0, "loss": 0.0, **figures})
    log.progress({"step": 2, "tokens_per_second": 1.0, "loss": 0.0, "reward": 0.25, "reward_asr": 0.25})
    log.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "step 1/9  reward 0.2500 (asr 0.30, msr 0.20), gate failed 12%, loss 0.0000, entropy 1.5000"
    )
    assert second.startswith("step 2/9  reward 0.2500, loss 0.0000  1 tokens/s")


def test_weights_and_biases_gets_every_figure_in_one_chart(tmp_path, monkeypatch: pytest.MonkeyPatch):
    started, logged = [], []
    run = types.SimpleNamespace(log=lambda figures, step: logged.append((step, figures)), finish=lambda: None)
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: started.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first_step in (0, 1):
        log = open_log(tmp_path, first_step=first_step, wandb_project="shaping")
        log.record({"step": first_step + 1, "ce": 3.0})
        log.close()
    assert logged == [(1, {"ce": 3.0}), (2, {"ce": 3.0})]
    assert {options["project"] for options in started} == {"shaping"}
    assert len({options["id"] for options in started}) == 1
