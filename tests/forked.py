"""A pipeline in a process of its own, to be killed where it waits."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from multiprocess import forkserver

SECONDS = 600.0


@contextlib.contextmanager
def forked(function: Callable[..., Any], *args: Any, until: Callable[[], bool]) -> Iterator[BaseProcess]:
    """A process that calls the function, once `until` says so; it is killed at the end.

    until: of a state that lasts, as it is looked at now and then
    """
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(function, args))
    process.start()
    try:
        deadline = time.monotonic() + SECONDS
        while not until():
            assert process.is_alive(), "it has ended before that"
            assert time.monotonic() < deadline, f"that has not come in {SECONDS:.0f} s"
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.join()


def _alone(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # The server that the tests' own process forks from is no child of this one.
    forkserver._forkserver.__init__()
    function(*args)
