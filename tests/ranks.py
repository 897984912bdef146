"""One pool of processes for every test that needs ranks: starting one takes seconds, so they live for the session."""

import contextlib
import multiprocessing
import multiprocessing.connection
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 600.0  # seconds for one call
GRACE = 5.0  # seconds that the other ranks get once one has failed: they may be waiting for it for ever


class RankError(AssertionError):
    """A rank raised, died or did not answer."""


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    # Megatron-Core saves checkpoints through a helper process, and a daemon may have none.
    multiprocessing.current_process().daemon = False
    while (message := connection.recv()) is not None:
        path, payload, rank, world_size, store = message
        sys.path[:] = path
        try:
            function, args = pickle.loads(payload)
            answer = (True, _in_group(function, args, rank, world_size, store))
            data = pickle.dumps(answer)
        except Exception:
            data = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(data)


def _in_group(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, store: str) -> Any:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT)
    )
    try:
        # A rank that leaves at once would close the connections that the others are still making.
        dist.barrier()
        return function(rank, world_size, *args)
    finally:
        if "megatron.core.parallel_state" in sys.modules:
            sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


class Ranks:
    """`run(world_size, function, *args)` calls function(rank, world_size, *args) on each rank, in a fresh gloo group.

    The function must be importable (defined at the top of a test module); arguments and results are pickled.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """The results in the order of the ranks; a failure of any rank raises RankError with its traceback."""
        self._grow(world_size)
        self._calls += 1
        store = str(Path(self._folder.name) / f"call{self._calls}")
        payload = pickle.dumps((function, args))
        for rank in range(world_size):
            self._workers[rank][1].send((sys.path, payload, rank, world_size, store))
        answers, failures = self._collect(world_size, time.monotonic() + timeout)
        if failures:
            if len(answers) + sum("Traceback" in text for text in failures.values()) < world_size:
                self.close()
            raise RankError("\n".join(f"rank {rank} of {world_size}: {failures[rank]}" for rank in sorted(failures)))
        return [answers[rank] for rank in range(world_size)]

    def _collect(self, world_size: int, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                failures |= {rank: "no answer in time" for rank in waiting.values()}
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    done, answer = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    done, answer = False, "died"
                (answers if done else failures)[rank] = answer
                if not done:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers, failures

    def _grow(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < world_size:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
        for _, connection in self._workers:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process, connection in self._workers:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._workers.clear()
