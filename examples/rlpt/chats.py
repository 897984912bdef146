"""Prompts -> conversations for the cold start: each prompt with an answer that thinks and predicts between the tags.

python chats.py OUTPUT.jsonl PROMPTS.jsonl ...

What the answers think follows from the prompts' stories, their predictions are the prompts' targets. Every third answer
to a prompt of task asr goes on for the sentence behind its target too, as models do.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from stories import find_story, steps, think

from megatron_ptrl.records import Prompt
from megatron_ptrl.rollout.gate import CLOSE_TAG, OPEN_TAG


def answer(thinking: str, prediction: str) -> str:
    """A response in the format that the rewards ask for. Words are the same tokens here as within a text: behind a
    space."""
    return f"Steps: {thinking} {OPEN_TAG} {prediction} {CLOSE_TAG}"


def respond(prompt: Prompt, *, further: bool) -> str:
    """The answer to a prompt; `further`: for one sentence more, where there is one."""
    story = find_story(prompt.messages[0]["content"])
    if prompt.task == "rlvr":
        double = f" {think(story, 4)}" if prompt.metadata["question"] else ""
        return answer(steps(story) + double, prompt.target)
    sentence = prompt.metadata["segment"]
    if not further or prompt.task != "asr" or sentence == 4:
        return answer(think(story, sentence), prompt.target)
    both = think(story, sentence), think(story, sentence + 1)
    return answer(" ".join(both), " ".join(story.sentences[sentence - 1 : sentence + 1]))


def conversations(paths: list[Path]) -> list[dict[str, Any]]:
    """All prompts of all files, answered, in an order by chance."""
    rng = random.Random(5)
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            prompt = Prompt.from_json(line, f"{path}:{number}")
            reply = {"role": "assistant", "content": respond(prompt, further=rng.random() < 1 / 3)}
            found.append({"messages": [*prompt.messages, reply]})
    rng.shuffle(found)
    return found


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("prompts", type=Path, nargs="+")
    arguments = parser.parse_args()
    found = conversations(arguments.prompts)
    arguments.output.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    print(f"{arguments.output}: {len(found)} conversations")


if __name__ == "__main__":
    main()
