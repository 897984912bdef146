"""Seeds -> corpora, prompts and a tokenizer for the loop of run.py.

python make_data.py FOLDER [--pretrain 30000] [--midtrain 9000] [--prompts 4000] [--held_out 200]

pretrain.jsonl, midtrain.jsonl   {"text": ...}: problems, a third of them solved wrongly, and prose, half and half
prompts.jsonl                    {"prompt": ..., "answer": ...} for the reinforcement, same operands as above
held_out.jsonl                   {"prompt": ..., "solution": ..., "answer": ...} with operands of their own
held_out_prose.jsonl             {"text": ...}
tokenizer.json                   byte-level BPE in which every digit is a token of its own
"""

import argparse
import dataclasses
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

from problems import draw_problem, draw_prose
from toy_data import train_digit_tokenizer, write_lines

VOCAB_SIZE = 512
WRONG = 1 / 3


def documents(count: int, seed: int) -> Iterable[dict[str, Any]]:
    """`count` training documents."""
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < 0.5:
            yield {"text": draw_prose(rng)}
        else:
            problem = draw_problem(rng, held_out=False, wrong=rng.random() < WRONG)
            yield {"text": problem.prompt + problem.solution}


def problems(count: int, seed: int, *, held_out: bool) -> Iterable[dict[str, Any]]:
    """`count` rightly solved problems."""
    rng = random.Random(seed)
    for _ in range(count):
        yield dataclasses.asdict(draw_problem(rng, held_out=held_out))


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pretrain", type=int, default=30_000, help="documents")
    parser.add_argument("--midtrain", type=int, default=9_000, help="documents")
    parser.add_argument("--prompts", type=int, default=4000)
    parser.add_argument("--held_out", type=int, default=200, help="problems, and as many documents of prose")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "pretrain.jsonl", documents(arguments.pretrain, seed=1))
    write_lines(folder / "midtrain.jsonl", documents(arguments.midtrain, seed=2))
    write_lines(folder / "prompts.jsonl", problems(arguments.prompts, seed=3, held_out=False))
    write_lines(folder / "held_out.jsonl", problems(arguments.held_out, seed=4, held_out=True))
    prose = random.Random(5)
    write_lines(folder / "held_out_prose.jsonl", ({"text": draw_prose(prose)} for _ in range(arguments.held_out)))
    texts = (line["text"] for line in documents(5000, seed=0))
    train_digit_tokenizer(texts, folder / "tokenizer.json", VOCAB_SIZE)
    print(f"{folder}: {arguments.pretrain:,} documents to pre-train on, {arguments.midtrain:,} to mid-train on")


if __name__ == "__main__":
    main()
