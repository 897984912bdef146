"""Analysis of thinking -> PNG files, in the look of the runs' plots."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ptrl.evaluation.report import COLOURS, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_ptrl.thinking.analysis import Analysis

# More bars than this cannot be read; the table has them all.
MAX_BARS = 24


def draw(found: "Analysis", groups: Mapping[str, dict[str, list[int]]], output: Path) -> list[Path]:
    """lengths.png, by_domain.png and the like for `groups` that are not empty, outcomes.png; returns their paths."""
    from matplotlib import rc_context

    figures = {}
    with rc_context(STYLE):
        if found.measured:
            figures["lengths"] = _lengths(found)
        for group, lengths in groups.items():
            if lengths:
                bars = {f"{name} ({len(values):,})": statistics.fmean(values) for name, values in lengths.items()}
                figures[f"by_{group}"] = _bars(bars, f"mean thinking tokens by {group}")
        rejected = {f"{stage}: {reason}": n for stage, counts in found.rejected.items() for reason, n in counts.items()}
        kept = found.thoughts - found.rejected["assemble"].total()
        figures["outcomes"] = _bars({"trained on": kept, **rejected}, "documents")
        for name, figure in figures.items():
            figure.savefig(output / f"{name}.png", format="png")
    return [output / f"{name}.png" for name in figures]


def _lengths(found: "Analysis") -> "Figure":
    from matplotlib.figure import Figure

    panels = {
        "document tokens": [item.document_tokens for item in found.measured],
        "thinking tokens, those that a document gains": [item.thinking_tokens for item in found.measured],
    }
    figure = Figure(figsize=(10, 4), layout="constrained")
    for colour, axes, (name, values) in zip(COLOURS, figure.subplots(1, 2), panels.items(), strict=False):
        top = max(1, math.ceil(statistics.quantiles(values, n=100)[98])) if len(values) > 1 else max(values, default=1)
        # The last bin takes what is beyond it, or one document of a million tokens would flatten all others.
        axes.hist([min(value, top) for value in values], bins=40, color=colour)
        axes.set_xlabel(f"{name} (last bin: and more)")
        axes.set_ylabel("documents")
    return figure


def _bars(values: dict[str, float], label: str) -> "Figure":
    from matplotlib.figure import Figure

    shown = dict(list(values.items())[:MAX_BARS])
    figure = Figure(figsize=(7.2, 1.2 + 0.32 * len(shown)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(shown), list(shown.values()), color=COLOURS[0])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    return figure
