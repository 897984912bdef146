"""The files of an output of `ptrl segment`, and how one is written."""

import os
import secrets
from pathlib import Path

import numpy

KINDS = ("asr", "msr", "rejects")
"""What a part has lines of."""


class Files:
    """Where the stage keeps what."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.plan = output / "plan.json"
        self.punkt = output / "punkt.json"
        self.summary = output / "summary.json"
        self.parts = output / "parts"
        self.clean = output / "clean"
        self.duplicates = self.clean / "duplicates.npy"
        self.evaluation_runs = self.clean / "evaluation_runs.npy"

    def signatures(self, part: int) -> Path:
        return self.clean / "signatures" / f"{part:05d}.npy"

    def scores(self, part: int) -> Path:
        return self.clean / "scores" / f"{part:05d}.jsonl"

    def of_part(self, kind: str, part: int) -> Path:
        """`kind` is one of KINDS."""
        return self.parts / f"{kind}-{part:05d}.jsonl"

    def counts(self, part: int) -> Path:
        """There once the part is finished."""
        return self.parts / f"{part:05d}.json"


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all, also if several processes write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def save_array(path: Path, array: numpy.ndarray) -> None:
    """As `write_whole`, for numpy.load."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("wb") as stream:
        numpy.save(stream, array, allow_pickle=False)
    os.replace(temporary, path)
