"""Weights, optimizer, schedule, random state and data position -> a checkpoint directory, and back, exactly.

A checkpoint is written under a hidden name and renamed when every rank is done and `run.json`, which lists every file
with its size, is on the disk. So a directory with a proper name is whole unless somebody cut or damaged a file later,
and that is what `newest_whole` looks for. All ranks must see the same file system.
"""

import contextlib
import dataclasses
import json
import os
import queue
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from megatron_ptrl.config import CheckpointConfig
from megatron_ptrl.data.sidecar import hash_file
from megatron_ptrl.errors import InputError
from megatron_ptrl.training.damage import WRITTEN_BY_RANKS, find_damaged
from megatron_ptrl.training.mcore import gather_weights, unwrap
from megatron_ptrl.training.optimizer import fill_adam_state, load_optimizer

MANIFEST = "run.json"
_NAME = re.compile(r"step_(\d{8})")
_PARTIALS = ".step_*.partial"
# In this format the optimizer's state is stored by parameter, so that any other layout can load it.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    consumed_samples: int = 0
    """Places in the data's order that are behind: samples, or prompts."""
    consumed_tokens: int = 0
    """Counted where the tokens of a step vary; 0 elsewhere."""


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a directory, and why newer ones were passed over."""

    path: Path | None
    passed_over: list[str]
    named: bool
    """Whether there is anything by the name of a checkpoint, whole or not."""


def newest_whole(directory: Path) -> Found:
    """The checkpoint with the highest step whose every file has the size that was written, and the small ones are as
    they were.
    """
    named = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)]
    candidates = [directory] if _NAME.fullmatch(directory.name) else named
    passed_over = [f"{path}: its save was cut short" for path in sorted(directory.glob(_PARTIALS))]
    for path in sorted(candidates, reverse=True):
        defect = _defect(path)
        if defect is None:
            return Found(path, passed_over, True)
        passed_over.append(f"{path}: {defect}")
    return Found(None, passed_over, bool(named))


def _defect(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error.__class__.__name__}); the checkpoint is not whole"
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return f"{MANIFEST} names no files; the checkpoint is not whole"
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    for name, digest in manifest.get("sha256", {}).items():
        if hash_file(path / name) != digest:
            return f"{name} has changed since it was written"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself: step, consumed_samples, layout, files, and what `save` was told."""
    return json.loads((path / MANIFEST).read_text())


def write_manifest(folder: Path, progress: Progress, about: dict[str, Any], layout: dict[str, int]) -> None:
    """List the files of a checkpoint, which are all there, with their sizes; from then on it is whole.

    Those that are not the ranks' have their digests, too: what reading one that changed leads to is no one error.
    """
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    digests = {name: hash_file(folder / name) for name in files if not name.endswith(WRITTEN_BY_RANKS)}
    manifest = {**dataclasses.asdict(progress), **about, "layout": layout, "files": files, "sha256": digests}
    _write_durably(folder / MANIFEST, json.dumps(manifest, indent=1))


def save(
    directory: Path,
    progress: Progress,
    chunks: list[Any],
    optimizer: Any,
    scheduler: Any,
    *,
    keep: CheckpointConfig,
    about: dict[str, Any],
) -> Path:
    """Write `directory/step_N`, drop the checkpoints that `keep` does not want, return the path.

    about: JSON-able facts for the manifest.
    Collective over all ranks. An existing whole checkpoint of this step is left as it is.
    Raises InputError when the files cannot be written, as on a full disk; what was written of them is removed, and the
    checkpoints that were there stay. Ranks that only hear of it raise SystemExit, so that it is told once.
    """
    path = directory / f"step_{progress.step:08d}"
    partial = directory / f".{path.name}.partial"
    if _ask_rank_0(lambda: _defect(path) is None):
        return path
    gather_weights(chunks)
    # A step without anything to learn may come before the first update.
    fill_adam_state(optimizer)
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["run"] = {**dataclasses.asdict(progress), "scheduler": scheduler.state_dict()}
    try:
        _write(path, partial, state, progress, about)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _not_saved(path, partial, error) from error
    if dist.get_rank() == 0:
        _prune(directory, progress.step, keep)
    dist.barrier()
    return path


def _write(path: Path, partial: Path, state: dict[str, Any], progress: Progress, about: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        for leftover in [path, *path.parent.glob(_PARTIALS)]:
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    # Nothing is saved in the background here. Left to itself, Megatron-Core starts another process, with a torch of its
    # own, in every rank, to hand the list of what was written to the very process that made it.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        write_manifest(partial, progress, about, _layout())
        os.replace(partial, path)


def _not_saved(path: Path, partial: Path, error: BaseException) -> BaseException:
    """What to raise instead of `error`."""
    if isinstance(error, CheckpointException):
        # All ranks raise it, one of them knows why.
        if not error.failures:
            return SystemExit(2)
        error = next(iter(error.failures.values()))[0]
    free = shutil.disk_usage(path.parent if path.parent.is_dir() else path.parent.parent).free >> 20
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    last = newest_whole(path.parent).path
    takes = sum(read_manifest(last)["files"].values()) >> 20 if last else 0
    kept = f"{last}, which takes {takes:,} MiB, is whole" if last else "there is none before it"
    why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if "inline_container" in why or "iostream" in why:  # what torch says of a file that took less than was written
        why = "a file was cut short"
    return InputError(
        f"checkpoint {path} was not saved ({free:,} MiB free there): {why}; {kept}. Make room and start the same "
        "command again, which goes on from the last one"
    )


def load(path: Path, chunks: list[Any], optimizer: Any, scheduler: Any) -> tuple[Progress, bool]:
    """Restore everything from a whole checkpoint; returns the progress and whether the random state came along.

    Under another layout than the one that saved it, or from another program, weights, optimizer and schedule are
    restored and the random state (dropout) starts anew. Collective over all ranks.
    """
    manifest = read_manifest(path)
    same_layout = manifest["layout"] == _layout() and manifest.get("random_state", True)
    fill_adam_state(optimizer)
    wanted = _sharded_state(chunks, optimizer, is_loading=True)
    if not same_layout:
        del wanted["random"]
    state = _read(path, wanted)
    _load_weights(chunks, state)
    load_optimizer(optimizer, state["optimizer"])
    run = state["run"]
    scheduler.load_state_dict(run["scheduler"])
    if same_layout:
        _set_random_state(state["random"])
    return Progress(run["step"], run["consumed_samples"], run.get("consumed_tokens", 0)), same_layout


def load_weights(path: Path, chunks: list[Any], optimizer: Any = None) -> None:
    """Restore the weights alone, to start a new run from them. Collective over all ranks."""
    _load_weights(chunks, _read(path, _sharded_weights(chunks)))
    if optimizer is not None:
        optimizer.reload_model_params()


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The values of a sharded state; None for extra state of the model that the checkpoint does not have.

    Which modules have such state, empty but with fp8, depends on whether Transformer Engine made them: where another
    implementation saved the checkpoint, its names are other ones.
    """
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    absent = [
        (part, name)
        for part, state in wanted.items()
        if part.startswith("model")
        for name, value in state.items()
        if isinstance(value, ShardedObject) and "._extra_state" in value.key and value.unique_key not in stored
    ]
    for part, name in absent:
        del wanted[part][name]
    with _told_when_damaged(path):
        values = dist_checkpointing.load(wanted, str(path))
    for part, name in absent:
        values[part][name] = None
    return values


@contextlib.contextmanager
def _told_when_damaged(path: Path) -> Iterator[None]:
    """An InputError in place of torch's, which all ranks raise, where a file of the ranks is the reason."""
    try:
        yield
    except CheckpointException as error:
        found = find_damaged(path)
        if found is None:
            raise
        file, wrong = found
        steps = (folder for folder in path.parent.glob("step_*") if _NAME.fullmatch(folder.name) and folder < path)
        before = next((str(folder) for folder in sorted(steps, reverse=True) if _defect(folder) is None), None)
        previous = f"the one before it is {before}" if before else "there is none before it"
        raise InputError(f"{path / file} is damaged ({wrong}); remove {path}, {previous}") from error


def _sharded_weights(chunks: list[Any]) -> dict[str, Any]:
    return {
        f"model{i}": unwrap(chunk).sharded_state_dict(prefix="", metadata=dict(_METADATA))
        for i, chunk in enumerate(chunks)
    }


def _sharded_state(chunks: list[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    weights = _sharded_weights(chunks)
    moments = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(_METADATA))
    return {**weights, "optimizer": moments, "random": _sharded_random_state()}


def _load_weights(chunks: list[Any], state: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state[f"model{i}"])


def _sharded_random_state() -> ShardedObject:
    pp, tp = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    dp = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("random_state", state, shape, (pp, tp, dp))


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _layout() -> dict[str, int]:
    return {
        "world_size": dist.get_world_size(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
    }


def _prune(directory: Path, saved: int, keep: CheckpointConfig) -> None:
    # Later ones than the one just saved are broken, else the run would have begun there: they must not crowd it out.
    steps = sorted((int(m[1]), p) for p in directory.iterdir() if (m := _NAME.fullmatch(p.name)))
    for step, path in [(step, path) for step, path in steps if step <= saved][: -keep.keep_last]:
        if not (keep.keep_every and step % keep.keep_every == 0):
            shutil.rmtree(path)


def _ask_rank_0(question: Any) -> Any:
    answer = [question() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def find_on_rank_0(directory: Path) -> Found:
    """`newest_whole`, decided by rank 0 for all. Collective."""
    return _ask_rank_0(lambda: newest_whole(directory))


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
