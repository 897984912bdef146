"""Run directories -> plots laid over each other, and one table side by side.

    metrics.jsonl  --read_metrics-->  RunMetrics  --draw_plots-->  loss.png, ce.png, ...
                                                  --summary_table-->  a Markdown table, a column per run
    token_weights.jsonl, where there is one  --token_weights-->  token_weights.html
    rollouts/*.jsonl, where there are any    --sample_rollouts-->  rollouts.html
    any metric that --scaling names          --scaling_report-->  scaling_METRIC.png, scaling_METRIC.md

Everything is drawn over consumed tokens, so that runs with different batch sizes compare at equal data.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ptrl.config import ReportConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation.metrics import RunMetrics, is_finite, read_metrics
from megatron_ptrl.evaluation.run_table import run_table
from megatron_ptrl.evaluation.sample_rollouts import write_sample_rollouts
from megatron_ptrl.evaluation.scaling_report import write_scaling
from megatron_ptrl.evaluation.token_weights import write_token_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Panel:
    """One pair of axes: which training key, which held-out key, in which unit."""

    key: str
    label: str
    valid_key: str | None = None
    smooth: bool = True
    from_zero: bool = False
    large: bool = False
    """Write 12000 as 12 k."""


_PLOTS: dict[str, tuple[_Panel, ...]] = {
    "loss": (_Panel("loss", "shaped loss (nats per token)", "valid_loss"),),
    "ce": (_Panel("ce", "cross entropy (nats per token)", "valid_ce"),),
    "entropy": (_Panel("entropy", "entropy (nats per token)", "valid_entropy"),),
    "target_probability": (_Panel("target_probability", "probability of the target", "valid_target_probability"),),
    "head_tail_mass": (
        _Panel("head_mass", "probability mass of the head", "valid_head_mass"),
        _Panel("tail_mass", "probability mass of the tail", "valid_tail_mass"),
    ),
    "reference": (
        _Panel("reference_ce", "cross entropy of the reference (nats per token)"),
        _Panel("remit_gap", "gap: log p, reference less model (nats)"),
    ),
    "token_weight": (
        _Panel("remit_weight_mean", "mean weight of a token"),
        _Panel("remit_low_share", "share of tokens at the lower edge", from_zero=True),
        _Panel("remit_high_share", "share of tokens at the upper edge", from_zero=True),
    ),
    "reward": (
        _Panel("reward", "mean reward", from_zero=True),
        _Panel("truncated_share", "share of responses cut off", from_zero=True),
        _Panel("gate_failed_share", "share of responses the gate fails", from_zero=True),
    ),
    "response_tokens": (_Panel("response_tokens_mean", "mean response (tokens)", from_zero=True),),
    "equal_groups": (
        _Panel("all_right_share", "share of groups all right", from_zero=True),
        _Panel("all_wrong_share", "share of groups all wrong", from_zero=True),
    ),
    "logprob_difference": (
        _Panel("logprob_difference", "log-probability, trainer less engine (mean |d|, nats)", from_zero=True),
    ),
    "grad_norm": (_Panel("grad_norm", "gradient norm before clipping", from_zero=True),),
    "learning_rate": (_Panel("learning_rate", "learning rate", smooth=False),),
    "throughput": (_Panel("tokens_per_second", "throughput (tokens per second)", from_zero=True, large=True),),
}

_WEIGHT_BIN = "remit_weight_bin_{}"
"""Share of the tokens whose weight is in this tenth, or whatever part, of the span from the lower edge to the upper."""

_SMOOTH_FROM = 50
"""A shorter run is drawn as it is: each of its steps can be seen."""

# Any, because matplotlib 3.11 types the keys one by one and 3.8 not at all.
STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

# Okabe and Ito's palette without its yellow, which is lost on white: told apart with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_LINES = ("-", "--", ":")
_MARKER: dict[str, Any] = {"marker": "o", "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.8}


def run(config: ReportConfig) -> None:
    """Draw the plots of `config.runs`, write and print their table.

    Raises InputError as `read_metrics` does, and for an output that cannot be written.
    """
    if not config.runs:
        raise InputError("no run directory was given; expected one or more: ptrl report RUN... --output DIR")
    if config.output is None and len(config.runs) > 1:
        raise InputError(f"{len(config.runs)} runs and no output folder; give one with --output DIR")
    runs = [Path(name) for name in config.runs]
    output = Path(config.output) if config.output is not None else runs[0] / "plots"
    labelled = _read(runs)
    table = run_table(labelled)
    try:
        plots = _draw_all(labelled, output)
        folders = {label: metrics.path for label, metrics in labelled.items()}
        pages = [
            page for page in (write_token_weights(folders, output), write_sample_rollouts(folders, output)) if page
        ]
        (output / "summary.md").write_text(table + "\n", encoding="utf-8")
        print(table)
        scaling = _scaling(config, labelled, output)  # last: a metric that no law fits must not cost the rest
    except OSError as error:
        raise InputError(f"output {output}: {error.strerror}; name a folder that can be written") from error
    for law in scaling:
        print(f"\n{law}")
    others = "".join(f", {page.name}" for page in pages) + (", scaling_*" if scaling else "")
    print(f"\n{len(plots)} plots{others} and summary.md are in {output}")


def _scaling(config: ReportConfig, labelled: dict[str, RunMetrics], output: Path) -> list[str]:
    """A table for each metric that is asked for."""
    unit, resamples = config.scaling_unit, config.bootstrap
    return [write_scaling(labelled, metric, output, unit=unit, resamples=resamples) for metric in config.scaling]


def draw_plots(runs: list[Path], output: Path) -> list[Path]:
    """PNG files in `output`, one per quantity that at least one of `runs` has logged; returns their paths.

    Raises InputError as `read_metrics` does, and when a run is given twice.
    """
    return _draw_all(_read(runs), output)


def summary_table(runs: list[Path]) -> str:
    """A Markdown table, a column per run: its last training step, its last evaluation, its best one.

    `time` is the sum of the logged steps, `tokens/s` their median. A value that was not logged is a dash, a row that no
    run has is left out.
    """
    return run_table(_read(runs))


def _draw_all(labelled: dict[str, RunMetrics], output: Path) -> list[Path]:
    from matplotlib import rc_context

    unit = "consumed_tokens" if all(_has_tokens(metrics) for metrics in labelled.values()) else "step"
    output.mkdir(parents=True, exist_ok=True)
    written = []
    # rc_context and Figure, not pyplot: a training script's own figures and backend stay as they are.
    with rc_context(STYLE):
        for name, panels in _PLOTS.items():
            panels = tuple(p for p in panels if any(_drawable(metrics, p) for metrics in labelled.values()))
            if panels:
                path = output / f"{name}.png"
                _draw(labelled, panels, unit).savefig(path, format="png")
                written.append(path)
        shares = {label: found for label, metrics in labelled.items() if (found := _weight_shares(metrics))}
        if shares:
            path = output / "weight_histogram.png"
            _draw_histogram(shares, list(labelled)).savefig(path, format="png")
            written.append(path)
    return written


def _read(runs: list[Path]) -> dict[str, RunMetrics]:
    """The metrics by label: the directory's name, with as many parents as it needs to be the only one."""
    paths = [run.resolve() for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise InputError(f"{runs[i]} was given twice; expected each run once")
    return {_label(path, paths): read_metrics(run) for path, run in zip(paths, runs, strict=True)}


def _label(path: Path, paths: list[Path]) -> str:
    depth = 1
    while sum(other.parts[-depth:] == path.parts[-depth:] for other in paths) > 1:
        depth += 1
    return "/".join(path.parts[-depth:])


def _has_tokens(metrics: RunMetrics) -> bool:
    return bool(metrics.train) and all(is_finite(line.get("consumed_tokens")) for line in metrics.train)


def _drawable(metrics: RunMetrics, panel: _Panel) -> bool:
    return bool(metrics.series(panel.key, metrics.train)[0]) or bool(
        panel.valid_key and metrics.series(panel.valid_key, metrics.valid)[0]
    )


def _smooth(values: list[float]) -> list[float]:
    """Mean over a centred window of about a 25th of the run.

    Centred, because a trailing average lags, and lags more in the run with the larger steps. Towards the ends the
    window shrinks on both sides.
    """
    sums = list(accumulate(values, initial=0.0))
    last = len(values) - 1
    reaches = [min(i, last - i, len(values) // 50) for i in range(len(values))]
    return [(sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1) for i, reach in enumerate(reaches)]


def _draw(labelled: dict[str, RunMetrics], panels: tuple[_Panel, ...], unit: str) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    looks = [_look(i) for i in range(len(labelled))]
    handles = [Line2D([], [], linewidth=1.8, label=label, **look) for label, look in zip(labelled, looks, strict=True)]
    if any(panel.smooth and len(metrics.train) > _SMOOTH_FROM for panel in panels for metrics in labelled.values()):
        handles.append(Line2D([], [], color="#888888", alpha=0.5, linewidth=1, label="every step"))
    if any(panel.valid_key and metrics.valid for panel in panels for metrics in labelled.values()):
        handles.append(Line2D([], [], color="#888888", linestyle="none", label="held out", **_MARKER))
    widest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, 110 * len(panels) // (widest + 10)))  # the figure is about 110 letters wide

    figure = Figure(figsize=(7.2 * len(panels), 4.2 + 0.2 * math.ceil(len(handles) / columns)), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for look, metrics in zip(looks, labelled.values(), strict=True):
            _draw_run(axes, metrics, panel, unit, look)
        axes.set_xlabel("consumed tokens" if unit == "consumed_tokens" else "step")
        axes.set_ylabel(panel.label)
        axes.xaxis.set_major_formatter(EngFormatter())
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        if panel.large:
            axes.yaxis.set_major_formatter(EngFormatter())
    # Outside the axes, so that it never covers a curve.
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)
    return figure


def _look(run: int) -> dict[str, Any]:
    """Colour and line of the run of this number, alike in all plots."""
    return {"color": COLOURS[run % len(COLOURS)], "linestyle": _LINES[run // len(COLOURS) % len(_LINES)]}


def _weight_shares(metrics: RunMetrics) -> list[float]:
    """Of the last step that logged a histogram, the share of each bin; empty without one."""
    for line in reversed(metrics.train):
        shares = list(takewhile(is_finite, (line.get(_WEIGHT_BIN.format(i)) for i in count())))
        if shares:
            return shares
    return []


def _draw_histogram(shares: dict[str, list[float]], labels: list[str]) -> "Figure":
    """Steps from -1, the lower edge of the weights, to 1, the upper; the same colours as in the other plots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for label, values in shares.items():
        i = labels.index(label)
        edges = [2 * edge / len(values) - 1 for edge in range(len(values) + 1)]
        axes.stairs(values, edges, label=label, linewidth=1.8, **_look(i))
    axes.set_xlabel("(weight - 1) / epsilon, last step")
    axes.set_ylabel("share of tokens")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper left", ncols=max(1, min(len(shares), 3)))
    return figure


def _draw_run(axes: "Axes", metrics: RunMetrics, panel: _Panel, unit: str, look: dict[str, Any]) -> None:
    def place(steps: list[int]) -> list[float]:
        return [metrics.tokens_at(step) for step in steps] if unit == "consumed_tokens" else list(steps)

    steps, values = metrics.series(panel.key, metrics.train)
    smooth = panel.smooth and len(values) > _SMOOTH_FROM
    if smooth:
        axes.plot(place(steps), values, color=look["color"], linewidth=0.8, alpha=0.25)
    axes.plot(place(steps), _smooth(values) if smooth else values, linewidth=1.8, **look)
    if panel.valid_key:
        steps, values = metrics.series(panel.valid_key, metrics.valid)
        axes.plot(place(steps), values, color=look["color"], linestyle="none", zorder=3, **_MARKER)
