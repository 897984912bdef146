"""Metrics of runs -> one table side by side: their last steps, their last evaluations."""

from pathlib import Path
from statistics import median
from typing import Any

from megatron_ptrl.evaluation.metrics import RunMetrics, is_finite, read_evaluations

_NONE = "-"
"""A cell of the table without a value."""

_SUMMARY = {
    "loss": "loss",
    "CE": "ce",
    "entropy": "entropy",
    "target probability": "target_probability",
    "head mass": "head_mass",
    "tail mass": "tail_mass",
}
"""Rows of the table that exist for training and held-out data, and their keys."""

_OF_ROLLOUTS = {
    "failed the gate": "gate_failed_share",
    "groups all right": "all_right_share",
    "groups all wrong": "all_wrong_share",
    "response (tokens)": "response_tokens_mean",
    "responses cut off": "truncated_share",
}
"""Further rows of `ptrl rl`, below the rewards."""


def run_table(labelled: dict[str, RunMetrics]) -> str:
    """A Markdown table with a column per run; rows that no run has are left out."""
    columns = [_summary(metrics) for metrics in labelled.values()]
    # In the order of the run that has the most, as others may lack some of them.
    names = dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column)
    cells = [[name, *(column.get(name, _NONE) for column in columns)] for name in names]
    rows = [["", *labelled], *(row for row in cells if {*row[1:]} != {_NONE})]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"| {' | '.join(_pad(cell, i, widths[i]) for i, cell in enumerate(row))} |" for row in rows]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])


def _pad(cell: str, column: int, width: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _summary(metrics: RunMetrics) -> dict[str, str]:
    train = metrics.train[-1] if metrics.train else {}
    valid = metrics.valid[-1] if metrics.valid else {}
    rates, seconds = (metrics.series(key, metrics.train)[1] for key in ("tokens_per_second", "step_seconds"))
    _, held_out = metrics.series("valid_ce", metrics.valid)
    column = {
        "steps": _text(train.get("step"), "{:,.0f}"),
        "consumed tokens": _text(train.get("consumed_tokens"), "{:,.0f}"),
        "time (s)": _text(sum(seconds) if seconds else None, "{:,.1f}"),
        "tokens/s": _text(median(rates) if rates else None, "{:,.0f}"),
    }
    for name, key in _SUMMARY.items():
        column[f"train {name}"] = _text(train.get(key))
    rewards = sorted(key for line in metrics.train for key in line if key == "reward" or key.startswith("reward_"))
    for key in dict.fromkeys(rewards):
        _, values = metrics.series(key, metrics.train)
        name = key.replace("_", " ", 1)
        column |= {name: _text(values[-1])} if values else {}
    for name, key in _OF_ROLLOUTS.items():
        column[name] = _text(train.get(key))
    column["held-out step"] = _text(valid.get("step"), "{:,.0f}")
    for name, key in _SUMMARY.items():
        column[f"held-out {name}"] = _text(valid.get(f"valid_{key}"))
    column["held-out perplexity"] = _text(valid.get("valid_perplexity"))
    column["best held-out CE"] = _text(min(held_out, default=None))
    return column | _evaluated(metrics.path)


def _evaluated(run: Path) -> dict[str, str]:
    """Of the newest evaluation by `ptrl evaluate`: accuracy, pass@k, perplexity and whatever else it measured."""
    found = read_evaluations(run)
    figures = found[-1][1] if found else {}
    return {f"evaluated {name}": _text(figure["value"]) for name, figure in figures.items()}


def _text(value: Any, form: str = "{:.4f}") -> str:
    return form.format(value) if is_finite(value) else _NONE
