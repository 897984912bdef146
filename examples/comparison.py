"""What the compare.py of every example does: runs by their methods, and the table of their means over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path


def named_runs(words: Sequence[str]) -> dict[str, list[Path]]:
    """NAME=RUN[,RUN...] -> run directories by name: a method under several seeds."""
    parts = (word.partition("=") for word in words)
    return {name: [Path(run) for run in runs.split(",")] for name, _, runs in parts}


def table(measured: Mapping[str, Sequence[Mapping[str, float | None]]], columns: Mapping[str, str]) -> str:
    """Markdown, a row a name.

    measured: by name, the columns of every run; None for what a run has no figure of
    columns: the format of each one's figures
    """
    lines = [f"| | seeds | {' | '.join(columns)} |", f"|---|---:|{'---:|' * len(columns)}"]
    for name, runs in measured.items():
        cells = [spread([run[column] for run in runs], form) for column, form in columns.items()]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean and, of several, +- their standard deviation (n - 1 in the denominator); a dash where a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean = form.format(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ± {form.format(statistics.stdev(known))}"
