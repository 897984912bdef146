"""What the make_data.py of the examples share: JSONL files, and a tokenizer for texts that calculate."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

EOD = "<|endoftext|>"


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line) + "\n")


def train_digit_tokenizer(texts: Iterable[str], path: Path, vocab_size: int) -> None:
    """A byte-level BPE in which a digit is a token: whole numbers would hide the digits that worked steps work with."""
    split = tokenizers.pre_tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=split.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(path))
