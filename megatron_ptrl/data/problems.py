"""Prompt files of an evaluation -> prompts in the order of their lines, each with a name that tells its file.

{"id", "task", "messages", "target", "reference"}   as `ptrl segment` writes them
{"question", "answer"}                              a problem; GSM8K's worked answers end with "#### 72"
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Prompt

RESULT_MARK = "####"


@dataclass(frozen=True, slots=True)
class Asked:
    """A line of a prompt file."""

    place: int
    """Counted over the lines of all files that are not blank: what the draws depend on."""
    file: str
    """The file's name without its suffix."""
    where: str
    prompt: Prompt | None
    """None for a line that is no prompt; `problem` says why."""
    problem: str = ""


def read_prompts(paths: list[str], template: str) -> Iterator[Asked]:
    """The lines of `paths`.

    template: what is asked where a line has a question; {question} stands for it
    Raises InputError for a file that cannot be read or has no line, and for two files of one name, whose figures
    could not be told apart. A line that is no prompt is told, not raised.
    """
    names = [Path(path).name.removesuffix(".jsonl") for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"prompts: two files are called {name}, by which the figures are named; rename one")
    place = 0
    for name, path in zip(names, paths, strict=True):
        before = place
        try:
            with Path(path).open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield _asked(place, name, f"{path}:{number}", line, number, template)
                        place += 1
        except OSError as error:
            raise InputError(f"prompts: {path}: {error.strerror}; expected a JSONL file") from error
        if place == before:
            raise InputError(f"prompts: {path} has no line; expected a prompt on each")


def _asked(place: int, name: str, where: str, line: bytes, number: int, template: str) -> Asked:
    try:
        record = json.loads(line)
        if isinstance(record, dict) and "question" in record and "messages" not in record:
            prompt = _of_question(record, name, number, template)
        else:
            prompt = Prompt.from_json(line, where)
        return Asked(place, name, where, prompt)
    except (InputError, ValueError) as error:
        return Asked(place, name, where, None, str(error))


def _of_question(record: dict[str, Any], name: str, number: int, template: str) -> Prompt:
    question, answer = record["question"], record.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise InputError("question is empty; expected text")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
        raise InputError(f"answer is {json.dumps(answer)[:60]}; expected text or a number")
    target = str(answer).rpartition(RESULT_MARK)[2].strip()
    if not target:
        raise InputError(f"nothing stands behind {RESULT_MARK} in the answer; expected the result")
    content = template.replace("{question}", question.strip())
    return Prompt(
        id=str(record.get("id", f"{name}-{number}")),
        task="rlvr",
        messages=[{"role": "user", "content": content}],
        target=target,
        reference=target,
    )
