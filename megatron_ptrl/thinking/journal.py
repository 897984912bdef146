"""What is done of one part of the corpus: written as it comes, put in order when all of it is there.

    OUTPUT/journal/00000.jsonl            one line for each document, in the order in which they were finished
    OUTPUT/thoughts/00000.jsonl           the thoughts among them, in the order of the input
    OUTPUT/rejects/generate-00000.jsonl   the rejects, likewise
    OUTPUT/journal/00000.counts.json      how many of each
    OUTPUT/journal/00000.source.json      what the documents were

The thoughts get their name last and the journal goes after that: a part with thoughts is finished, one with a journal
is continued. A kill leaves at most one torn line, which is dropped.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy

from megatron_ptrl.data.input_parts import Position
from megatron_ptrl.errors import InputError

KINDS = ("thoughts", "rejects")
_HEAD = re.compile(rb"(\d+) (\d+) ([0-9a-f]{16}) (thoughts|rejects)\t")
SECONDS_FOR_THE_LOCK = 30.0


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: {error.strerror}; what is done is kept, repeat the command when it can be written")


@dataclass(frozen=True)
class Source:
    """What a finished part's thoughts are of."""

    stamps: list[str]
    """Of its files, by which they are known without being read."""
    digest: str
    """Of all its records."""


class Journal:
    """The journal of part `part` in the folder `output`; a context that is open for writing."""

    def __init__(self, output: Path, part: int) -> None:
        self.output = output
        self._path = output / "journal" / f"{part:05d}.jsonl"
        self._source = output / "journal" / f"{part:05d}.source.json"
        self._counts = output / "journal" / f"{part:05d}.counts.json"
        self._final = {
            "rejects": output / "rejects" / f"generate-{part:05d}.jsonl",
            "thoughts": output / "thoughts" / f"{part:05d}.jsonl",
        }
        # By file and line, the digest of the record that was done; none is all zeros, as good as certainly.
        self._done: dict[int, bytearray] = {}
        self._index = array("q")
        self._end = 0
        self._stream: BinaryIO

    @property
    def is_finished(self) -> bool:
        """Whether the part has its thoughts."""
        return self._final["thoughts"].exists()

    def __enter__(self) -> "Journal":
        try:
            for path in (self._path, *self._final.values()):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("a+b")
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._lock()
        if self.is_finished:
            # By another process that was also told to; opening made the journal anew.
            self._path.unlink(missing_ok=True)
        for kind, position, digest, offset, length in self._entries():
            self._note(kind, position, digest, offset, length)
        self._stream.truncate(self._end)
        return self

    def __exit__(self, *error: object) -> None:
        # What a full disk did not take is tried once more, and may be torn like after a kill.
        with contextlib.suppress(OSError):
            self._stream.close()

    def _lock(self) -> None:
        # The processes of a run that was killed take a moment to notice.
        deadline = time.monotonic() + SECONDS_FOR_THE_LOCK
        while True:
            try:
                return fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > deadline:
                    self._stream.close()
                    raise InputError(f"{self._path}: another process is at it; wait for it to end") from None
                time.sleep(0.1)

    def has(self, position: Position, digest: bytes) -> bool:
        """Whether the record has its outcome. Raises InputError where the outcome is that of another record."""
        file, line = position
        done = bytes(self._done.get(file, b"")[8 * line : 8 * line + 8])
        if done in (b"", bytes(8)):
            return False
        if done != digest:
            raise InputError(
                f"{self._path} is of another input: record {line} of file {file + 1} of the part has changed since; "
                f"restore it, or choose another output than {self.output}"
            )
        return True

    def _note(self, kind: str, position: Position, digest: bytes, offset: int, length: int) -> None:
        # 48 bytes for a record where tuples in a list are 250: a part of one large file may have millions.
        file, line = position
        done = self._done.setdefault(file, bytearray())
        if 8 * line >= len(done):
            done.extend(bytes(8 * line + 8 - len(done)))
        done[8 * line : 8 * line + 8] = digest
        self._index.extend((file, line, KINDS.index(kind), offset, length))
        self._end = offset + length + 1

    def add(self, position: Position, digest: bytes, kind: str, line: bytes) -> None:
        """Keep the outcome of the document with this digest (8 bytes): JSON without a line end. It survives a kill."""
        head = b"%d %d %s %s\t" % (*position, digest.hex().encode(), kind.encode())
        try:
            self._stream.write(b"%s%s\n" % (head, line))
            self._stream.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._note(kind, position, digest, self._end + len(head), len(line))

    def publish(self, source: Source) -> None:
        """Write thoughts, rejects and counts, in the order of the input, and drop the journal."""
        self.note_source(source)
        try:
            self._publish()
        except OSError as error:
            raise _unwritable(self._final["thoughts"], error) from error

    def drop_leftover(self) -> None:
        """Remove the journal of a finished part, whose run was killed before it could."""
        self._path.unlink(missing_ok=True)

    def source(self) -> Source | None:
        """What the thoughts of a finished part are of; None where nobody noted it."""
        return Source(**json.loads(self._source.read_text())) if self._source.exists() else None

    def note_source(self, source: Source) -> None:
        """Keep what the thoughts are of."""
        temporary = self._source.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(asdict(source)) + "\n")
            os.replace(temporary, self._source)
        except OSError as error:
            raise _unwritable(self._source, error) from error

    def _publish(self) -> None:
        journal = self._stream.fileno()
        os.fsync(journal)
        index = numpy.frombuffer(self._index, dtype=numpy.int64).reshape(-1, 5)
        counts: Counter[str] = Counter()
        temporary = {kind: path.with_suffix(".tmp") for kind, path in self._final.items()}
        streams = {kind: path.open("wb", buffering=1 << 17) for kind, path in temporary.items()}
        for row in numpy.lexsort((index[:, 1], index[:, 0])):
            number, offset, length = index[row, 2:].tolist()
            line = os.pread(journal, length, offset)
            streams[KINDS[number]].write(line + b"\n")
            counts["thoughts" if KINDS[number] == "thoughts" else json.loads(line)["reason"]] += 1
        self._counts.write_text(json.dumps(dict(sorted(counts.items()))) + "\n")
        for kind in ("rejects", "thoughts"):
            with streams[kind] as stream:
                stream.flush()
                os.fsync(stream.fileno())
            if kind == "thoughts" or counts.total() > counts["thoughts"]:
                os.replace(temporary[kind], self._final[kind])
            else:
                temporary[kind].unlink()
        self.drop_leftover()

    def counts(self) -> Counter[str]:
        """Thoughts, and rejects by reason, of a finished part."""
        return Counter(json.loads(self._counts.read_text()))

    def _entries(self) -> Iterator[tuple[str, Position, bytes, int, int]]:
        """(kind, position, digest, offset, length) of each whole line's JSON, without the line end."""
        self._stream.seek(0)
        begin = 0
        for line in self._stream:
            head = _HEAD.match(line)
            if not head or not line.endswith(b"\n"):
                return
            digest = bytes.fromhex(head[3].decode())
            position = int(head[1]), int(head[2])
            yield head[4].decode(), position, digest, begin + head.end(), len(line) - head.end() - 1
            begin += len(line)
