"""Parts of a corpus -> processes that work on them, on this machine or on Slurm, by datatrove's executors.

    execute(PartStep, ExecutorConfig)  ->  tasks  ->  PartStep.work on each task's share of the parts

What is left to do is told by the output itself, not by datatrove's marks, so the same call continues after a kill.
"""

import itertools
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from multiprocess.connection import Connection, wait
from multiprocess.process import parent_process

from megatron_ptrl.config import ExecutorConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.interrupt import end_at_ctrl_c


class PartStep(PipelineStep):
    """What is to be done to each of the parts `left`, by number, wherever datatrove runs it."""

    type = "ptrl"
    name = "parts"

    def __init__(self, left: list[int]) -> None:
        super().__init__()
        self.left = left

    @abstractmethod
    def work(self, share: list[int]) -> None:
        """Do these parts. A part that another process has done meanwhile is passed over."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _silence()

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[None]:
        """Do every `world_size`-th part that is left, from the `rank`-th; yields nothing."""
        _exit_with_parent()
        failure = None
        try:
            self.work(self.left[rank::world_size])
        except InputError as error:
            # The frames it went through may hold an API key, for whoever prints a traceback with its variables.
            failure = error.with_traceback(None)
        if failure is not None:
            raise failure
        yield from ()


def execute(step: PartStep, settings: ExecutorConfig, logs: Path, *, job_name: str, key_env: str) -> None:
    """Run `step` over its parts: here until they are done, or submit it to Slurm and return.

    key_env: environment variable with an API key, which the local processes are given
    Raises what the step raises, or InputError when Slurm does not take the job.
    """
    _silence()
    tasks = min(settings.tasks, len(step.left))
    try:
        if settings.kind == "slurm":
            return _submit(step, settings, tasks, logs, job_name)
        executor = _LocalExecutor(
            [step], tasks=tasks, workers=min(settings.workers, tasks), logging_dir=str(logs), skip_completed=False
        )
        executor.key_env = key_env
        executor.run()
    except OSError as error:
        raise InputError(
            f"{logs.parent}: {error}; what is done is kept, repeat the command when that is mended"
        ) from error


class _Task:
    """One task in a process of its own.

    It has the key of its parent, or none: a forkserver's children have what there was when that started. Nothing prints
    it.
    """

    def __init__(self, run_for_rank: Callable[[int], object], key_env: str) -> None:
        self._run_for_rank, self._key_env, self._key = run_for_rank, key_env, os.environ.get(key_env, "")

    def __call__(self, rank: int, errors: Connection) -> None:
        end_at_ctrl_c()
        os.environ[self._key_env] = self._key
        try:
            self._run_for_rank(rank)
        except InputError as error:
            errors.send(error)


class _LocalExecutor(LocalPipelineExecutor):
    """Tasks in processes that are gone when this one is; datatrove's own keep a manager that outlives a SIGKILL."""

    key_env: str

    def run(self) -> None:
        self.save_executor_as_json()
        if self.workers == 1:
            for rank in range(self.tasks):
                self._run_for_rank(rank)
            return
        # Not a Pool, which waits for ever for what a process that was killed had in hand.
        context = multiprocess.get_context(self.start_method)
        task, ranks = _Task(self._run_for_rank, self.key_env), iter(range(self.tasks))
        running: dict[Connection, tuple[Any, int]] = {}
        try:
            while True:
                for rank in itertools.islice(ranks, self.workers - len(running)):
                    errors, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=task, args=(rank, theirs))
                    process.start()
                    theirs.close()
                    running[errors] = process, rank
                if not running:
                    return
                # An end of file is an end of the process.
                for errors in wait(list(running)):
                    _finish(errors, *running.pop(errors))
        finally:
            for process, _ in running.values():
                process.terminate()
                process.join()


def _finish(errors: Connection, process: Any, rank: int) -> None:
    """Raise what the process of task `rank` died of."""
    try:
        raise errors.recv()
    except EOFError:
        process.join()
    if process.exitcode:
        raise InputError(
            f"task {rank} ended with exit code {process.exitcode} (-9 when it was killed, as for want of memory); what "
            "is done is kept, repeat the command"
        )


class _SlurmExecutor(SlurmPipelineExecutor):
    """An array job, and no other: datatrove's own job of statistics waits for ever where a task was killed."""

    def launch_merge_stats(self) -> None:
        pass

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """The batch script, whose paths may have blanks in them."""
        pickle = self.logging_dir.resolve_paths("executor.pik")
        paths = {name: f'"{sbatch_args[name]}"' for name in ("output", "error")}
        return super().get_launch_file_contents(sbatch_args | paths, run_script.replace(pickle, shlex.quote(pickle)))


def _submit(step: PartStep, settings: ExecutorConfig, tasks: int, logs: Path, job_name: str) -> None:
    if shutil.which("sbatch") is None:
        raise InputError("executor.kind is slurm, and there is no sbatch on the PATH")
    # A folder for each submission: what an earlier job still has to read in its own must stay as it is.
    folder = logs / f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    executor = _SlurmExecutor(
        [step],
        tasks=tasks,
        workers=settings.workers,
        time=settings.time,
        partition=settings.partition,
        qos=settings.qos,
        cpus_per_task=settings.cpus_per_task,
        mem_per_cpu_gb=settings.mem_per_cpu_gb,
        env_command=settings.env_command or f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        job_name=job_name,
        logging_dir=str(folder),
        slurm_logs_folder=str(folder / "slurm"),
        skip_completed=False,
    )
    try:
        executor.run()
    except subprocess.CalledProcessError as error:
        raise InputError("Slurm's sbatch did not take the job, for the reason that it gave above") from error


def _silence() -> None:
    # Its log of a failed task prints the variables of every frame, an API key among them.
    logger.disable("datatrove")


def _exit_with_parent() -> None:
    """In a worker process: end when the one that started it is gone, as after a SIGKILL."""
    parent = parent_process()

    def wait(join: Callable[[], None]) -> None:
        join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, args=(parent.join,), daemon=True).start()
