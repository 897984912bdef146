"""The folder of Megatron-Core's sample indices, which runs may share: one builds at a time, none is half-written."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch.distributed as dist

from megatron_ptrl.errors import InputError

LOCK = ".lock"
INDICES = ("*-GPTDataset-*.npy", "*-BlendedDataset-*.npy")


@contextlib.contextmanager
def building_in(cache: Path) -> Iterator[None]:
    """While the indices are built in `cache`. Rank 0 waits for other runs that build there; Megatron-Core's ranks wait
    for rank 0.

    Raises InputError where the folder cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / LOCK).open("a")
    except OSError as error:
        raise InputError(f"data.cache {cache}: {error.strerror}; name a folder that can be written") from error
    with lock:
        if dist.get_rank() != 0:
            yield
            return
        # Some network file systems have no locks, which is no reason not to work there.
        with contextlib.suppress(OSError):
            fcntl.lockf(lock, fcntl.LOCK_EX)
        _drop_unreadable(cache)
        yield


def _drop_unreadable(cache: Path) -> None:
    """Megatron-Core trusts any file of the right name; one that a killed run left half-written would stop the next."""
    for path in (path for pattern in INDICES for path in cache.glob(pattern)):
        try:
            numpy.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            path.unlink()
