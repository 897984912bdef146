"""A JSONL file that grows while an evaluation runs, and what a kill leaves of it."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ptrl.errors import InputError
from megatron_ptrl.records import to_line

Line = dict[str, Any]


def read_lines(path: Path) -> Iterable[Line]:
    """The whole lines of `path`; none without the file. A last line that is torn is left out.

    Raises InputError for any other line that is no JSON object.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number} is not JSON: {error}; remove the folder to start over") from error
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number} is no JSON object; remove the folder to start over")
            yield record


class Lines:
    """A file that lines are added to, a few at a time; what was added before is on the disk when `add` returns."""

    def __init__(self, path: Path, keep: Callable[[Line], bool] = lambda line: True) -> None:
        """keep: which of the lines that are there stay; the file is written anew where one does not."""
        self._path = path
        kept = [line for line in read_lines(path) if keep(line)]
        whole = b"".join(to_line(line) + b"\n" for line in kept)
        if not path.is_file() or path.read_bytes() != whole:
            partial = path.with_name(f".{path.name}.partial")
            partial.write_bytes(whole)
            os.replace(partial, path)
        self._stream: BinaryIO = path.open("ab")

    def add(self, lines: Iterable[Line]) -> None:
        """Append `lines`. Raises InputError where that fails, as on a full disk."""
        try:
            self._stream.write(b"".join(to_line(line) + b"\n" for line in lines))
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise InputError(
                f"{self._path}: {error.strerror}; make room and start the same command again, it continues"
            ) from error

    def close(self) -> None:
        self._stream.close()
