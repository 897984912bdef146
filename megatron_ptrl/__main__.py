"""`ptrl STAGE`, `python -m megatron_ptrl STAGE`, `torchrun ... -m megatron_ptrl STAGE`."""

import importlib
import os
import sys
import time
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_ptrl.errors import DENIED, FULL, InputError, printable

SECONDS_FOR_RANK_0 = 10.0


@dataclass(frozen=True)
class _Stage:
    module: str
    config: str
    help: str
    positional: str | None = None
    """Config field that bare arguments go to."""
    trains: bool = False
    """Whether it imports Megatron-Core and may have to do without CUDA."""
    extra: str | None = None
    """Name of the optional dependencies it needs."""


_STAGES = {
    "doctor": _Stage("megatron_ptrl.doctor", "DoctorConfig", "what is installed and built, and what is missing"),
    "tokenize": _Stage(
        "megatron_ptrl.data.tokenize_stage", "TokenizeConfig", "text, JSONL or Parquet -> tokenizer, .bin/.idx"
    ),
    "think": _Stage(
        "megatron_ptrl.thinking.pipeline",
        "ThinkConfig",
        "documents -> documents with generated thinking (TPT) -> .bin/.idx",
        extra="tpt",
    ),
    "assemble": _Stage(
        "megatron_ptrl.thinking.assemble_stage", "AssembleConfig", "documents with their thinking -> .bin/.idx"
    ),
    "think_report": _Stage(
        "megatron_ptrl.thinking.analysis", "ThinkReportConfig", "thinking -> a table and plots", positional="runs"
    ),
    "segment": _Stage(
        "megatron_ptrl.segmenting.pipeline", "SegmentConfig", "documents -> next-segment prompts (RLPT)", extra="seg"
    ),
    "pretrain": _Stage(
        "megatron_ptrl.training.pretrain", "PretrainConfig", ".bin/.idx -> checkpoints, metrics, plots", trains=True
    ),
    "sft": _Stage(
        "megatron_ptrl.training.sft", "SFTConfig", "conversations + checkpoint -> a model that answers", trains=True
    ),
    "rl": _Stage(
        "megatron_ptrl.training.rl",
        "RLConfig",
        "prompts + checkpoint -> a policy trained by its rewards (RLPT, RLVR)",
        trains=True,
        extra="rl",
    ),
    "score": _Stage(
        "megatron_ptrl.training.score", "ScoreConfig", "checkpoint + .bin/.idx -> log-probabilities", trains=True
    ),
    "select": _Stage(
        "megatron_ptrl.data.select_stage", "SelectConfig", ".bin/.idx + two scores -> the share of documents to keep"
    ),
    "convert": _Stage(
        "megatron_ptrl.conversion.convert_stage",
        "ConvertConfig",
        "a Hugging Face model (Llama, Qwen) -> a checkpoint, and back",
        trains=True,
    ),
    "evaluate": _Stage(
        "megatron_ptrl.training.evaluate",
        "EvaluateConfig",
        "checkpoint -> perplexity, entropy, pass@k, avg@n, cons@n, next-segment accuracy",
        trains=True,
        extra="rl",
    ),
    "report": _Stage(
        "megatron_ptrl.evaluation.report", "ReportConfig", "run directories -> plots and a table", positional="runs"
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, or 2 after bad input or where the disk refuses, told in one line.

    Raises KeyboardInterrupt after Ctrl-C, told in one line too. Python then ends by the signal, exit code 130 in a
    shell, which is how a shell's loop knows that it is to end as well.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    stage = _STAGES.get(name)
    try:
        if stage is None:
            raise InputError(f"there is no stage {name}; expected one of {', '.join(_STAGES)}")
        _silence_megatron()
        if stage.trains:
            _prepare_for_training()
        from megatron_ptrl import config
        from megatron_ptrl.cli import parse

        settings = parse(getattr(config, stage.config), rest, prog=f"ptrl {name}", positional=stage.positional)
        _import(stage).run(settings)
    except InputError as error:
        rank = error.rank
        if rank is None and os.environ.get("RANK", "0") != "0":
            # What is wrong before the process group is up is wrong on every rank. One of them says it: the launcher
            # ends the others then, and would have ended that one if another had ended first.
            time.sleep(SECONDS_FOR_RANK_0)
            rank = int(os.environ["RANK"])
        where = f" (rank {rank})" if rank else ""
        print(f"ptrl {name}{where}: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        where = f"{printable(str(error.filename))}: " if error.filename else ""
        print(f"ptrl {name}: {where}{error.strerror}; {remedy}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"ptrl {name}: interrupted; start the same command again to go on", file=sys.stderr, flush=True)
        sys.excepthook = _say_nothing
        raise
    return 0


def _remedy(error: OSError) -> str | None:
    """What to do about it; None where it may be a fault of ours."""
    if error.errno in FULL:
        return "make room and start the same command again"
    if error.errno in DENIED and error.filename:
        return "give this user the right to it, or name another path"
    return None


def _say_nothing(*_: object) -> None:
    """In place of a traceback."""


def _import(stage: _Stage) -> ModuleType:
    try:
        return importlib.import_module(stage.module)
    except ModuleNotFoundError as error:
        if stage.extra is None or (error.name or "").startswith("megatron_ptrl"):
            raise
        raise InputError(f"this stage needs {error.name}; pip install megatron-ptrl[{stage.extra}]") from error


def _silence_megatron() -> None:
    # Every process would say it again; `ptrl doctor` says it once, with what it costs.
    warnings.filterwarnings("ignore", message=".*(Apex|apex|Transformer Engine).*")
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # Megatron-Core loads checkpoints by a name and a tensor class that torch is about to drop.
    warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    # Megatron-Core calls collectives by names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)


def _prepare_for_training() -> None:
    import torch

    from megatron_ptrl.training import host

    if torch.cuda.is_available():
        return
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    # Megatron-Core marks functions for the compiler while it is imported, which imports that, for seconds. On CPUs it
    # is not worth them.
    compiler, torch.compile = torch.compile, _not_compiled  # type: ignore[assignment]
    try:
        host.install_if_no_cuda()
        importlib.import_module("megatron_ptrl.training.layers")
    finally:
        torch.compile = compiler  # type: ignore[assignment]


def _not_compiled(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda function: function


def _usage() -> str:
    lines = [f"  {name:<12} {stage.help}" for name, stage in _STAGES.items()]
    return "\n".join(["usage: ptrl STAGE [--config FILE] [--field value ...]", "", *lines, "", "ptrl STAGE --help"])


if __name__ == "__main__":
    sys.exit(main())
