"""rollouts/step_*.jsonl of RL runs -> one HTML page: prompts of the first, a middle and the last step, their responses
and what each was worth.

The prompts shown are the first of their step: nobody has chosen them.
"""

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation.html_page import visible, write_page
from megatron_ptrl.evaluation.metrics import is_finite, parse_line

SHOWN_STEPS, SHOWN_PROMPTS, SHOWN_RESPONSES = 3, 3, 8
_STEP = re.compile(r"step_(\d+)\.jsonl")

_STYLE = """
details { border-left: 0.4em solid #8888; padding-left: 0.8em; margin: 0.4em 0; }
details.right { border-color: #009e73; }
details.wrong { border-color: #d55e00; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class SampleGroup:
    """A prompt and some of its responses, as the lines of the dump have them."""

    step: int
    responses: list[dict[str, Any]]
    left_out: int
    """Further responses."""


def read_sample_rollouts(run: Path) -> list[SampleGroup]:
    """The first prompts of at most three of the steps that `run` has dumped; empty without a dump.

    A last line that a crash cut off is left out with a warning. Raises InputError, with file and line, at a line that
    is no response.
    """
    paths = sorted(path for path in (run / "rollouts").glob("step_*.jsonl") if _STEP.fullmatch(path.name))
    chosen = {0, len(paths) // 2, len(paths) - 1} if paths else set()
    assert len(chosen) <= SHOWN_STEPS
    return [group for number in sorted(chosen) for group in _groups(paths[number])]


def _groups(path: Path) -> list[SampleGroup]:
    by_place: dict[Any, list[dict[str, Any]]] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            record = parse_line(line, f"{path}:{number}")
            # The last line says how many responses there are.
            if not record or "prompt_id" not in record and "responses" in record:
                continue
            _check(record, f"{path}:{number}")
            if record["place"] not in by_place and len(by_place) == SHOWN_PROMPTS:
                break
            by_place.setdefault(record["place"], []).append(record)
    name = _STEP.fullmatch(path.name)
    assert name is not None
    return [
        SampleGroup(int(name[1]), group[:SHOWN_RESPONSES], max(len(group) - SHOWN_RESPONSES, 0))
        for group in by_place.values()
    ]


def _check(record: dict[str, Any], where: str) -> None:
    for name in ("prompt_id", "task", "text", "reason", "prediction", "finish_reason", "target"):
        if not isinstance(record.get(name), str):
            raise InputError(f"{where} has {name} {json.dumps(record.get(name))[:60]}; expected text")
    if not isinstance(record.get("place"), int):
        raise InputError(f"{where} has place {json.dumps(record.get('place'))[:60]}; expected an integer")
    if record.get("reward") is not None and not is_finite(record["reward"]):
        raise InputError(f"{where} has reward {json.dumps(record['reward'])[:60]}; expected a number or null")


def write_sample_rollouts(runs: dict[str, Path], output: Path) -> Path | None:
    """`output/rollouts.html` for the run directories `runs` by label; None where no run has dumped responses.

    A bar at its side says what a response was worth: green above 0, orange 0, grey for one that was not judged.
    Raises InputError as `read_sample_rollouts` does.
    """
    found = {label: groups for label, run in runs.items() if (groups := read_sample_rollouts(run))}
    if not found:
        return None
    note = "The first prompts of the first, a middle and the last step; open a line to read the response."
    parts = [f'<p class="note">{note}</p>']
    for label, groups in found.items():
        parts.append(f"<h2>{html.escape(label)}</h2>")
        parts += [_group(group) for group in groups]
    return write_page(output / "rollouts.html", "Sample rollouts", _STYLE, parts)


def _group(group: SampleGroup) -> str:
    first = group.responses[0]
    rewards = [response["reward"] for response in group.responses if response.get("reward") is not None]
    mean = f"mean reward {sum(rewards) / len(rewards):.3f}" if rewards else "none judged"
    title = f"Step {group.step:,}, {visible(first['task'])} {visible(first['prompt_id'])}: {mean}"
    more = f'<p class="note">{group.left_out} further responses are not shown.</p>' if group.left_out else ""
    responses = "\n".join(_response(response) for response in group.responses)
    return f"<h3>{title}</h3>\n{_prompt(first)}\n<p>Expected: {visible(first['target'])}</p>\n{responses}\n{more}"


def _prompt(record: dict[str, Any]) -> str:
    messages = record.get("messages")
    if not isinstance(messages, list):
        return '<p class="note">This dump has no prompts in it.</p>'
    turns = (f"{message.get('role', '')}: {message.get('content', '')}" for message in messages)
    return f'<div class="text">{visible(chr(10).join(turns))}</div>'


def _response(record: dict[str, Any]) -> str:
    reward, advantage = record.get("reward"), record.get("advantage")
    worth = "" if reward is None else "right" if reward > 0 else "wrong"
    told = [
        f"reward {'none' if reward is None else f'{reward:g}'}",
        visible(record["reason"]),
        *([f"advantage {advantage:+.3f}"] if is_finite(advantage) else []),
        f"{len(record.get('token_ids', []))} tokens",
        *(["cut off"] if record["finish_reason"] == "length" else []),
    ]
    prediction = f"; prediction: {visible(record['prediction'])}" if record["prediction"] else ""
    return (
        f'<details class="{worth}"><summary>{", ".join(told)}{prediction}</summary>\n'
        f'<div class="text">{visible(record["text"])}</div></details>'
    )
