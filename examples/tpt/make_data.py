"""Seeds -> documents, held-out sums and a tokenizer for run.py.

python make_data.py FOLDER [--documents 12000] [--held_out 200]

documents.jsonl   {"id": ..., "text": ..., "kind": "stated" or "open"}
held_out.jsonl    {"beginning": ..., "things": ..., "total": ...} with operands of their own
tokenizer.json    byte-level BPE in which every digit is a token of its own
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from sums import draw_sum, think

EOD = "<|endoftext|>"
VOCAB_SIZE = 512


def documents(count: int, seed: int) -> Iterable[dict[str, Any]]:
    """`count` training documents, every second one with its total."""
    rng = random.Random(seed)
    for number in range(count):
        stated = number % 2 == 0
        text = draw_sum(rng, held_out=False).text(stated=stated)
        yield {"id": f"{number:06}", "text": text, "kind": "stated" if stated else "open"}


def train_tokenizer(path: Path) -> None:
    """A BPE over documents and thinking. Whole numbers as tokens would hide the digits that the steps work with."""
    split = tokenizers.pre_tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOD],
        initial_alphabet=split.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    texts = (line["text"] for line in documents(3000, seed=0))
    bpe.train_from_iterator((f"{text}\n\n<think>{think(text, rng)}</think>" for text in texts), trainer)
    bpe.save(str(path))


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line) + "\n")


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=12_000)
    parser.add_argument("--held_out", type=int, default=200)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "documents.jsonl", documents(arguments.documents, seed=1))
    held_out = random.Random(2)
    sums = (dataclasses.asdict(draw_sum(held_out, held_out=True)) for _ in range(arguments.held_out))
    write(folder / "held_out.jsonl", sums)
    train_tokenizer(folder / "tokenizer.json")
    print(f"{folder}: {arguments.documents:,} documents, {arguments.held_out} held-out sums")


if __name__ == "__main__":
    main()
