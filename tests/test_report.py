"""metrics.jsonl -> plots and the table: what is drawn, what is refused, which numbers are shown."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from megatron_ptrl.config import ReportConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation import report
from megatron_ptrl.evaluation.metrics import read_metrics
from megatron_ptrl.evaluation.report import draw_plots, run, summary_table

ALL_PLOTS = {
    *("loss", "ce", "entropy", "target_probability", "head_tail_mass", "grad_norm", "learning_rate", "throughput"),
}
SHAPED_ONLY = {"entropy", "target_probability", "head_tail_mass"}


def training_line(step: int, *, ce: float, tokens_per_step: int = 1000, shaped: bool = True) -> dict:
    line = {
        "step": step,
        "consumed_samples": step * 10,
        "consumed_tokens": step * tokens_per_step,
        "loss": ce * 0.9,
        "ce": ce,
        "grad_norm": 1.0 / step,
        "learning_rate": 1e-3,
        "tokens_per_second": 2000.0 + step,
        "step_seconds": 0.5,
        "num_tokens": tokens_per_step,
    }
    if shaped:
        line |= {"entropy": 3.0, "target_probability": 0.25, "head_mass": 0.75, "tail_mass": 0.125}
    return line


def make_run(path: Path, *, steps: int = 6, start: float = 5.0, shaped: bool = True, tail: str = "") -> Path:
    path.mkdir(parents=True)
    lines = [training_line(step, ce=start - 0.1 * step, shaped=shaped) for step in range(1, steps + 1)]
    lines.insert(2, {"step": 2, "valid_ce": 4.5, "valid_perplexity": 90.0, "valid_loss": 4.25})
    lines.append({"event": "checkpoint", "path": "checkpoints/6"})
    lines.append({"step": steps, "valid_ce": 4.75, "valid_perplexity": 115.5, "valid_loss": 4.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def test_every_quantity_is_drawn(tmp_path):
    plots = draw_plots([make_run(tmp_path / "a")], tmp_path / "out")
    assert {plot.stem for plot in plots} == ALL_PLOTS
    for plot in plots:
        image = pixels(plot)
        assert min(image.shape[:2]) > 300
        assert image.std() > 0.01, f"{plot.name} is blank"


def test_what_was_not_logged_is_not_drawn(tmp_path):
    plots = draw_plots([make_run(tmp_path / "plain", shaped=False)], tmp_path / "out")
    assert {plot.stem for plot in plots} == ALL_PLOTS - SHAPED_ONLY


def test_different_runs_look_different_and_an_overlay_shows_both(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_PLOTS", {"ce": report._PLOTS["ce"]})
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "two", start=8.0, steps=9)
    draw_plots([one], tmp_path / "a")
    draw_plots([one], tmp_path / "again")
    draw_plots([other], tmp_path / "b")
    draw_plots([one, other], tmp_path / "both")
    images = {name: (tmp_path / name / "ce.png").read_bytes() for name in ("a", "again", "b", "both")}
    assert images["a"] == images["again"]
    assert len(set(images.values())) == 3

    def has(image: np.ndarray, colour: str) -> bool:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return bool((np.abs(image[..., :3] - rgb).max(axis=-1) < 0.02).sum() > 500)

    first, second = report.COLOURS[:2]
    assert has(pixels(tmp_path / "a/ce.png"), first) and not has(pixels(tmp_path / "a/ce.png"), second)
    assert has(pixels(tmp_path / "both/ce.png"), first) and has(pixels(tmp_path / "both/ce.png"), second)


def test_more_runs_than_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_PLOTS", {"loss": report._PLOTS["loss"]})
    runs = [make_run(tmp_path / f"run{i}", start=5.0 + i) for i in range(len(report.COLOURS) + 2)]
    assert len(draw_plots(runs, tmp_path / "out")) == 1


def test_labels_take_as_many_parents_as_they_need(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("x/base", "y/base", "other")]
    header = summary_table(runs).splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["", "x/base", "y/base", "other"]


def test_table_numbers(tmp_path):
    runs = [make_run(tmp_path / "shaped"), make_run(tmp_path / "plain", shaped=False, start=6.0)]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in summary_table(runs).splitlines()]
    table = {name: cells for name, *cells in lines}
    assert table["steps"] == ["6", "6"]
    assert table["consumed tokens"] == ["6,000", "6,000"]
    assert table["time (s)"] == ["3.0", "3.0"]
    assert table["tokens/s"] == ["2,004", "2,004"]  # the median of 2001 ... 2006 is 2003.5
    assert table["train CE"] == ["4.4000", "5.4000"]
    assert table["train head mass"] == ["0.7500", "-"]
    assert table["held-out CE"] == ["4.7500", "4.7500"]
    assert table["best held-out CE"] == ["4.5000", "4.5000"]
    assert table["held-out perplexity"] == ["115.5000", "115.5000"]
    assert "held-out entropy" not in table, "no run has it"


def test_table_of_reinforcement(tmp_path):
    """Reward, gate, lengths and what was evaluated; nothing that no run has."""
    plain, reinforced = make_run(tmp_path / "plain", shaped=False), tmp_path / "rl"
    reinforced.mkdir()
    rows = [
        {"step": step, "consumed_tokens": 100 * step, "loss": 0.0, "reward": 0.1 * step, "reward_asr": 0.2 * step}
        for step in (1, 2, 3)
    ]
    rows[1]["reward_msr"] = 0.5  # the last step had no prompt of this task
    rows[2] |= {"response_tokens_mean": 12.5, "gate_failed_share": 0.25, "truncated_share": 0.0}
    (reinforced / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (2, 3):
        results = {"consumed_tokens": 100 * step, "figures": {"asr/accuracy": {"value": step / 10}}}
        folder = reinforced / "evaluations" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))

    def table_of(*runs):
        lines = [line.strip("|").split("|") for line in summary_table(list(runs)).splitlines()[2:]]
        return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}

    expected = {"reward": "0.3000", "reward asr": "0.6000", "reward msr": "0.5000", "failed the gate": "0.2500"}
    expected |= {"response (tokens)": "12.5000", "responses cut off": "0.0000", "evaluated asr/accuracy": "0.3000"}
    alone, both = table_of(reinforced), table_of(plain, reinforced)
    for name, value in expected.items():
        assert alone[name] == [value] and both[name] == ["-", value], name
    assert set(alone) == {"steps", "consumed tokens", "train loss", *expected}, "no rows of dashes"
    assert "held-out CE" in both and "train entropy" not in both and list(both)[:2] == ["steps", "consumed tokens"]


def test_cut_off_last_line_is_left_out_with_a_note(tmp_path, caplog):
    path = make_run(tmp_path / "a", tail='{"step": 7, "lo')
    with caplog.at_level(logging.WARNING):
        metrics = read_metrics(path)
    assert [line["step"] for line in metrics.train] == [1, 2, 3, 4, 5, 6]
    assert f"{path / 'metrics.jsonl'}:10 is cut off" in caplog.text


@pytest.mark.parametrize(
    "tail", ['{"step": 7, "lo\n', "[1, 2]\n", '{"loss": 1.0}\n', '{"step": "7", "ce": 1.0}\n', "\xff\n"]
)
def test_any_other_malformed_line_is_refused_by_file_and_line(tmp_path, tail):
    path = make_run(tmp_path / "a", tail=tail + '{"step": 8, "ce": 1.0}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:10 "):
        read_metrics(path)


def test_missing_and_empty_metrics(tmp_path):
    with pytest.raises(InputError, match="has no metrics.jsonl"):
        draw_plots([tmp_path], tmp_path / "out")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no training or evaluation line"):
        summary_table([tmp_path])


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    again = json.dumps(training_line(6, ce=1.5)) + "\n"
    metrics = read_metrics(make_run(tmp_path / "a", tail=again))
    assert [line["ce"] for line in metrics.train][-2:] == [4.5, 1.5]


def test_evaluations_are_placed_by_their_steps_tokens(tmp_path):
    metrics = read_metrics(make_run(tmp_path / "a"))
    assert [metrics.tokens_at(step) for step in (0, 2, 3.5, 6, 7)] == [0, 2000, 3500, 6000, 7000]


def test_only_evaluations_and_non_finite_values(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "metrics.jsonl").write_text('{"step": 3, "valid_ce": NaN, "valid_loss": 4.0, "valid_entropy": null}\n')
    assert {plot.stem for plot in draw_plots([path], tmp_path / "out")} == {"loss"}
    assert "4.0000" in summary_table([path])


@pytest.mark.parametrize("slope", [0.0, -2.0])
def test_smoothing_does_not_shift_a_straight_line(slope):
    values = [3.0 + slope * i for i in range(200)]
    assert report._smooth(values) == pytest.approx(values)


def test_run_writes_beside_one_run_and_asks_where_for_several(tmp_path, capsys):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    run(ReportConfig(runs=[str(one)]))
    assert (one / "plots" / "ce.png").is_file()
    assert "| held-out CE" in capsys.readouterr().out
    with pytest.raises(InputError, match="--output"):
        run(ReportConfig(runs=[str(one), str(other)]))
    run(ReportConfig(runs=[str(one), str(other)], output=str(tmp_path / "out")))
    assert (tmp_path / "out" / "summary.md").read_text().startswith("| ")
    with pytest.raises(InputError, match="twice"):
        run(ReportConfig(runs=[str(one), str(one)], output=str(tmp_path / "out")))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output .*file: File exists"):
        run(ReportConfig(runs=[str(one)], output=str(tmp_path / "file")))
    with pytest.raises(InputError, match="no run directory"):
        run(ReportConfig())


def weighted_run(path: Path, shares: list[float]) -> Path:
    make_run(path)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    weights = {"remit_weight_mean": 1.02, "remit_gap": -0.1, "reference_ce": 1.5}
    weights |= {"remit_low_share": shares[0], "remit_high_share": shares[-1]}
    weights |= {f"remit_weight_bin_{i}": share for i, share in enumerate(shares)}
    text = "".join(json.dumps(line | weights if "ce" in line else line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    return path


def test_the_weights_of_a_remit_run_are_drawn(tmp_path):
    plain, weighted = make_run(tmp_path / "plain"), weighted_run(tmp_path / "weighted", [0.5, 0.2, 0.3])
    plots = draw_plots([plain, weighted], tmp_path / "out")
    assert {plot.stem for plot in plots} == ALL_PLOTS | {"reference", "token_weight", "weight_histogram"}
    assert pixels(tmp_path / "out" / "weight_histogram.png").std() > 0.01


def test_the_histogram_has_a_stair_for_every_bin_in_the_colour_of_its_run(tmp_path):
    labelled = report._read([make_run(tmp_path / "plain"), weighted_run(tmp_path / "weighted", [0.5, 0.2, 0.3, 0.0])])
    shares = {label: report._weight_shares(metrics) for label, metrics in labelled.items()}
    assert shares == {"plain": [], "weighted": [0.5, 0.2, 0.3, 0.0]}
    (axes,) = report._draw_histogram({"weighted": shares["weighted"]}, list(labelled)).axes
    (stairs,) = axes.patches
    assert list(stairs.get_data().values) == [0.5, 0.2, 0.3, 0.0]
    assert list(stairs.get_data().edges) == [-1, -0.5, 0, 0.5, 1]
    from matplotlib.colors import to_hex

    assert to_hex(stairs.get_edgecolor()) == report.COLOURS[1]
