"""`ptrl think`: corpus -> thoughts and rejects -> training set.

    list_inputs  ->  parts of about as many megabytes  ->  datatrove's executor, a share of the parts for each task
                 ->  generate_stage, one part after the other
                 ->  assemble_stage, when all parts are there

OUTPUT/plan.json says which corpus and settings the output belongs to. The same command continues after a kill, and does
nothing where all is done; another corpus or other settings are refused, since what they would give is something else.
"""

import asyncio
import hashlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import multiprocess
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from multiprocess.process import parent_process

from megatron_ptrl.config import ThinkConfig
from megatron_ptrl.data.corpus import SUFFIXES, find_files
from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking.generate_stage import InputFile, Think
from megatron_ptrl.thinking.generators import make_generator
from megatron_ptrl.thinking.journal import Journal
from megatron_ptrl.thinking.prompts import load_template, make_cut

Part = tuple[InputFile, ...]


def run(config: ThinkConfig) -> None:
    """Write the thoughts of `config.input`, and the training set of them, to `config.output`; prints a summary.

    Raises InputError for bad input, and GeneratorUnusable when no request can succeed; what is done is kept.
    """
    if not config.output:
        raise InputError("output is empty; expected a folder")
    output = Path(config.output)
    parts = make_parts(list_inputs(config.input, output), config.part_megabytes)
    template = load_template(config.prompt)
    make_cut(config.prompt_tokens, config.tokenizer)
    _begin(output, _plan(config, parts, template.name))
    left = [number for number in range(len(parts)) if not Journal(output, number).is_finished]
    if left:
        _execute(config, parts, left)
    if config.executor.kind == "slurm" and left:
        print(f"{output}: {len(left)} of {len(parts)} parts submitted; repeat the command when they are done")
        return
    counts = sum((Journal(output, number).counts() for number in range(len(parts))), Counter())
    print(f"{output}: {counts.pop('thoughts', 0):,} thoughts in {len(parts):,} parts, rejected: {_told(counts)}")
    if config.then_assemble:
        _assemble(config, output)


def _assemble(config: ThinkConfig, output: Path) -> None:
    from megatron_ptrl.thinking import assemble_stage

    assemble_stage.run(
        replace(
            config.assemble,
            input=[str(output / "thoughts")],
            output=str(output / "train"),
            tokenizer=config.assemble.tokenizer or config.tokenizer,
        )
    )


def _told(rejected: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items())) or "none"


def list_inputs(inputs: list[str], output: Path) -> list[InputFile]:
    """The files to read, in order. Raises InputError for what is missing, of no known kind, or the output itself."""
    found: list[InputFile] = []
    for name in inputs:
        found += _list_remote(name) if "://" in name else _list_local(name)
    if not found:
        raise InputError(f"no input files in {', '.join(inputs) or 'an empty list'}; expected {' '.join(SUFFIXES)}")
    own = os.path.realpath(output) + os.sep
    for file in found:
        if os.path.realpath(file.path).startswith(own):
            raise InputError(f"{file.path} is input and lies in the output folder; choose another output")
    return found


def _list_local(name: str) -> Iterator[InputFile]:
    for file in find_files([name]):
        label = file.relative_to(name) if Path(name).is_dir() else Path(file.name)
        yield InputFile(str(file), label.as_posix(), file.stat().st_size)


def _list_remote(name: str) -> Iterator[InputFile]:
    try:
        system, root = fsspec.core.url_to_fs(name)
        files = sorted(file for file in system.find(root) if file.endswith(SUFFIXES))
        for file in files:
            label = file[len(root) :].strip("/") or file.rpartition("/")[2]
            yield InputFile(system.unstrip_protocol(file), label, system.size(file) or 0)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{name}: {error}") from error


def make_parts(files: list[InputFile], megabytes: float) -> list[Part]:
    """The files in their order, taken together up to `megabytes`; a larger file is a part of its own."""
    parts: list[Part] = []
    size = float("inf")
    for file in files:
        if size + file.size > megabytes * 1e6:
            parts.append(())
            size = 0
        parts[-1] += (file,)
        size += file.size
    return parts


def _plan(config: ThinkConfig, parts: list[Part], template: str) -> dict[str, Any]:
    inputs = json.dumps([[(file.label, file.size) for file in part] for part in parts])
    tokenizer = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest() if config.tokenizer else None
    same = ("text_field", "id_field", "prompt_tokens", "generator", "checkpoint", "seed", "part_megabytes")
    return {
        "input": hashlib.sha256(inputs.encode()).hexdigest(),
        "prompt": template,
        "tokenizer": tokenizer,
        "server.model": config.server.model,
        "server.extra_body": config.server.extra_body,
        "sampling": asdict(config.sampling),
        **{name: getattr(config, name) for name in same},
    }


def _begin(output: Path, plan: dict[str, Any]) -> None:
    path = output / "plan.json"
    if path.exists():
        found = json.loads(path.read_text())
        different = [name for name in plan if found.get(name) != plan[name]]
        if different:
            raise InputError(f"{output} is of another {', '.join(different)}; remove it, or choose another output")
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(plan, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"output {output}: {error.strerror}") from error


class ThinkStep(PipelineStep):
    """One task's share of the parts, as datatrove runs it."""

    type = "TPT"
    name = "think"

    def __init__(self, config: ThinkConfig, parts: list[Part], left: list[int]) -> None:
        super().__init__()
        self._config, self._parts, self._left = config, parts, left

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _silence()

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[None]:
        """Do every `world_size`-th part that is left, from the `rank`-th; yields nothing."""
        _exit_with_parent()
        failure = None
        try:
            asyncio.run(self._run(self._left[rank::world_size]))
        except InputError as error:
            # The frames it went through hold the API key, for whoever prints a traceback with its variables.
            failure = error.with_traceback(None)
        if failure is not None:
            raise failure
        yield from ()

    async def _run(self, share: list[int]) -> None:
        config = self._config
        generator, tasks = make_generator(config)
        cut = make_cut(config.prompt_tokens, config.tokenizer)
        think = Think(config, load_template(config.prompt), cut, generator, tasks)
        try:
            for number in share:
                with Journal(Path(config.output), number) as journal:
                    if not journal.is_finished:
                        await think.run(self._parts[number], journal)
                        journal.publish()
        finally:
            await generator.close()


class _KeyOfParent:
    """Gives a process the key, which a forkserver's children lack if it was started earlier. Nothing prints it."""

    def __init__(self, name: str) -> None:
        self._name, self._key = name, os.environ.get(name, "")

    def __call__(self) -> None:
        os.environ[self._name] = self._key


class _LocalExecutor(LocalPipelineExecutor):
    """Tasks in processes that are gone when this one is; datatrove's own keep a manager that outlives a SIGKILL."""

    key_env: str

    def run(self) -> None:
        self.save_executor_as_json()
        if self.workers == 1:
            for rank in range(self.tasks):
                self._run_for_rank(rank)
            return
        with multiprocess.get_context(self.start_method).Pool(self.workers, _KeyOfParent(self.key_env)) as pool:
            for _ in pool.imap_unordered(self._run_for_rank, range(self.tasks)):
                pass


class _SlurmExecutor(SlurmPipelineExecutor):
    """An array job, and no other: datatrove's own job of statistics waits for ever where a task was killed."""

    def launch_merge_stats(self) -> None:
        pass

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """The batch script, whose paths may have blanks in them."""
        pickle = self.logging_dir.resolve_paths("executor.pik")
        paths = {name: f'"{sbatch_args[name]}"' for name in ("output", "error")}
        return super().get_launch_file_contents(sbatch_args | paths, run_script.replace(pickle, shlex.quote(pickle)))


def _execute(config: ThinkConfig, parts: list[Part], left: list[int]) -> None:
    _silence()
    settings = config.executor
    step = ThinkStep(config, parts, left)
    tasks = min(settings.tasks, len(left))
    logs = Path(config.output) / "logs"
    if settings.kind == "slurm":
        return _submit(config, step, tasks, logs)
    # What is left is told by the output itself, not by datatrove's marks.
    executor = _LocalExecutor(
        [step], tasks=tasks, workers=min(settings.workers, tasks), logging_dir=str(logs), skip_completed=False
    )
    executor.key_env = config.server.api_key_env
    executor.run()


def _submit(config: ThinkConfig, step: ThinkStep, tasks: int, logs: Path) -> None:
    if shutil.which("sbatch") is None:
        raise InputError("executor.kind is slurm, and there is no sbatch on the PATH")
    settings = config.executor
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
        job_name="ptrl_think",
        logging_dir=str(folder),
        slurm_logs_folder=str(folder / "slurm"),
        skip_completed=False,
    )
    try:
        executor.run()
    except subprocess.CalledProcessError as error:
        raise InputError("Slurm's sbatch did not take the job, for the reason that it gave above") from error


def _silence() -> None:
    # Its log of a failed task prints the variables of every frame, the API key among them.
    logger.disable("datatrove")


def _exit_with_parent() -> None:
    """In a worker process: end when the one that started it is gone, as after a SIGKILL."""
    parent = parent_process()

    def wait(join: Callable[[], None]) -> None:
        join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, args=(parent.join,), daemon=True).start()
