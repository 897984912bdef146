"""A signal that comes while the ranks agree is not lost: the next call has it."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_ptrl.training.signals import Signals


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield Signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_told_while_the_ranks_agree(signals, monkeypatch):
    to_send = [signal.SIGUSR1, signal.SIGTERM]

    def all_reduce(*_: object, **__: object) -> None:
        if to_send:
            os.kill(os.getpid(), to_send.pop(0))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert signals.agree() == (False, False)
    assert signals.agree() == (True, False), "SIGUSR1 came inside the first call"
    assert signals.agree() == (False, True), "saved once; SIGTERM came inside the second call"
