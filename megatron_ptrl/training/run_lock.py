"""One process at a time writes a run directory: two of them would train over each other's checkpoints unseen."""

import fcntl
import os
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megatron_ptrl.errors import InputError

NAME = ".lock"


def take(run_dir: Path) -> IO[str] | None:
    """The lock of `run_dir`, on rank 0, for as long as it is open and the process lives; None elsewhere.

    Raises InputError on every rank where another process has it, or nothing can be written. Collective.
    """
    told: list[str | None] = [None]
    stream: IO[str] | None = None
    if dist.get_rank() == 0:
        try:
            stream = _take(run_dir)
        except InputError as error:
            told = [str(error)]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise InputError(told[0])
    return stream


def _take(run_dir: Path) -> IO[str]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        stream = (run_dir / NAME).open("a+")
    except OSError as error:
        raise InputError(f"run_dir {run_dir}: {error.strerror}; name a folder that can be written") from error
    try:
        # Not flock, which the helpers that save checkpoints inherit and hold after their run was killed.
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        stream.seek(0)
        raise InputError(
            f"run_dir {run_dir}: another process ({stream.read().strip() or 'unknown'}) is training there; wait for "
            "its end, or use another run_dir"
        ) from error
    except OSError:  # some network file systems have no locks, which is no reason not to work there
        return stream
    stream.truncate(0)
    stream.write(f"{os.uname().nodename}, process {os.getpid()}\n")
    stream.flush()
    return stream
