"""What is done of one part of the corpus: written as it comes, put in order when all of it is there.

    OUTPUT/journal/00000.jsonl            one line for each document, in the order in which they were finished
    OUTPUT/thoughts/00000.jsonl           the thoughts among them, in the order of the input
    OUTPUT/rejects/generate-00000.jsonl   the rejects, likewise
    OUTPUT/journal/00000.counts.json      how many of each

The thoughts get their name last and the journal goes after that: a part with thoughts is finished, one with a journal
is continued. A kill leaves at most one torn line, which is dropped.
"""

import fcntl
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_ptrl.data.input_parts import Position
from megatron_ptrl.errors import InputError

KINDS = ("thoughts", "rejects")
SECONDS_FOR_THE_LOCK = 10.0


class Journal:
    """The journal of part `part` in the folder `output`; a context that is open for writing."""

    def __init__(self, output: Path, part: int) -> None:
        self._path = output / "journal" / f"{part:05d}.jsonl"
        self._counts = output / "journal" / f"{part:05d}.counts.json"
        self._final = {
            "rejects": output / "rejects" / f"generate-{part:05d}.jsonl",
            "thoughts": output / "thoughts" / f"{part:05d}.jsonl",
        }
        self.done: set[Position] = set()
        """What an earlier run had finished."""
        self._stream: BinaryIO

    @property
    def is_finished(self) -> bool:
        """Whether the part has its thoughts."""
        return self._final["thoughts"].exists()

    def __enter__(self) -> "Journal":
        for path in (self._path, *self._final.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._path.open("a+b")
        self._lock()
        if self.is_finished:
            # By another process that was also told to; opening made the journal anew.
            self._path.unlink(missing_ok=True)
        end = 0
        for _, position, offset, length in self._entries():
            self.done.add(position)
            end = offset + length
        self._stream.truncate(end)
        return self

    def __exit__(self, *error: object) -> None:
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

    def add(self, position: Position, kind: str, line: bytes) -> None:
        """Keep the outcome of one document: `line` is JSON without a line end. It survives a kill of this process."""
        self._stream.write(b"%d %d %s\t%s\n" % (*position, kind.encode(), line))
        self._stream.flush()

    def publish(self) -> None:
        """Write thoughts, rejects and counts, in the order of the input, and drop the journal."""
        os.fsync(self._stream.fileno())
        order, places = [], array("q")
        for kind, position, offset, length in self._entries():
            order.append((position, len(places) // 3))
            places.extend((KINDS.index(kind), offset, length))
        order.sort()
        counts: Counter[str] = Counter()
        temporary = {kind: path.with_suffix(".tmp") for kind, path in self._final.items()}
        streams = {kind: path.open("wb") for kind, path in temporary.items()}
        for _, index in order:
            number, offset, length = places[3 * index : 3 * index + 3]
            self._stream.seek(offset)
            line = self._stream.read(length).partition(b"\t")[2]
            streams[KINDS[number]].write(line)
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
        self._path.unlink()

    def counts(self) -> Counter[str]:
        """Thoughts, and rejects by reason, of a finished part."""
        return Counter(json.loads(self._counts.read_text()))

    def _entries(self) -> Iterator[tuple[str, Position, int, int]]:
        """(kind, position, offset, length) of each whole line."""
        self._stream.seek(0)
        offset = 0
        for line in self._stream:
            head, tab, _ = line.partition(b"\t")
            words = head.split(b" ")
            if not tab or not line.endswith(b"\n") or len(words) != 3 or words[2].decode() not in KINDS:
                return
            yield words[2].decode(), (int(words[0]), int(words[1])), offset, len(line)
            offset += len(line)
