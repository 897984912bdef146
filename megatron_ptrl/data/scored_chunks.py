"""OUTPUT.parts/: what is scored so far. A chunk's file has its name only when it is whole and on the disk.

plan.json             which data, reference and settings the chunks belong to
lock                  held by the scoring that is under way, and let go however its process ends
chunk_00000012.bin    the encoded values, the sum of the values (fp64), SHA-256 of both
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy

from megatron_ptrl.data.sidecar import STORAGE, Durably, encode
from megatron_ptrl.data.windows import Chunk
from megatron_ptrl.errors import InputError

_SUM = struct.Struct("<d")
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class ScoredChunks:
    """The folder of one scoring."""

    folder: Path
    storage: str

    def begin(self, plan: dict[str, Any]) -> IO[str]:
        """Make the folder, or see that it is this plan's; returns its lock, to be kept open while chunks are written.

        Raises InputError where it is another plan's, or another process holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        path = self.folder / "plan.json"
        if path.is_file():
            found = self._read_plan(path)
            different = [name for name in plan if found.get(name) != plan[name]]
            if different:
                raise InputError(
                    f"{self.folder} is of a scoring with another {', '.join(different)}; remove it, or use another "
                    "output"
                )
            return lock
        with Durably(str(path)) as stream:
            stream.write(json.dumps(plan, indent=1).encode())
        return lock

    def _lock(self) -> IO[str]:
        stream = (self.folder / "lock").open("w")
        # Some network file systems have no locks, which is no reason not to work there.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another `ptrl score` is writing to {self.folder}; wait for its end, or use another output"
                ) from error
        return stream

    def _read_plan(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{path}: not the plan of a scoring; remove {self.folder}, or use another output")
        return found

    def write(self, chunk: Chunk, values: numpy.ndarray) -> None:
        """Keep the values (float32) of all tokens of a chunk."""
        content = encode(values, self.storage) + _SUM.pack(float(values.sum(dtype=numpy.float64)))
        with Durably(str(self._path(chunk))) as stream:
            stream.write(content + hashlib.sha256(content).digest())

    def is_whole(self, chunk: Chunk) -> bool:
        """Whether the chunk has a file and that is as it was written."""
        return self._path(chunk).is_file() and self._content(chunk) is not None

    def sum_of(self, chunk: Chunk) -> float:
        """Sum of the chunk's values before they were encoded."""
        with self._path(chunk).open("rb") as stream:
            stream.seek(-_SUM.size - _DIGEST_BYTES, os.SEEK_END)
            return _SUM.unpack(stream.read(_SUM.size))[0]

    def read(self, chunk: Chunk) -> bytes:
        """The encoded values. Raises InputError for a chunk that is not as it was written."""
        content = self._content(chunk)
        if content is None:
            raise InputError(f"{self._path(chunk)} has changed since it was written; repeat the command")
        return content[: -_SUM.size]

    def remove(self) -> None:
        """Drop the folder."""
        shutil.rmtree(self.folder)

    def remove_if_empty(self) -> None:
        """Drop the folder where no chunk is in it."""
        if not any(self.folder.glob("chunk_*.bin")):
            self.remove()

    def _path(self, chunk: Chunk) -> Path:
        return self.folder / f"chunk_{chunk.number:08d}.bin"

    def _content(self, chunk: Chunk) -> bytes | None:
        content = self._path(chunk).read_bytes()
        values = (chunk.end_token - chunk.first_token) * numpy.dtype(STORAGE[self.storage]).itemsize
        content, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        whole = len(content) == values + _SUM.size and hashlib.sha256(content).digest() == digest
        return content if whole else None
