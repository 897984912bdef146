"""metrics.jsonl -> the training and the evaluation lines of a run.

A killed and resumed run may log a step twice; the later line is the one whose weights live on, so it wins.
"""

import bisect
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ptrl.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunMetrics:
    """One run's metrics.jsonl, in order of its steps."""

    path: Path
    """The run directory."""
    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str, lines: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
        """Steps and values of `key` in `lines`, where it is a finite number."""
        pairs = [(line["step"], line[key]) for line in lines if is_finite(line.get(key))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def tokens_at(self, step: float) -> float:
        """Consumed tokens when `step` was done: an evaluation line has only its step. Between logged steps, a line."""
        points = [(0, 0), *((li["step"], li["consumed_tokens"]) for li in self.train if "consumed_tokens" in li)]
        after = min(max(bisect.bisect_left(points, (step,)), 1), len(points) - 1)
        (left, tokens), (right, more) = points[after - 1], points[after]
        return tokens + (more - tokens) * (step - left) / max(right - left, 1)


def read_metrics(run: Path) -> RunMetrics:
    """The metrics of the run directory `run`.

    A last line that a crash cut off is left out with a warning, lines of other kinds silently. Raises InputError when
    there is no metrics.jsonl, when it holds no training or evaluation line, at any other line that is not a JSON
    object, and at a training or evaluation line without an integer `step`.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{run} has no metrics.jsonl; expected a run directory, as `ptrl pretrain` makes them")
    train: dict[int, dict[str, Any]] = {}
    valid: dict[int, dict[str, Any]] = {}
    # Undecodable bytes are replaced so that they fail as JSON does, with the number of their line.
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            record = parse_line(line, f"{path}:{number}")
            if "valid_ce" in record or "valid_loss" in record:
                valid[_step(record, f"{path}:{number}")] = record
            elif "loss" in record or "ce" in record:
                train[_step(record, f"{path}:{number}")] = record
    if not train and not valid:
        raise InputError(f"{path} has no training or evaluation line yet; expected at least one")
    return RunMetrics(run, [train[step] for step in sorted(train)], [valid[step] for step in sorted(valid)])


def read_evaluations(run: Path) -> list[tuple[float, dict[str, Any]]]:
    """(training tokens, figures by name) of each evaluation of a checkpoint of the run, by `ptrl evaluate`, in order.

    Raises InputError for results that are none.
    """
    found = []
    for path in sorted(run.glob("evaluations/*/results.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            found.append((float(results["consumed_tokens"]), dict(results["figures"])))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: {error!r}; expected results as `ptrl evaluate` writes them") from error
    return sorted(found, key=lambda pair: pair[0])


def parse_line(line: str, where: str) -> dict[str, Any]:
    """The object on `line`; an empty one for a blank line and for a last line that was cut off.

    Raises InputError, which names `where`, for anything else.
    """
    try:
        record = json.loads(line) if line.strip() else {}
    except json.JSONDecodeError as error:
        if line.endswith("\n"):
            raise InputError(f"{where} is not JSON ({error.msg}): {line.strip()[:80]}") from None
        logger.warning("%s is cut off and left out", where)
        return {}
    if not isinstance(record, dict):
        raise InputError(f"{where} is {line.strip()[:80]}; expected a JSON object")
    return record


def _step(record: dict[str, Any], where: str) -> int:
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise InputError(f"{where} has step {json.dumps(step)}; expected an integer")
    return step


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that can be drawn: diverged runs log NaN, and some steps have no gradient norm."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
