"""SIGUSR1 and SIGTERM -> a decision that all ranks take in the same step."""

import signal
from typing import Any

import torch
import torch.distributed as dist


def ignore() -> None:
    """From now on both signals do nothing: the interpreter takes its handlers down before CUDA, which takes seconds."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Signals:
    """SIGUSR1 saves and goes on, SIGTERM saves and stops; all ranks act in the same step."""

    def __init__(self) -> None:
        self._saves_asked = self._saves_seen = 0  # counted: a signal that comes inside agree() is for the next call
        self._stop = False
        signal.signal(signal.SIGUSR1, self._on_save)
        signal.signal(signal.SIGTERM, self._on_stop)

    def _on_save(self, *_: Any) -> None:
        self._saves_asked += 1

    def _on_stop(self, *_: Any) -> None:
        self._stop = True

    def agree(self) -> tuple[bool, bool]:
        """(save now, stop now), if any rank was told so since the last call. One all-reduce of two bytes."""
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        asked = self._saves_asked
        told = torch.tensor([asked > self._saves_seen, self._stop], dtype=torch.uint8, device=device)
        self._saves_seen = asked
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told[0]), bool(told[1])
