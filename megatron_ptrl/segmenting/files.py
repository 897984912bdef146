"""The files of an output of `ptrl segment`, and how one is written."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy

from megatron_ptrl.errors import InputError

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


@contextmanager
def only_writer(files: Files) -> Iterator[None]:
    """The output is this process's own meanwhile. Raises InputError where it is another's."""
    with files.plan.open("rb+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{files.output}: another process is writing there; wait for its end, or choose another output"
            ) from error
        yield


def load_array(path: Path, dtype: numpy.dtype) -> numpy.ndarray:
    """What `save_array` wrote, mapped. Raises InputError for a file that is damaged."""
    try:
        array = numpy.load(path, mmap_mode="r")
        if array.dtype != dtype:
            raise ValueError(f"dtype {array.dtype}")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, and it is made again") from error
    return array


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
