"""Prompt files + an engine -> samples.jsonl, a line for each response with what it is worth.

read  ->  the prompts that have not all their samples  ->  Responder, a round at a time  ->  Lines
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_ptrl.config import AnswersConfig, EvaluateConfig
from megatron_ptrl.data.chat import ChatTemplate, encode_prompt
from megatron_ptrl.data.problems import Asked, read_prompts
from megatron_ptrl.data.prompts import PlacedPrompt
from megatron_ptrl.data.sidecar import Durably
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.evaluation.lines import Line, Lines, read_lines
from megatron_ptrl.training.rollouts import Group, Responder, Round, check_judged

SAMPLES, REJECTS = "samples.jsonl", "rejects.jsonl"
# Rounds of a few batches: rows that end early are replaced, and a kill costs no more than a round.
_BATCHES_OF_A_ROUND = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Usable:
    """A prompt that there is room for."""

    placed: PlacedPrompt
    file: str
    """The name of its file."""


def read(
    config: EvaluateConfig, tokenizer: Tokenizer, template: ChatTemplate, window: int
) -> tuple[list[Usable], list[Line]]:
    """(usable prompts in the order of their lines, the others as lines of the rejects).

    window: tokens that a prompt shares with its response
    Raises InputError as `read_prompts` does, and where no prompt can be used.
    """
    found: list[Usable] = []
    rejects: list[Line] = []
    room = window - (config.rollout.max_tokens or 1)
    for asked in read_prompts(config.prompts, config.problem_template):
        if asked.prompt is None:
            rejects.append(_reject(asked, "unreadable", asked.problem))
            continue
        try:
            ids = encode_prompt(template, tokenizer, asked.prompt.messages).tolist()
        except (InputError, TypeError) as error:  # the tokenizer's word for half of a surrogate pair
            rejects.append(_reject(asked, "unreadable", str(error)))
            continue
        if 0 < len(ids) <= room:
            found.append(Usable(PlacedPrompt(asked.place, asked.prompt, ids), asked.file))
        else:
            detail = f"{len(ids)} tokens; expected 1 to {room}, which leaves room for a response"
            rejects.append(_reject(asked, "too_long", detail))
    if not found:
        raise InputError(f"prompts: none can be used; {rejects[-1]['where']}: {rejects[-1]['detail']}")
    return found, rejects


def _reject(asked: Asked, reason: str, detail: str) -> Line:
    return {"where": asked.where, "file": asked.file, "reason": reason, "detail": detail}


def keep_whole(output: Path, samples: int, rejects: list[Line]) -> list[int]:
    """Write the rejects; places of the prompts that have all their samples, the only ones whose lines stay."""
    counts: dict[int, int] = {}
    for line in read_lines(output / SAMPLES):
        if not isinstance(line.get("place"), int):
            raise InputError(f"{output / SAMPLES}: a line has no place; remove the folder to start over")
        counts[line["place"]] = counts.get(line["place"], 0) + 1
    whole = {place for place, count in counts.items() if count == samples}
    Lines(output / SAMPLES, keep=lambda line: line["place"] in whole).close()
    with Durably(str(output / REJECTS)) as stream:
        stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rejects).encode())
    return sorted(whole)


def answer(
    missing: list[Usable],
    settings: AnswersConfig,
    responder: Responder,
    lines: Lines | None,
    tell: Callable[[int, int], Any],
) -> None:
    """Have all of `missing` answered and judged; `lines` gets the samples, on rank 0. Collective over all ranks.

    tell: called with how many are done, and of how many
    Raises InputError when too many of a round could not be judged; the rounds before it are kept.
    """
    ranks = parallel_state.get_data_parallel_world_size()
    at_once = ranks * max(1, _BATCHES_OF_A_ROUND * settings.at_once // settings.samples)
    for begin in range(0, len(missing), at_once):
        part = missing[begin : begin + at_once]
        groups = responder.answer([usable.placed for usable in part], Round())
        check_judged(groups, settings.max_unjudged)
        if lines:
            lines.add(
                _sample(group, index, usable.file, responder)
                for group, usable in zip(groups, part, strict=True)
                for index in range(len(group.responses))
            )
        tell(begin + len(part), len(missing))


def _sample(group: Group, index: int, file: str, responder: Responder) -> Line:
    response, prompt = group.responses[index], group.placed.prompt
    return {
        "place": group.placed.place,
        "file": file,
        "prompt_id": prompt.id,
        "task": prompt.task,
        "messages": prompt.messages,
        "target": prompt.target,
        "index": index,
        "text": responder.text(response.token_ids),
        "token_ids": response.token_ids.tolist(),
        "finish_reason": response.finish_reason,
        **dataclasses.asdict(response.judgement),
    }
