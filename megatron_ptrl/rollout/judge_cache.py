"""Judgements on disk, so that no prediction is paid for twice, in this run or another.

One file of lines, appended to by any number of processes, each line in one write and begun with a line end of its own:
what a killed process left torn spoils no line but its own.
"""

import hashlib
import logging
import os
import re
from collections import Counter
from pathlib import Path

from megatron_ptrl.errors import FULL, InputError
from megatron_ptrl.rollout.judge_server import ServerJudge

logger = logging.getLogger(__name__)

_LINE = re.compile(rb"([0-9a-f]{32}) ([01])")


class JudgeCache:
    """Digest -> score, in memory and in a file."""

    def __init__(self, path: Path) -> None:
        self._scores: dict[bytes, float] = {}
        self._path = path
        self._read_to = 0
        self._file: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._catch_up()
        except OSError as error:
            if error.errno not in FULL:
                raise InputError(f"judge.cache {path}: {error}; expected a file to write to, or null") from error
            self._turn_off(error.strerror)

    def get(self, key: str) -> float | None:
        """The score that this or another process has found."""
        name = key.encode()
        if name not in self._scores and self._file is not None:
            self._catch_up()
        return self._scores.get(name)

    def add(self, key: str, score: float) -> None:
        """Keep a score. A full disk turns the cache off, with a line in the log."""
        name = key.encode()
        self._scores[name] = score
        if self._file is None:
            return
        line = b"\n%s %d\n" % (name, score)
        try:
            written = os.write(self._file, line)
            if written < len(line):
                self._turn_off("a line was not written whole")
        except OSError as error:
            self._turn_off(error.strerror)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _catch_up(self) -> None:
        """Read the whole lines that were added since the last time."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        while self._read_to < size:
            block = os.pread(self._file, 1 << 24, self._read_to)
            end = block.rfind(b"\n") + 1
            if not end:
                return
            for line in block[:end].split(b"\n"):
                if match := _LINE.fullmatch(line):
                    self._scores[match[1]] = float(match[2])
            self._read_to += end

    def _turn_off(self, why: str | None) -> None:
        logger.warning("judge.cache %s: %s; judging goes on without keeping more judgements", self._path, why)
        self.close()


class CachedJudge:
    """A server judge that remembers."""

    def __init__(self, judge: ServerJudge, path: Path) -> None:
        self._judge = judge
        self._cache = JudgeCache(path)
        self._hits = 0
        self._identity = ""
        self.name = judge.name
        self.description = f"{judge.description}, remembered in {path}"

    @property
    def counts(self) -> Counter[str]:
        """What the judge counts, and the judgements that needed no request."""
        return self._judge.counts + Counter(cached=self._hits)

    async def score(self, prediction: str, reference: str) -> float:
        """0.0 or 1.0, by the judge where it is not known. Raises as the judge does; its failures are not kept."""
        self._identity = self._identity or await self._judge.identity()
        key = digest(self._identity, prediction, reference)
        known = self._cache.get(key)
        if known is not None:
            self._hits += 1
            return known
        score = await self._judge.score(prediction, reference)
        self._cache.add(key, score)
        return score

    async def close(self) -> None:
        """Close the file and the judge's connections."""
        self._cache.close()
        await self._judge.close()


def digest(*parts: str) -> str:
    """32 hexadecimal digits that follow from the parts and where each ends."""
    digested = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digested.update(b"%d:" % len(raw))
        digested.update(raw)
    return digested.hexdigest()
