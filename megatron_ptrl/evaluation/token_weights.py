"""token_weights.jsonl of ReMiT runs -> one HTML page: the last logged documents, every token coloured by its weight.

{"step": 40, "text": ["Q", ": "], "weight": [1.2, 0.0], "gap": [0.7, 0.0], "loss_mask": [1, 0]}   a line a row
"""

import html
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation.html_page import visible, write_page
from megatron_ptrl.evaluation.metrics import is_finite, parse_line

SHOWN_DOCUMENTS = 6
# A background stronger than this hides dark letters on a light page and light ones on a dark page.
_STRONGEST = 0.6
_BELOW, _ABOVE = "#0072b2", "#d55e00"

_STYLE = f"""
:root {{ --below: {_BELOW}; --above: {_ABOVE}; }}
.below {{ background: color-mix(in srgb, var(--below) var(--much), transparent); }}
.above {{ background: color-mix(in srgb, var(--above) var(--much), transparent); }}
.masked {{ color: #808080; }}
"""


_GOOD: dict[str, tuple[Callable[[float], bool], str]] = {
    "weight": (lambda value: value >= 0, "a number >= 0"),
    "gap": (lambda value: True, "a finite number"),
    "loss_mask": (lambda value: value in (0, 1), "0 or 1"),
}


@dataclass(frozen=True)
class WeightedRow:
    """One row of a batch; the lists are of one length, an entry a token."""

    step: int
    text: list[str]
    weight: list[float]
    gap: list[float]
    """log p of the reference less log p of the model, nats."""
    loss_mask: list[float]
    """0 where the token is in no loss."""


def read_token_weights(run: Path) -> list[WeightedRow]:
    """The last rows that the run directory `run` has logged, at most `SHOWN_DOCUMENTS`; none without the file.

    A last line that a crash cut off is left out with a warning. Raises InputError, with file and line, at any line
    that is not such an object: a missing list, lists of several lengths, a weight below 0 or a value that is no number.
    """
    path = run / "token_weights.jsonl"
    if not path.is_file():
        return []
    rows: deque[WeightedRow] = deque(maxlen=SHOWN_DOCUMENTS)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            record = parse_line(line, f"{path}:{number}")
            if record:
                rows.append(_checked(record, f"{path}:{number}"))
    return list(rows)


def _checked(record: dict[str, Any], where: str) -> WeightedRow:
    def refuse(found: str, expected: str) -> NoReturn:
        raise InputError(f"{where} has {found}; expected {expected}")

    step, text = record.get("step"), record.get("text")
    if isinstance(step, bool) or not isinstance(step, int):
        refuse(f"step {json.dumps(step)}", "an integer")
    if not isinstance(text, list) or not text or not all(isinstance(token, str) for token in text):
        refuse(f"text {json.dumps(text)[:60]}", "a list of strings, one a token")
    for name in _GOOD:
        values = record.get(name)
        if not isinstance(values, list) or len(values) != len(text):
            size = f"{len(values)} entries" if isinstance(values, list) else json.dumps(values)[:60]
            refuse(f"{name} {size}", f"a list of {len(text)} numbers, one a token")
        good, expected = _GOOD[name]
        for i, value in enumerate(values):
            if not (is_finite(value) and good(value)):
                refuse(f"{name}[{i}] {json.dumps(value)[:60]}", expected)
    return WeightedRow(step, text, record["weight"], record["gap"], record["loss_mask"])


def write_token_weights(runs: dict[str, Path], output: Path) -> Path | None:
    """`output/token_weights.html` for the run directories `runs` by label; None where no run has logged a row.

    Below 1 a token is blue, above it orange, the stronger the further from 1 in comparison with all tokens of the page;
    one that is in no loss is grey. Weight and gap stand in its tooltip. Raises InputError as `read_token_weights` does.
    """
    rows = {label: read_token_weights(run) for label, run in runs.items()}
    rows = {label: found for label, found in rows.items() if found}
    if not rows:
        return None
    shown = [pair for found in rows.values() for row in found for pair in zip(row.weight, row.loss_mask, strict=True)]
    weights = [weight for weight, mask in shown if mask]
    low, high = min(weights, default=1.0), max(weights, default=1.0)
    furthest = max(1 - low, high - 1, 1e-9)
    parts = [_legend(low, high, furthest)]
    for label, found in rows.items():
        parts.append(f"<h2>{html.escape(label)}</h2>")
        parts += [_document(row, furthest) for row in found]
    return write_page(output / "token_weights.html", "Token weights", _STYLE, parts)


def _legend(low: float, high: float, furthest: float) -> str:
    shades = [low + (high - low) * i / 8 for i in range(9)] if high > low else [low]
    swatches = "".join(_span(f" {weight:.2f} ", weight, furthest) for weight in shades)
    return (
        f'<p>Weight of a token in the loss: {swatches} <span class="masked"> in no loss </span><br>'
        '<span class="note">Point at a token for its weight and its gap, log p of the reference less log p of the '
        "model in nats.</span></p>"
    )


def _document(row: WeightedRow, furthest: float) -> str:
    spans = []
    for text, weight, gap, mask in zip(row.text, row.weight, row.gap, row.loss_mask, strict=True):
        if mask:
            spans.append(_span(text, weight, furthest, f"weight {weight:.4f}, gap {gap:+.4f}"))
        else:
            spans.append(f'<span class="masked" title="in no loss">{_visible(text)}</span>')
    counted = [weight for weight, mask in zip(row.weight, row.loss_mask, strict=True) if mask]
    mean = f"mean weight {sum(counted) / len(counted):.4f}" if counted else "none in the loss"
    head = f"<h3>Step {row.step:,}: {len(row.text):,} tokens, {mean}</h3>"
    return f'{head}\n<div class="text">{"".join(spans)}</div>'


def _span(text: str, weight: float, furthest: float, title: str = "") -> str:
    side = "below" if weight < 1 else "above"
    much = round(100 * _STRONGEST * abs(weight - 1) / furthest)
    hover = f' title="{html.escape(title)}"' if title else ""
    return f'<span class="{side}" style="--much: {much}%"{hover}>{_visible(text)}</span>'


def _visible(text: str) -> str:
    return visible(text, line_end="↵")
