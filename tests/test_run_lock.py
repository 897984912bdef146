"""A run directory has one writer, whoever it is, and none once that one is dead."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from ranks import Ranks

from megatron_ptrl.errors import InputError

SECONDS = 60.0
HOLD = """
import pathlib, sys, time
from megatron_ptrl.training import run_lock
held = run_lock._take(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def held_by_another(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def taken(rank: int, world_size: int, folder: str) -> str:
    from megatron_ptrl.training import run_lock

    try:
        stream = run_lock.take(Path(folder))
    except InputError as error:
        return str(error)
    if stream:
        stream.close()
    return "" if (stream is not None) == (rank == 0) else "held by the wrong rank"


def test_a_second_writer_is_refused_on_every_rank_until_the_first_is_dead(ranks: Ranks, tmp_path: Path) -> None:
    other = held_by_another(tmp_path / "run")
    try:
        told = ranks.run(2, taken, str(tmp_path / "run"))
        assert told[0] == told[1] and f"process {other.pid}) is training there; wait for its end" in told[0]
        assert ranks.run(2, taken, str(tmp_path / "other")) == ["", ""]
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert other.stdout
        other.stdout.close()
    assert ranks.run(2, taken, str(tmp_path / "run")) == ["", ""]


def hold(folder: str, asked: Connection) -> None:
    """Die with the lock; a child that has what was open answers until there is nobody to ask it."""
    from megatron_ptrl.training import run_lock

    held = run_lock._take(Path(folder))
    if os.fork() == 0:
        with contextlib.suppress(EOFError):
            while True:
                asked.send(asked.recv())
        os._exit(0)
    assert not held.closed
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_helper_of_a_killed_run_does_not_hold_it(ranks: Ranks, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    helper, theirs = context.Pipe()
    with helper:
        process = context.Process(target=hold, args=(str(tmp_path / "run"), theirs))
        process.start()
        theirs.close()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert ranks.run(1, taken, str(tmp_path / "run")) == [""]
        helper.send("still there?")
        assert helper.poll(SECONDS) and helper.recv() == "still there?"


def test_a_folder_that_cannot_be_made_is_told(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (told,) = ranks.run(1, taken, str(tmp_path / "file" / "run"))
    assert told.startswith("run_dir") and "name a folder that can be written" in told
