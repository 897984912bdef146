"""The five files of a tokenization: temporary while they are written, published together, made by ordered processes.

Everything is written under PREFIX.*.tmp and renamed at the end, the index last: a `.idx` that exists belongs to a
complete `.bin`. What failed leaves no such file; after a kill the same command starts over and overwrites them.
"""

import contextlib
import fcntl
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_ptrl.errors import InputError
from megatron_ptrl.interrupt import end_at_ctrl_c

# The order in which finished files get their final names.
PUBLISHED = (".tokenizer.json", ".json", ".bin", ".idx")
REJECTS = ".rejects.jsonl"
SECONDS_BETWEEN_LINES = 10.0

Kept = TypeVar("Kept")
Sent = TypeVar("Sent")
Result = TypeVar("Result")


@contextlib.contextmanager
def temporary_output(output: str, files: list[Path]) -> Iterator[dict[str, Path]]:
    """Temporary files for the prefix `output`, by the suffix that each will have; removed after an error.

    Raises InputError when it is no prefix, cannot be made, is being written by another process, or would overwrite one
    of the input's `files`.
    """
    if not output or output.endswith(os.sep) or Path(output).is_dir():
        raise InputError(
            f"output is {output!r}; expected a prefix such as data/corpus, to which .bin and .idx are added"
        )
    written = {os.path.realpath(output + suffix) for suffix in (*PUBLISHED, REJECTS)}
    for file in files:
        if os.path.realpath(file) in written:
            raise InputError(f"output {output} would overwrite the input {file}; choose another prefix")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {output}: {error.strerror}: {error.filename}") from error
    temporary = {suffix: Path(output + suffix + ".tmp") for suffix in (*PUBLISHED, REJECTS)}
    with _locked(output, temporary[".bin"]):
        try:
            yield temporary
        except BaseException:
            for path in temporary.values():
                path.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _locked(output: str, path: Path) -> Iterator[None]:
    """Keep other processes from writing the same temporary files, which would mix both."""
    try:
        stream = path.open("ab")
    except OSError as error:
        raise InputError(f"output {output}: {error.strerror}: {path}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"output {output}: another process is writing it; wait for it to end") from None
        except OSError as error:
            raise InputError(f"output {output}: {error.strerror}: {path}") from error
        yield


def publish(output: str, temporary: Mapping[str, Path]) -> None:
    """Give the finished files their final names."""
    # Without its index the pair of an earlier run no longer counts, so a kill between two renames mixes nothing.
    Path(output + ".idx").unlink(missing_ok=True)
    for suffix in PUBLISHED:
        os.replace(temporary[suffix], output + suffix)


def publish_rejects(output: str, temporary: Path, counts: Mapping[str, int]) -> Path | None:
    """Give the rejects their final name and return it, or remove the files when nothing was rejected."""
    path = Path(output + REJECTS)
    if counts:
        os.replace(temporary, path)
        return path
    temporary.unlink()
    path.unlink(missing_ok=True)
    return None


def count_text(rejected: Mapping[str, int]) -> str:
    """'2 not JSON, 1 empty document', or 'none'."""
    return ", ".join(f"{count:,} {reason}" for reason, count in rejected.items()) or "none"


def in_order(
    batches: Iterable[tuple[Kept, Sent]],
    function: Callable[[Sent], Result],
    workers: int,
    initializer: Callable[..., object],
    identity: tuple[Any, ...],
) -> Iterator[tuple[Kept, Result]]:
    """For each (kept, sent) the kept part and `function(sent)` by one of `workers` processes, in the same order.

    `initializer(*identity)` is called once in each; its module must not import torch, or a start takes seconds.
    """
    # Not forked from here, as this process has threads (torch's, the tokenizer's) whose locks a fork would copy; forked
    # from a server, as a fresh start costs each worker the seconds that importing the package takes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(initializer, *identity)) as pool:
        # Two batches a worker keep all of them busy; more would only pile up when writing is the slow part.
        ahead: deque[tuple[Kept, Future[Result]]] = deque()
        for kept, sent in batches:
            ahead.append((kept, pool.submit(function, sent)))
            if len(ahead) > 2 * workers:
                kept, future = ahead.popleft()
                yield kept, future.result()
        for kept, future in ahead:
            yield kept, future.result()


def _begin_worker(initializer: Callable[..., object], *identity: Any) -> None:
    end_at_ctrl_c()
    initializer(*identity)


class Progress:
    """Bytes of input read so far: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, task: str, files: list[Path]) -> None:
        self.tokens = 0
        self._task = task
        self._total = sum(file.stat().st_size for file in files)
        self._start = self._last = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self._total, desc=task, unit="B", unit_scale=True, disable=not terminal)
        self._report: Callable[[int], None] = self._show_bar if terminal else self._print_line

    def __call__(self, bytes_read: int) -> None:
        self._report(bytes_read)

    def _show_bar(self, bytes_read: int) -> None:
        if self.tokens:
            rate = self.tokens / (time.monotonic() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(bytes_read - self._bar.n)

    def _print_line(self, bytes_read: int) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = f", {self.tokens / (now - self._start):,.0f} tokens/s" if self.tokens else ""
        print(f"{self._task}: {bytes_read / max(self._total, 1):.1%} of {self._total / 1e6:,.1f} MB{rate}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()
