"""Seeds -> documents, questions and a tokenizer for run.py.

python make_data.py FOLDER [--pretrain 6000] [--cold_start 480] [--rl 700] [--held_out 32]

pretrain.jsonl              {"id": ..., "text": ...} stories with their ends, as many with workings
NAME.jsonl, NAME/questions.jsonl   further stories, and prompts of task rlvr about them: cold_start, rl, held_out
tokenizer.json              byte-level BPE
"""

import argparse
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

from chats import answer
from stories import Story, draw_story, think
from toy_data import write_lines

from megatron_ptrl.data.chat import PlainTemplate
from megatron_ptrl.data.tokenizer import train_tokenizer

VOCAB_SIZE = 512
SETS = ("cold_start", "rl", "held_out")


def pretraining(count: int) -> Iterator[dict[str, Any]]:
    """`count` stories that are told to their end, and as many that are worked out sentence by sentence."""
    rng = random.Random(1)
    for number in range(count):
        yield {"id": f"{number:06}", "text": draw_story(rng, held_out=False).text}
        story = draw_story(rng, held_out=False)
        rest = [f"Steps: {think(story, i)} {story.sentences[i - 1]}" for i in (2, 3, 4)]
        yield {"id": f"{number:06}w", "text": " ".join([story.sentences[0], *rest])}


def questions(stories: Iterable[Story]) -> Iterator[dict[str, Any]]:
    """Two about each story."""
    for number, story in enumerate(stories):
        for question in (0, 1):
            yield {
                "id": f"{number:06}/{question}",
                "task": "rlvr",
                "messages": [{"role": "user", "content": story.question(question)}],
                "target": str(story.answer(question)),
                "reference": str(story.answer(question)),
                "metadata": {"question": question},
            }


def tokenizer_texts() -> Iterator[str]:
    """Documents, and conversations as the cold start has them."""
    rng, template = random.Random(0), PlainTemplate()
    for line in pretraining(1500):
        yield line["text"]
    for _ in range(1500):
        story = draw_story(rng, held_out=False)
        messages = [
            {"role": "user", "content": " ".join(story.sentences[:2]) + "\nWhat comes next?"},
            {"role": "assistant", "content": answer(think(story, 3), story.sentences[2])},
            {"role": "user", "content": " ".join(story.sentences[:1]) + " <MASK>\nWhat is masked?"},
            {"role": "assistant", "content": answer(think(story, 2), story.sentences[1])},
            {"role": "user", "content": story.question(1)},
        ]
        yield template.render(messages, ask=True)


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pretrain", type=int, default=6000)
    for name, count in zip(SETS, (480, 700, 32), strict=True):
        parser.add_argument(f"--{name}", type=int, default=count)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "pretrain.jsonl", pretraining(arguments.pretrain))
    for seed, name in enumerate(SETS, start=2):
        rng = random.Random(seed)
        stories = [draw_story(rng, held_out=name == "held_out") for _ in range(getattr(arguments, name))]
        texts = ({"id": f"{number:06}", "text": story.text} for number, story in enumerate(stories))
        write_lines(folder / f"{name}.jsonl", texts)
        (folder / name).mkdir(exist_ok=True)
        write_lines(folder / name / "questions.jsonl", questions(stories))
    train_tokenizer(tokenizer_texts(), folder / "tokenizer.json", VOCAB_SIZE)
    print(f"{folder}: {arguments.pretrain:,} stories, {arguments.held_out} more that nothing is trained on")


if __name__ == "__main__":
    main()
