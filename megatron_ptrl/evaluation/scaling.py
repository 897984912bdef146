"""A metric against training tokens -> a law with intervals.

    exponential   y = a exp(b x^c)     the form of arXiv:2509.19249, figure 1
    power         y = E + A x^-b       what is left at infinite data, and how fast the rest goes

Each is fitted by least squares with Huber's loss from many starts, with x divided by its geometric mean so that the
parameters have similar sizes. A resampled fit is made for the intervals; where they are wide, the points do not
determine the parameter, however well the curve goes through them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from megatron_ptrl.errors import InputError

LEAST_POINTS = 5
INTERVAL = 0.95
# Huber's constant: 95 % as efficient as least squares on normal residuals.
_HUBER = 1.345
_NORMAL_MAD = 1.4826
_REFINED = 3  # of the starts, the best ones
_PASSES = 3
Array = numpy.ndarray


@dataclass(frozen=True, slots=True)
class _Form:
    """A law with three parameters of which one, `shape`, is not linear; params are (params, ...) over points."""

    text: str
    names: tuple[str, str, str]
    curve: Callable[[Array, Array], Array]
    """(parameters (3,), u) -> y, u being x over its geometric mean."""
    starts: Callable[[Array, Array], list[Array]]
    lower: tuple[float, float, float]
    upper: tuple[float, float, float]
    convert: Callable[[Array, float], Array]
    """(parameters (..., 3), r): those for x in units of r geometric means."""


def _exponential(params: Array, u: Array) -> Array:
    a, b, c = params
    # A trial step may overflow; the optimizer turns back from a huge value, and not from an infinite one.
    return a * numpy.exp(numpy.clip(b * u**c, -200, 200))


def _power(params: Array, u: Array) -> Array:
    e, a, b = params
    return e + a * u**-b


def _exponential_starts(u: Array, y: Array) -> list[Array]:
    """For each c the line of log |y| over u^c."""
    sign = math.copysign(1.0, float(numpy.median(y)))
    usable = sign * y > 0
    exponents = numpy.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.5])
    found = []
    for c in [*exponents, *-exponents]:
        log_a, b = _line(u[usable] ** c, numpy.log(sign * y[usable]))
        found.append(numpy.array([sign * math.exp(min(log_a, 200.0)), b, c]))
    return found


def _power_starts(u: Array, y: Array) -> list[Array]:
    """For each b the line of y over u^-b."""
    return [numpy.array([*_line(u**-b, y), b]) for b in (0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.5, 2.5)]


def _line(x: Array, y: Array) -> tuple[float, float]:
    """(intercept, slope) of least squares."""
    (intercept, slope), *_ = numpy.linalg.lstsq(numpy.stack([numpy.ones_like(x), x], 1), y, rcond=None)
    return float(intercept), float(slope)


def _rescale(params: Array, factor: Array, place: int) -> Array:
    out = numpy.array(params, copy=True)
    out[..., place] = params[..., place] * factor
    return out


_FORMS = {
    "exponential": _Form(
        "y = a exp(b x^c)",
        ("a", "b", "c"),
        _exponential,
        _exponential_starts,
        (-math.inf, -math.inf, -4.0),
        (math.inf, math.inf, 4.0),
        lambda params, r: _rescale(params, r ** params[..., 2], 1),
    ),
    "power": _Form(
        "y = E + A x^-b",
        ("E", "A", "b"),
        _power,
        _power_starts,
        (-math.inf, -math.inf, 1e-3),
        (math.inf, math.inf, 5.0),
        lambda params, r: _rescale(params, r ** -params[..., 2], 1),
    ),
}
FORMS = tuple(_FORMS)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def determined(self) -> bool:
        """Whether the interval is narrower than the value itself."""
        return self.high - self.low < abs(self.value)


@dataclass(frozen=True, slots=True)
class Fit:
    """A law fitted to points. `curve` and `interval` take tokens, whatever the unit of the parameters."""

    form: str
    parameters: dict[str, Estimate]
    """In the order of the formula, for x in units of `unit` tokens."""
    unit: float
    points: int
    first: float
    last: float
    """Tokens of the first and the last point."""
    rmse: float
    """Root mean square of the residuals."""
    r2: float
    """Share of the variance that the curve takes."""
    _centre: float
    _best: Array
    _resampled: Array
    """(resamples, 3), for x in units of `_centre`."""

    @property
    def formula(self) -> str:
        return _FORMS[self.form].text

    def curve(self, tokens: Array) -> Array:
        """y at `tokens`, float64 of its shape."""
        return _FORMS[self.form].curve(self._best, numpy.asarray(tokens, float) / self._centre)

    def interval(self, tokens: Array) -> tuple[Array, Array]:
        """(lower, upper) end of the curve's 95 % interval at `tokens` (points,); new points also have their noise."""
        u = numpy.asarray(tokens, float) / self._centre
        curves = numpy.stack([_FORMS[self.form].curve(params, u) for params in self._resampled])
        low, high = numpy.quantile(curves, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
        return low, high

    def predict(self, tokens: float) -> Estimate:
        """The curve at `tokens`."""
        low, high = self.interval(numpy.array([tokens]))
        return Estimate(float(self.curve(numpy.array([tokens]))[0]), float(low[0]), float(high[0]))


def fit(
    tokens: Sequence[float],
    values: Sequence[float],
    form: str,
    *,
    unit: float | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> Fit:
    """The law `form` through (tokens, values); points at 0 tokens are left out, where a power has no value.

    unit: tokens that x is counted in, such as 1e9; None for the geometric mean of the tokens, where the intervals of
    the parameters depend least on each other

    The intervals are those of fits to the curve plus its own residuals, drawn in blocks of n^(1/3) neighbours because
    those of a training run resemble each other, and enlarged by sqrt(n / (n - 3)) because the fit has shrunk them.
    Cost: about 10 ms a resample for tens of points.
    Raises InputError for fewer than 5 points, fewer than 5 different token counts, values that are all the same or not
    finite, and where scipy is missing.
    """
    x, y = _checked(tokens, values)
    law = _FORMS[form]
    centre = float(numpy.exp(numpy.log(x).mean()))
    u = x / centre
    best, scale = _solve(law, u, y)
    predicted = law.curve(best, u)
    residuals = y - predicted
    drawn = _resample(residuals, resamples, numpy.random.default_rng(seed))
    again = numpy.stack([_again(law, u, predicted + each, best, scale) for each in drawn])
    unit = centre if unit is None else unit
    shown, spread = law.convert(best, unit / centre), law.convert(again, unit / centre)
    low, high = numpy.quantile(spread, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
    return Fit(
        form=form,
        parameters={name: Estimate(float(shown[i]), float(low[i]), float(high[i])) for i, name in enumerate(law.names)},
        unit=unit,
        points=len(x),
        first=float(x.min()),
        last=float(x.max()),
        rmse=float(numpy.sqrt((residuals**2).mean())),
        r2=float(1 - (residuals**2).sum() / ((y - y.mean()) ** 2).sum()),
        _centre=centre,
        _best=best,
        _resampled=again,
    )


def _checked(tokens: Sequence[float], values: Sequence[float]) -> tuple[Array, Array]:
    """float64, in the order of the tokens."""
    x, y = numpy.asarray(tokens, float), numpy.asarray(values, float)
    order = numpy.argsort(x[x > 0], kind="stable")
    x, y = x[x > 0][order], y[x > 0][order]
    different = len(numpy.unique(x))
    if different < LEAST_POINTS:
        raise InputError(
            f"{different} points with different numbers of training tokens; expected at least {LEAST_POINTS}, because "
            "three parameters go through three points whatever the law is"
        )
    if not (numpy.isfinite(x).all() and numpy.isfinite(y).all()):
        raise InputError("a point is not finite; expected numbers")
    if numpy.ptp(y) == 0:
        raise InputError(f"all {len(y)} values are {y[0]:g}; expected a metric that changes")
    return x, y


def _solve(law: _Form, u: Array, y: Array) -> tuple[Array, float | None]:
    """(parameters of the best fit from the best starts, Huber's scale in the units of y; None without residuals)."""
    best = _refine(law, u, y, law.starts(u, y), None, tolerance=1e-12)
    scale = None
    # A wild point widens the scale that it is measured by, until the fit has let go of it.
    for _ in range(_PASSES):
        residuals = law.curve(best, u) - y
        deviation = float(numpy.median(numpy.abs(residuals - numpy.median(residuals))))
        if deviation < 1e-9 * numpy.abs(y).max():
            break
        scale = _HUBER * _NORMAL_MAD * deviation * math.sqrt(len(u) / (len(u) - 3))
        best = _refine(law, u, y, [best, *law.starts(u, y)], scale, tolerance=1e-12)
    return best, scale


def _refine(
    law: _Form, u: Array, y: Array, starts: list[Array], scale: float | None, *, tolerance: float, count: int = _REFINED
) -> Array:
    """The best of the fits from the best `count` starts; by least squares, with `scale` by Huber's loss."""
    try:
        from scipy.optimize import least_squares
    except ModuleNotFoundError as error:
        raise InputError("fits need scipy; pip install megatron-ptrl[eval]") from error

    # Parts of the largest value, or of Huber's scale, so that the tolerances mean the same for every metric.
    size = float(numpy.abs(y).max()) if scale is None else scale
    bounds = (numpy.array(law.lower), numpy.array(law.upper))

    def residuals(params: Array) -> Array:
        return (law.curve(params, u) - y) / size

    inside = [numpy.clip(start, bounds[0], bounds[1]) for start in starts]
    inside.sort(key=lambda start: float((residuals(start) ** 2).sum()))
    options = {"bounds": bounds, "x_scale": "jac", "xtol": tolerance, "ftol": tolerance, "gtol": tolerance}
    loss = "linear" if scale is None else "huber"
    found = [least_squares(residuals, start, loss=loss, max_nfev=200, **options) for start in inside[:count]]
    return min(found, key=lambda result: result.cost).x


def _again(law: _Form, u: Array, y: Array, best: Array, scale: float | None) -> Array:
    """The fit to resampled points, from the fit to the points themselves and from the best start of its own."""
    own = min(law.starts(u, y), key=lambda start: float(((law.curve(start, u) - y) ** 2).sum()))
    return _refine(law, u, y, [best, own], scale, tolerance=1e-7)


def _resample(residuals: Array, resamples: int, rng: numpy.random.Generator) -> Array:
    """(resamples, points): blocks of neighbouring residuals, from a ring of all of them."""
    count = len(residuals)
    centred = (residuals - residuals.mean()) * math.sqrt(count / (count - 3))
    block = max(1, round(count ** (1 / 3)))
    starts = rng.integers(count, size=(resamples, -(-count // block)))
    places = (starts[:, :, None] + numpy.arange(block)) % count
    return centred[places.reshape(resamples, -1)[:, :count]]
