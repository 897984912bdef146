"""Seeds -> documents, held-out sums and a tokenizer for run.py.

python make_data.py FOLDER [--documents 16000] [--held_out 200]

documents.jsonl   {"id": ..., "text": ..., "kind": "stated" or "open"}
held_out.jsonl    {"beginning": ..., "things": ..., "total": ...} with operands of their own
tokenizer.json    byte-level BPE in which every digit is a token of its own
"""

import argparse
import dataclasses
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

from sums import draw_sum, think
from toy_data import train_digit_tokenizer, write_lines

VOCAB_SIZE = 512


def documents(count: int, seed: int) -> Iterable[dict[str, Any]]:
    """`count` training documents, every second one with its total."""
    rng = random.Random(seed)
    for number in range(count):
        stated = number % 2 == 0
        text = draw_sum(rng, held_out=False).text(stated=stated)
        yield {"id": f"{number:06}", "text": text, "kind": "stated" if stated else "open"}


def tokenizer_texts() -> Iterable[str]:
    """Documents with their thinking."""
    rng = random.Random(0)
    for line in documents(3000, seed=0):
        yield f"{line['text']}\n\n<think>{think(line['text'], rng)}</think>"


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=16_000)
    parser.add_argument("--held_out", type=int, default=200)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "documents.jsonl", documents(arguments.documents, seed=1))
    held_out = random.Random(2)
    sums = (dataclasses.asdict(draw_sum(held_out, held_out=True)) for _ in range(arguments.held_out))
    write_lines(folder / "held_out.jsonl", sums)
    train_digit_tokenizer(tokenizer_texts(), folder / "tokenizer.json", VOCAB_SIZE)
    print(f"{folder}: {arguments.documents:,} documents, {arguments.held_out} held-out sums")


if __name__ == "__main__":
    main()
