"""What a process and all that it starts take, together: memory that they share counts once."""

import contextlib
import threading
from types import TracebackType

import psutil

SECONDS_BETWEEN_LOOKS = 0.1


class Watch:
    """Of process `pid` and its descendants, looked at ten times a second inside the context:

    `peak`: the most proportional set size, MB; a page of n processes counts 1/n for each, and for what is no Linux it
    is the resident size     `cpu_seconds`: processor time since the first look
    """

    def __init__(self, pid: int) -> None:
        self.peak = 0.0
        self._root = psutil.Process(pid)
        self._seconds: dict[int, tuple[float, float]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        resident = 0
        # A process that ended since, or is about to, has nothing to say.
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self._root, *self._root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    memory = process.memory_full_info()
                    resident += getattr(memory, "pss", memory.rss)
                    now = sum(process.cpu_times()[:2])
                    before, _ = self._seconds.get(process.pid, (now if process == self._root else 0.0, 0.0))
                    self._seconds[process.pid] = (before, now)
        self.peak = max(self.peak, resident / 1e6)

    @property
    def cpu_seconds(self) -> float:
        return sum(now - before for before, now in self._seconds.values())

    def __enter__(self) -> "Watch":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._look()
