"""Stages of `ptrl` in a process of the pool: with Megatron-Core made ready, by the command line, one by one."""

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def megatron_core(config: Any) -> Iterator[None]:
    """Megatron-Core made ready for one run, whose output is swallowed; the pool closes the process groups."""
    from megatron_ptrl.training import mcore

    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    mcore.initialize(config)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        mcore.parallel_state.destroy_model_parallel()
        # The pool ends its processes by SIGTERM, which a run would take for a wish to save.
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(rank: int, world_size: int, *words: str) -> tuple[int, str, str]:
    """`ptrl` on this rank of the pool: its exit code, what it printed, and what it said of errors."""
    from megatron_ptrl.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, out.getvalue(), err.getvalue()


def one_by_one(rank: int, world_size: int, work: Callable[..., Any], runs: list[Any]) -> list[Any]:
    """`work` with each of several settings in one call of the pool, to spare the start of a process group for each."""
    found = []
    for settings in runs:
        found.append(work(rank, world_size, settings))
        # Imported by `work`: nothing may import Megatron-Core before the host layer is there.
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    return found
