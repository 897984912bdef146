"""The responses of a step <-> rollouts/step_*.jsonl: to be read, shown, and used again without generating.

One line for each response: what `Rollout` and `Judgement` hold, the prompt's place, task, messages and target, its
advantage.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

from megatron_ptrl.data.prompts import PlacedPrompt
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Judgement, to_line
from megatron_ptrl.training.rollouts import Group, Response, Round


def path_of(folder: Path, step: int) -> Path:
    """Of a step's file."""
    return folder / f"step_{step:08d}.jsonl"


def write(
    folder: Path, step: int, found: Round, advantages: Sequence[Sequence[float]], text: Callable[[numpy.ndarray], str]
) -> str | None:
    """Write a step's responses; what went wrong, or None. A step's file is there whole or not at all.

    advantages: of each group's responses     text: decodes a response
    """
    path = path_of(folder, step)
    partial = path.with_name(f".{path.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            for group, of_group in zip(found.groups, advantages, strict=True):
                for index, (response, advantage) in enumerate(zip(group.responses, of_group, strict=True)):
                    line = _line(group, index, response) | {"text": text(response.token_ids), "advantage": advantage}
                    stream.write(to_line({"step": step, **line}) + b"\n")
            whole = {"step": step, "next_place": found.next_place, "passes": found.passes}
            stream.write(to_line({**whole, "responses": sum(len(group.responses) for group in found.groups)}) + b"\n")
        os.replace(partial, path)
    except OSError as error:
        # A part would keep the disk full, and the next step's would be one more.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        return f"step {step}: its responses were not written to {path}: {error.strerror or error}; training goes on"
    return None


def _line(group: Group, index: int, response: Response) -> dict[str, Any]:
    prompt = group.placed.prompt
    return {
        "place": group.placed.place,
        "prompt_id": prompt.id,
        "task": prompt.task,
        "messages": prompt.messages,
        "target": prompt.target,
        "index": index,
        "finish_reason": response.finish_reason,
        "weight_version": group.weight_version,
        "prompt_ids": group.placed.ids,
        "token_ids": response.token_ids.tolist(),
        "logprobs": [float(value) for value in response.logprobs],
        **dataclasses.asdict(response.judgement),
    }


def read(folder: Path, step: int, at: Callable[[int], PlacedPrompt]) -> Round:
    """What `write` wrote, with the prompts that `at` finds at their places.

    Raises InputError for a missing file, one that is cut off, or one of other prompts.
    """
    path = path_of(folder, step)
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise InputError(f"rollout.replay: {path}: {error.strerror}; expected a file for every step") from error
    except ValueError as error:
        raise InputError(f"rollout.replay: {path} is not JSON lines: {error}") from error
    if not lines or lines[-1].get("responses") != len(lines) - 1:
        raise InputError(f"rollout.replay: {path} is cut off; expected its last line to say how many responses it has")
    try:
        by_place: dict[int, list[dict[str, Any]]] = {}
        for line in lines[:-1]:
            by_place.setdefault(line["place"], []).append(line)
        groups = [_group(path, at(place), group) for place, group in by_place.items()]
        return Round(groups, next_place=lines[-1]["next_place"], passes=lines[-1]["passes"])
    except (KeyError, TypeError, ValueError) as error:
        told = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"rollout.replay: {path}: a line {told}; expected lines as ptrl rl dumps them") from error


def _group(path: Path, placed: PlacedPrompt, lines: list[dict[str, Any]]) -> Group:
    if any(line["prompt_ids"] != placed.ids for line in lines):
        raise InputError(
            f"rollout.replay: {path} has another prompt at place {placed.place} than prompts.files; replay with the "
            "files, seed and tokenizer that it was written with"
        )
    return Group(placed, [_response(path, placed, line) for line in lines], lines[0]["weight_version"])


def _response(path: Path, placed: PlacedPrompt, line: dict[str, Any]) -> Response:
    # A dump has null for what is no number, and that is NaN here.
    logprobs = numpy.array(line["logprobs"], numpy.float32)
    ids = numpy.array(line["token_ids"], numpy.int32)
    judgement = Judgement(**{field.name: line[field.name] for field in dataclasses.fields(Judgement)})
    if not len(ids) or len(ids) != len(logprobs) or not numpy.isfinite(logprobs).all():
        raise InputError(
            f"rollout.replay: {path}, place {placed.place}, response {line['index']}: {len(ids)} tokens and "
            f"{int(numpy.isfinite(logprobs).sum())} finite log-probabilities; expected at least one token, and as many"
        )
    return Response(ids, logprobs, line["finish_reason"], judgement)
