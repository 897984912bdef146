"""`ptrl report RUN... --scaling METRIC`: a metric of runs against training tokens -> laws, a table, a plot.

metrics.jsonl, or evaluations/*/results.json  ->  (tokens, values)  ->  scaling.fit  ->  scaling_METRIC.md, .png
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation.metrics import RunMetrics, is_finite, read_evaluations
from megatron_ptrl.evaluation.scaling import FORMS, Estimate, Fit, fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# How far beyond its last point a curve is drawn and told.
_BEYOND = (2.0, 10.0)
Points = tuple[list[float], list[float]]


def points_of(metrics: RunMetrics, metric: str) -> Points:
    """(training tokens, values) of `metric`: of the steps, of the evaluations during the run, or of `ptrl evaluate`'s.

    The latter are those in the run directory's evaluations/, by the names of results.json such as `gsm8k/pass@1`.
    Raises InputError, naming the metrics that there are, where there is none over tokens.
    """
    counted = [line for line in metrics.train if is_finite(line.get("consumed_tokens"))]
    steps, values = metrics.series(metric, counted)
    if steps:
        tokens = {line["step"]: float(line["consumed_tokens"]) for line in counted}
        return [tokens[step] for step in steps], values
    steps, values = metrics.series(metric, metrics.valid)
    if steps and counted:
        return [metrics.tokens_at(step) for step in steps], values
    found = read_evaluations(metrics.path)
    pairs = [(tokens, figures[metric]["value"]) for tokens, figures in found if metric in figures]
    if not pairs:
        known = {name for line in (*metrics.train[-1:], *metrics.valid[-1:]) for name in line if is_finite(line[name])}
        known |= {name for _, figures in found for name in figures}
        raise InputError(f"{metrics.path} has no {metric}; expected one of {', '.join(sorted(known))}")
    return [tokens for tokens, _ in pairs], [value for _, value in pairs]


def write_scaling(
    labelled: dict[str, RunMetrics], metric: str, output: Path, *, unit: float | None, resamples: int
) -> str:
    """Write the plot and the table of `metric` into the folder `output`; returns the table.

    Raises InputError as `points_of` and `scaling.fit` do, naming the run.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from megatron_ptrl.evaluation.report import COLOURS, STYLE

    found: dict[str, tuple[Points, list[Fit]]] = {}
    for label, metrics in labelled.items():
        points = points_of(metrics, metric)
        try:
            found[label] = points, [fit(*points, form, unit=unit, resamples=resamples) for form in FORMS]
        except InputError as error:
            raise InputError(f"{metric} of {label}: {error}") from error
    table = _table(metric, {label: fits for label, (_, fits) in found.items()})
    name = metric.replace("/", "_")
    output.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2 * len(FORMS), 4.6), layout="constrained")
        for place, axes in enumerate(figure.subplots(1, len(FORMS), squeeze=False)[0]):
            for number, (points, fits) in enumerate(found.values()):
                _draw(axes, points, fits[place], list(found)[number], COLOURS[number % len(COLOURS)])
            _frame(axes, metric, next(iter(found.values()))[1][place])
        figure.savefig(output / f"scaling_{name}.png", format="png")
    (output / f"scaling_{name}.md").write_text(table + "\n", encoding="utf-8")
    return table


def _table(metric: str, fits: dict[str, list[Fit]]) -> str:
    first = next(iter(fits.values()))[0]
    lines = [
        f"{metric} against training tokens; intervals of 95 %, by resampling blocks of residuals",
        "",
        "| run | law | x in tokens | parameters | R2 | rmse | points | "
        + " | ".join(f"at {factor:g}x the last" for factor in _BEYOND)
        + " |",
        "|---|---|---:|---|---:|---:|---:|" + "---:|" * len(_BEYOND),
    ]
    vague = False
    for label, laws in fits.items():
        for law in laws:
            told = [_told(estimate, name) for name, estimate in law.parameters.items()]
            vague |= any(not estimate.determined for estimate in law.parameters.values())
            ahead = [_told(law.predict(factor * law.last)) for factor in _BEYOND]
            cells = [label, law.formula, f"{law.unit:.4g}", ", ".join(told), f"{law.r2:.4f}", f"{law.rmse:.2g}"]
            lines.append(f"| {' | '.join([*cells, str(law.points), *ahead])} |")
    if vague:
        lines += ["", "(?): the interval is wider than the value; these points do not determine it."]
    if first.points < 10:
        lines += ["", "Fewer than 10 points for three parameters: the intervals themselves are rough."]
    return "\n".join(lines)


def _told(estimate: Estimate, name: str = "") -> str:
    mark = "" if estimate.determined else " (?)"
    shown = f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]{mark}"
    return f"{name} = {shown}" if name else shown


def _draw(axes: "Axes", points: Points, law: Fit, label: str, colour: str) -> None:
    axes.plot(*points, linestyle="none", marker="o", markersize=4, color=colour, alpha=0.6, label=label)
    along = numpy.geomspace(law.first, _BEYOND[-1] * law.last, 200)
    curve, (low, high) = law.curve(along), law.interval(along)
    measured = along <= law.last
    axes.plot(along[measured], curve[measured], color=colour, linewidth=1.8)
    axes.plot(along[~measured], curve[~measured], color=colour, linewidth=1.8, linestyle="--")
    axes.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0)
    # The curve's own range: an interval that runs away would flatten all else.
    room = 0.6 * max(float(numpy.ptp(curve)), float(numpy.ptp(points[1])))
    low_edge, high_edge = min(curve.min(), min(points[1])) - room / 2, max(curve.max(), max(points[1])) + room / 2
    known = axes.get_ylim() if len(axes.lines) > 3 else (low_edge, high_edge)
    axes.set_ylim(min(known[0], low_edge), max(known[1], high_edge))


def _frame(axes: "Axes", metric: str, law: Fit) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("training tokens (dashed: beyond the last point)")
    axes.set_ylabel(metric)
    axes.set_title(f"{law.formula}, 95 % interval", fontsize=10)
    axes.legend()
