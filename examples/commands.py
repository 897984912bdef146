"""The commands of an example: Python words put together, printed, run one by one or side by side, and timed."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CORES = 2
PTRL = ("-m", "megatron_ptrl")
RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", CORES)

Words = list[object]


@dataclass(frozen=True)
class Stages:
    """How the stages of an example are called: as the YAML files in `configs` say, or in short by the flags of `small`.

    small: by stage, those that shorten it, also the empty list; None where all have their whole length.
    """

    configs: Path
    small: dict[str, Words] | None

    @property
    def ranks(self) -> Words:
        """What stands before a command that trains on all cores; in short, one rank is enough."""
        return [] if self.small is not None else [*RANKS]

    def flags(self, stage: str, config: str | None = None) -> Words:
        """The stage's YAML file, where it has one, and what shortens it."""
        file: Words = ["--config", self.configs / config] if config else []
        return [*file, *(self.small[stage] if self.small is not None else [])]


def run(words: Words, *, quietly: bool = False, threads: int = 1) -> None:
    """Print a Python command, run it on `threads` threads a process, and end with its exit code when it fails."""
    command = [str(word) for word in (sys.executable, *words)]
    print("$", " ".join(command), flush=True)
    start = time.perf_counter()
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=quietly, text=True)
    if done.returncode:
        print(done.stdout or "", done.stderr or "", sep="\n", flush=True)
        sys.exit(done.returncode)
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


def run_side_by_side(commands: list[Words]) -> None:
    """`run`, a process for each core; what they print is in log.txt of their run directories."""
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(lambda words: run(words, quietly=True), commands))


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Print at the end how long all commands took."""
    start = time.perf_counter()
    yield
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime
    print(f"\nall stages: {time.perf_counter() - start:.0f} s, {processor:.0f} s of processor time", flush=True)
