"""`python -m megatron_ptrl`, but rank 0 stops behind the figures of each step and before the manifest of each save.

Whoever started it sends SIGCONT, and so looks at each of these moments, however slow or fast either of them is.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from megatron_ptrl import __main__ as program


def stop() -> None:
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGSTOP)


def then_stop(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*args: Any) -> None:
        function(*args)
        stop()

    return call


def stop_then(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*args: Any) -> None:
        stop()
        function(*args)

    return call


def with_stops(load: Callable[..., ModuleType]) -> Callable[..., ModuleType]:
    """What imports a stage's module, and then puts the stops into it."""

    def call(*args: Any) -> ModuleType:
        module = load(*args)
        from megatron_ptrl.training import checkpoint, runlog

        runlog.RunLog.record = then_stop(runlog.RunLog.record)
        checkpoint.write_manifest = stop_then(checkpoint.write_manifest)
        return module

    return call


if __name__ == "__main__":
    program._import = with_stops(program._import)
    sys.exit(program.main())
