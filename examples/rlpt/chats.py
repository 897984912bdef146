"""Prompts -> conversations for the cold start: each prompt with an answer that thinks and predicts between the tags.

python chats.py OUTPUT.jsonl PROMPTS.jsonl ...

What the answers think follows from the prompts' stories. Two in five misread a story by one or two things and are
wrong to the end, so that the cold start knows the format and how to think, and is careless: there is something to
reinforce. Every third answer to a prompt of task asr goes on for the sentence behind its target too, as models do.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

from stories import find_story, steps, think
from toy_data import write_lines

from megatron_ptrl.records import Prompt
from megatron_ptrl.rollout.gate import CLOSE_TAG, OPEN_TAG


def answer(thinking: str, prediction: str) -> str:
    """A response in the format that the rewards ask for. Words are the same tokens here as within a text: behind a
    space."""
    return f"Steps: {thinking} {OPEN_TAG} {prediction} {CLOSE_TAG}"


def respond(prompt: Prompt, *, further: bool, misread: int = 0) -> str:
    """The answer to a prompt; `further`: for one sentence more, where there is one; `misread`: by so many things."""
    story = find_story(prompt.messages[0]["content"])
    story = replace(story, had=story.had + misread)
    if prompt.task == "rlvr":
        question = prompt.metadata["question"]
        double = f" {think(story, 4)}" if question else ""
        return answer(steps(story) + double, str(story.answer(question)))
    first = prompt.metadata["segment"]
    last = first + (further and prompt.task == "asr" and first < 4)
    thinking = (think(story, sentence) for sentence in range(first, last + 1))
    return answer(" ".join(thinking), " ".join(story.sentences[first - 1 : last]))


def conversations(paths: list[Path]) -> list[dict[str, Any]]:
    """All prompts of all files, answered, in an order by chance."""
    rng = random.Random(5)
    found = []
    for path in paths:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            prompt = Prompt.from_json(line, f"{path}:{number}")
            misread = rng.randint(1, 2) if rng.random() < 0.4 else 0
            reply = respond(prompt, further=rng.random() < 1 / 3, misread=misread)
            found.append({"messages": [*prompt.messages, {"role": "assistant", "content": reply}]})
    rng.shuffle(found)
    return found


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("prompts", type=Path, nargs="+")
    arguments = parser.parse_args()
    found = conversations(arguments.prompts)
    write_lines(arguments.output, found)
    print(f"{arguments.output}: {len(found)} conversations")


if __name__ == "__main__":
    main()
