"""Figures of every step -> metrics.jsonl, TensorBoard, W&B and the terminal. Rank 0 writes, the others are silent."""

import json
import os
import platform
import subprocess
import sys
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ptrl.config import LogConfig

_SHOWN = ("reward", "loss", "ce", "entropy", "response_tokens_mean", "grad_norm")


class RunLog:
    """The files of one run directory. Resuming at a step drops what a killed run wrote after it.

    settings: the resolved config for config.yaml; None leaves that of a complete run as it is
    """

    def __init__(
        self, run_dir: Path, config: LogConfig, *, first_step: int, last_step: int, settings: str | None
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._every = config.every
        self._first_step, self._last_step, self._start = first_step, last_step, time.perf_counter()
        if settings is not None:
            (run_dir / "config.yaml").write_text(settings)
            (run_dir / "environment.json").write_text(json.dumps(environment(), indent=1))
        self._tokens, self._rejects = run_dir / "token_weights.jsonl", run_dir / "rejects.jsonl"
        for lines in (run_dir / "metrics.jsonl", self._tokens, self._rejects):
            _keep_until(lines, first_step)
        self._metrics = (run_dir / "metrics.jsonl").open("a")
        self._text = (run_dir / "log.txt").open("a")
        self._bar = tqdm(total=last_step, initial=first_step, unit="step") if sys.stderr.isatty() else None
        self._tensorboard = _tensorboard(run_dir, first_step) if config.tensorboard else None
        self._wandb = _wandb(run_dir, config.wandb_project) if config.wandb_project else None

    def say(self, text: str) -> None:
        """One line for the reader, on the terminal and in log.txt."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)
        self._text.write(text + "\n")
        self._text.flush()

    def record(self, figures: dict[str, float]) -> None:
        """One object of metrics.jsonl; `figures` holds `step`."""
        self._metrics.write(json.dumps(figures) + "\n")
        self._metrics.flush()
        step = int(figures["step"])
        named = {name: value for name, value in figures.items() if name != "step"}
        if self._tensorboard is not None:
            for name, value in named.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(named, step=step)

    def record_tokens(self, lines: list[dict[str, Any]]) -> None:
        """Objects of token_weights.jsonl, each with its `step`."""
        _append(self._tokens, lines)

    def record_rejects(self, lines: list[dict[str, Any]]) -> None:
        """Objects of rejects.jsonl, each with its `step`."""
        _append(self._rejects, lines)

    def progress(self, figures: dict[str, float]) -> None:
        """Move the bar, or print a line every few steps where there is no terminal."""
        step = int(figures["step"])
        text = _shown(figures)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._every == 0 or step == self._last_step:
            seconds = (time.perf_counter() - self._start) / (step - self._first_step) * (self._last_step - step)
            rate = figures["tokens_per_second"]
            self.say(f"step {step}/{self._last_step}  {text}  {rate:,.0f} tokens/s  {seconds:.0f} s to go")

    def close(self) -> None:
        """Flush and close every file."""
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._metrics.close()
        self._text.close()


def _shown(figures: dict[str, float]) -> str:
    """reward 0.2500 (asr 0.31, msr 0.19), gate failed 12%, entropy 1.2345"""
    parts = {name: f"{name} {figures[name]:.4f}" for name in _SHOWN if name in figures}
    tasks = {name.removeprefix("reward_"): value for name, value in figures.items() if name.startswith("reward_")}
    if len(tasks) > 1:
        parts["reward"] += f" ({', '.join(f'{task} {value:.2f}' for task, value in tasks.items())})"
    if "gate_failed_share" in figures:
        parts["reward"] = f"{parts.get('reward', 'no reward')}, gate failed {figures['gate_failed_share']:.0%}"
    return ", ".join(parts.values())


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def _keep_until(metrics: Path, step: int) -> None:
    """Drop the lines after `step`, and what is no line of ours: one that a killed run cut short, say."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step and step > 0:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    rewritten = metrics.with_suffix(".tmp")
    rewritten.write_text("".join(line + "\n" for line in kept))
    os.replace(rewritten, metrics)


def _tensorboard(run_dir: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)


def _wandb(run_dir: Path, project: str) -> Any:
    import wandb

    # One id for the life of the run directory, so that a resumed run goes on in its own chart.
    identity = run_dir / "wandb_id.txt"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=project, dir=str(run_dir), name=run_dir.name, id=identity.read_text().strip(), resume="allow"
    )


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, to tell later what a run ran on."""
    import torch

    packages = ("torch", "megatron-core", "numpy", "transformer-engine", "megatron-ptrl")
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "commit": _commit(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else [],
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of this checkout, when it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
