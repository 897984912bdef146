"""Megatron-LM's checkpoints (torch_dist) <-> ours: the same sharded tensors, and other notes beside them.

    theirs   latest_checkpointed_iteration.txt, iter_0000010/{*.distcp, common.pt: args, iteration, optimizer, schedule}
             from core_v0.19 on what was in common.pt is an object in *.distcp
    ours     checkpoints/step_00000010/{*.distcp, common.pt: optimizer, run; run.json}

What goes along: weights, Adam's moments and fp32 weights, step, samples, schedule. What does not: the random state.
"""

import dataclasses
import io
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_ptrl.config import ConvertConfig, PretrainConfig
from megatron_ptrl.conversion import torch_dist
from megatron_ptrl.conversion.hf_input import divisor, parsed, write_settings
from megatron_ptrl.conversion.megatron_args import settings_of
from megatron_ptrl.conversion.megatron_optimizer import CONTENT, cannot_continue, schedule_args
from megatron_ptrl.conversion.megatron_output import args_of, check_model, flags_beyond_args
from megatron_ptrl.conversion.megatron_tensors import check_tensors
from megatron_ptrl.conversion.torch_dist import COMMON, METADATA, Reader
from megatron_ptrl.conversion.weights import empty_objects
from megatron_ptrl.data.tokenizer import DEFAULT_EOD, Tokenizer
from megatron_ptrl.errors import InputError
from megatron_ptrl.training import checkpoint
from megatron_ptrl.training.checkpoint import Progress
from megatron_ptrl.training.frozen import check_vocabulary, model_of, tokenizer_of
from megatron_ptrl.training.optimizer import whole_steps
from megatron_ptrl.training.resume import describe, find_source

TRACKER = "latest_checkpointed_iteration.txt"
_OPTIMIZER = "optimizer."
_COMMON_STATE = "common_state/shard_0_1"
_EMBEDDING = "embedding.word_embeddings.weight"


class _Inert:
    """Stands for a class in a file that is read for its numbers, so that nothing of the class's is called."""

    def __new__(cls, *arguments: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def is_megatron_lm(source: Path) -> bool:
    """Whether `source` is such a checkpoint, or a folder of them."""
    has_tensors = any((source / name).is_file() for name in (COMMON, METADATA))
    return (source / TRACKER).is_file() or (has_tensors and not (source / checkpoint.MANIFEST).is_file())


def find_iteration(source: Path) -> Path:
    """The checkpoint that the tracker file of a folder names, or `source` itself. Raises InputError."""
    if not (source / TRACKER).is_file():
        return source
    word = (source / TRACKER).read_text().strip()
    path = source / ("release" if word == "release" else f"iter_{int(word):07d}" if word.isdigit() else word)
    if not (path / METADATA).is_file():
        raise InputError(
            f"{source / TRACKER} says {word!r}, and {path} has no {METADATA}; expected a checkpoint that was saved "
            "with --ckpt-format torch_dist"
        )
    return path


def read_common(path: Path) -> dict[str, Any]:
    """What is the same on every rank, without running any code: classes that are named, but for namespaces, stay empty.

    Raises InputError where there is none, or more in it than values.
    """
    if (path / COMMON).is_file():
        return _values(path / COMMON, path / COMMON)
    reader = Reader(path)
    if _COMMON_STATE not in reader.objects:
        raise InputError(f"{path} has no {COMMON}, nor {_COMMON_STATE} among its objects; expected what Megatron saved")
    return _values(reader.read_object(_COMMON_STATE), path / _COMMON_STATE)[0]


def _values(stored: Path | io.BytesIO, where: Path) -> Any:
    known: dict[str, Callable[..., Any]] = {"argparse.Namespace": Namespace, "types.SimpleNamespace": SimpleNamespace}
    try:
        named = get_unsafe_globals_in_checkpoint(stored)
        # One class for each name, for a file may tell them apart.
        stand_ins = [(known.get(name) or type("Inert", (_Inert,), {}), name) for name in named]
        if isinstance(stored, io.BytesIO):
            stored.seek(0)
        with safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(stored, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{where} has more in it than values, and is not read: reading could run code of its"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{where} cannot be read: {error}") from error


def from_megatron_lm(config: ConvertConfig, source: Path, output: Path, final: Path) -> str:
    """Convert the checkpoint in `source` into the empty folder `output`, which will be `final`; returns what to say.

    With an optimizer that we can go on with, `ptrl pretrain` continues the run; else its weights start a new one.
    Raises InputError for a model that ours is not, by its arguments or its tensors.
    """
    path = find_iteration(source)
    common = read_common(path)
    args = common.get("args")
    if args is None:
        raise InputError(f"{path / COMMON} has no args; expected those of Megatron-LM")
    settings = settings_of(args, path)
    reader = Reader(path)
    tokenizer = _tokenizer(config, path)
    rows = reader.tensors.get(_EMBEDDING, ((0,), None))[0][0]
    if rows < tokenizer.vocab_size:
        raise InputError(
            f"{path} has {rows} rows of {_EMBEDDING}, and {tokenizer.path} has tokens up to {tokenizer.vocab_size - 1}"
        )
    settings["model"]["make_vocab_size_divisible_by"] = divisor(rows, tokenizer.vocab_size)
    (output / "tokenizer").mkdir()
    shutil.copyfile(tokenizer.path, output / "tokenizer" / "tokenizer.json")
    settings["data"]["tokenizer"] = str(final / "tokenizer" / "tokenizer.json")
    settings["data"]["eod_token"] = tokenizer.eod_token
    settings["data"]["seq_length"] = config.seq_length or settings["data"]["seq_length"]
    reason = cannot_continue(args, common)
    run = parsed(settings)
    check_tensors(run.model, rows, reader.tensors, path, by="args")
    write_settings(output, run, whole=reason is None)
    progress = Progress() if reason else Progress(common["iteration"], args.consumed_train_samples)
    _write_ours(output, reader, common, progress, run, {**describe(run, tokenizer), "weights_only": reason is not None})
    told = f"{final}: {path} of Megatron-LM, vocabulary {tokenizer.vocab_size} in {rows} rows"
    begin = f"ptrl pretrain --config {final / 'config.yaml'}"
    if reason is not None:
        use = f"{begin} --checkpoint.load {final} --run_dir ... --data.train ..."
        return f"{told}\n  weights alone: {reason}\n  {use}"
    return (
        f"{told}, continuing at step {progress.step} after {progress.consumed_samples:,} samples\n"
        f"  {begin} --run_dir {final} --data.train ..."
    )


def _write_ours(
    output: Path, reader: Reader, theirs: dict[str, Any], progress: Progress, run: PretrainConfig, about: dict[str, Any]
) -> None:
    """A checkpoint of ours in the run directory `output`."""
    path = output / "checkpoints" / f"step_{progress.step:08d}"
    path.mkdir(parents=True)
    common: dict[str, Any] = {}
    if not about["weights_only"]:
        progress_and_schedule = {**dataclasses.asdict(progress), "scheduler": theirs["opt_param_scheduler"]}
        common = {"optimizer": theirs["optimizer"], "run": progress_and_schedule}
    # Their values are state of fp8 at most, which builds up again; what loads a checkpoint asks for their names.
    objects = {name for name in reader.objects if name.partition("/")[0].endswith("._extra_state")}
    objects |= {name for name, _ in empty_objects(run.model)}
    torch_dist.copy(
        reader,
        path,
        common,
        lambda key: not (about["weights_only"] and key.startswith(_OPTIMIZER)),
        objects=[(name, None) for name in sorted(objects)],
    )
    args = theirs["args"]
    layout = {
        "world_size": int(getattr(args, "world_size", 1)),
        "tp": run.parallel.tp,
        "pp": run.parallel.pp,
        "cp": int(getattr(args, "context_parallel_size", 1)),
    }
    about = {**about, "random_state": False, "source": str(reader.folder)}
    checkpoint.write_manifest(path, progress, about, layout)


def to_megatron_lm(config: ConvertConfig, output: Path, final: Path) -> str:
    """Write the checkpoint that `config.input` names into the empty folder `output`, for --load of Megatron-LM.

    Raises InputError for a model that Megatron-LM's arguments cannot say, and for other tensors than it has.
    """
    path, notes = find_source(config.input, "input", checkpoint.newest_whole)
    manifest = checkpoint.read_manifest(path)
    tokenizer = tokenizer_of(manifest, config.tokenizer)
    check_vocabulary(path, manifest, tokenizer, "input")
    check_model(manifest["model"], path)
    run = _run_of(manifest, path)
    reader = Reader(path)
    weights_only = bool(manifest.get("weights_only"))
    args = args_of(run, manifest["vocab_size"], manifest["layout"], manifest)
    check_tensors(run.model, args.padded_vocab_size, reader.tensors, path, by=checkpoint.MANIFEST)
    args.no_save_optim = weights_only
    content: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if run.parallel.distributed_optimizer and not weights_only:
        content |= {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
    common: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": manifest["step"], CONTENT: content}
    if not weights_only:
        ours = read_common(path)
        whole_steps(ours["optimizer"])
        vars(args).update(schedule_args(run))
        common |= {"optimizer": ours["optimizer"], "opt_param_scheduler": ours["run"]["scheduler"]}
    name = "release" if weights_only else f"iter_{manifest['step']:07d}"
    (output / name).mkdir()
    # A model of Transformer Engine, there, asks for more names than one of Megatron-Core's own layers has written here.
    objects: dict[str, Any] = dict(empty_objects(run.model))
    objects |= {key: reader.read_object(key) for key in reader.objects if not key.startswith("random_state")}
    torch_dist.copy(reader, output / name, common, lambda key: True, objects=sorted(objects.items()))
    (output / TRACKER).write_text("release" if weights_only else str(manifest["step"]))
    what = "weights" if weights_only else f"iteration {manifest['step']} with its optimizer"
    flags = f"--load {final} --ckpt-format torch_dist --use-checkpoint-args {flags_beyond_args(run)}"
    return "\n".join([*notes, f"{final}: {path} for Megatron-LM, {what}", f"  {flags}"])


def _run_of(manifest: dict[str, Any], path: Path) -> PretrainConfig:
    """Settings of the run that saved a checkpoint of ours, as far as Megatron-LM has them."""
    saved = manifest["settings"]
    if "train.global_batch" not in saved:
        raise InputError(
            f"{path} is of a run whose steps have no fixed batch; Megatron-LM's have: expected pretrain or sft"
        )
    sections = ("data.seq_length", "data.isolate_documents", "parallel.", "optimizer.", "train.")
    wanted: dict[str, dict[str, Any]] = {}
    for name, value in saved.items():
        section, _, field = name.partition(".")
        if name.startswith(sections) and field != "epochs" and value is not None:
            wanted.setdefault(section, {})[field] = value
    wanted["train"]["steps"] = max(wanted["train"].get("steps", 1), 1)
    run = parsed(wanted)
    return PretrainConfig(
        model=model_of(manifest), data=run.data, train=run.train, optimizer=run.optimizer, parallel=run.parallel
    )


def _tokenizer(config: ConvertConfig, path: Path) -> Tokenizer:
    if config.tokenizer is None:
        raise InputError(f"{path} does not hold a tokenizer; name the tokenizer.json of its data by --tokenizer")
    return Tokenizer(config.tokenizer, config.eod_token or DEFAULT_EOD)
