"""What every training stage shares: model, optimizer, progress and log of one run, and the loop over its steps.

    restore --> step, step, ... --every so often--> evaluate, save --at the end--> what the stage has to say

The same command continues a run that was stopped or killed.
"""

import contextlib
import dataclasses
import math
import shutil
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from megatron_ptrl.config import RunConfig
from megatron_ptrl.data.tokenizer import Tokenizer
from megatron_ptrl.errors import FULL, InputError
from megatron_ptrl.training import checkpoint, mcore, run_lock, signals
from megatron_ptrl.training.layout import Layout
from megatron_ptrl.training.optimizer import build_optimizer, build_scheduler
from megatron_ptrl.training.resume import describe, model_fields, restore
from megatron_ptrl.training.runlog import RunLog

Figures = dict[str, float]


def on_all_ranks(config: RunConfig, work: Callable[[], None]) -> None:
    """`work` between the start and the end of the process groups; an InputError tells which rank raised it.

    Raises InputError, too, where there is no more room to write.
    """
    mcore.initialize(config)
    try:
        with told_when_full(Path(config.run_dir)):
            work()
    except InputError as error:
        # Each rank has its own part of the data, so this may be the only one that knows.
        error.rank = dist.get_rank()
        raise
    finally:
        mcore.shutdown()


@contextlib.contextmanager
def told_when_full(run_dir: Path) -> Iterator[None]:
    """An InputError in place of the OSError of a full disk, whatever file of `run_dir` was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(run_dir).free >> 20
        raise InputError(
            f"run_dir {run_dir} ({free:,} MiB free there): {error.strerror}; nothing was saved after the last "
            "checkpoint. Make room and start the same command again, which goes on from there"
        ) from error


class TrainingRun:
    """One run on this rank. A stage fills in what comes before the model, what a step is and what ends the run."""

    def __init__(self, config: RunConfig, layout: Layout, tokenizer: Tokenizer) -> None:
        self.config: Any = config
        self.layout, self.tokenizer = layout, tokenizer
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self._lock = run_lock.take(self.run_dir)
        self.about = describe(config, tokenizer)
        prepared = self._prepare()
        self.chunks = mcore.build_model(config, tokenizer.vocab_size)
        self.optimizer = build_optimizer(config, self.chunks)
        self.scheduler = build_scheduler(config, self.optimizer)
        self.signals = signals.Signals()
        self.progress, notes = restore(config, tokenizer, self.chunks, self.optimizer, self.scheduler)
        self.log = self._open_log()
        for note in [*notes, *prepared]:
            self.say(note)

    def _prepare(self) -> list[str]:
        """Open the data, load frozen models; returns notes for the log. The random state is set afterwards."""
        return []

    def _begin(self) -> None:
        """Before the first step of this call."""

    @abstractmethod
    def _step(self) -> Figures:
        """One step, recorded; returns its figures."""

    def _evaluate(self) -> None:
        """Held-out figures, recorded."""

    def _evaluates_at(self, step: int) -> bool:
        return False

    def _already_complete(self) -> None:
        """All steps were done before this call."""

    def _finish(self, figures: Figures, rates: list[float], seconds: float) -> None:
        """After the last step; figures: that step's, empty without one   rates: tokens/s   seconds: of this call."""

    def _close(self) -> None:
        """Let go of what `_prepare` and `_begin` opened."""

    def run(self) -> None:
        """Train to the last step, or to a SIGTERM; then evaluate, save, summarise."""
        try:
            self._run()
        finally:
            self._close()
            if self._lock:
                self._lock.close()

    def _run(self) -> None:
        config, start = self.config, time.perf_counter()
        figures: Figures = {}
        rates: list[float] = []
        self._begin()
        stopped = False
        while self.progress.step < config.train.steps and not stopped:
            figures = self._step()
            rates.append(figures["tokens_per_second"])
            step = self.progress.step
            last = step == config.train.steps
            if last or self._evaluates_at(step):
                self._evaluate()
            save_now, stopped = self.signals.agree()
            every = config.checkpoint.save_every
            if last or save_now or stopped or (every and step % every == 0):
                self._save()
        if not figures and not stopped:
            self._already_complete()
        if stopped:
            self.say(f"SIGTERM: saved at step {self.progress.step}; the same command continues")
        else:
            self._finish(figures, rates, time.perf_counter() - start)
        if self.log:
            self.log.close()

    def say(self, text: str) -> None:
        """A line in the log, from rank 0."""
        if self.log:
            self.log.say(text)

    def _learning_rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _record(self, figures: Figures) -> Figures:
        """Into the metrics and the progress line. Raises InputError for a loss or a gradient that is not finite."""
        if self.log:
            self.log.record(figures)
            self.log.progress(figures)
        if not all(math.isfinite(figures[name]) for name in ("loss", "grad_norm")):
            message = (
                f"step {figures['step']}: loss {figures['loss']}, gradient norm {figures['grad_norm']}; nothing was "
                "saved after the last checkpoint. Lower optimizer.lr, lengthen warmup_steps or look at the data of "
                "this step"
            )
            self.say(message)
            raise InputError(message)
        return figures

    def _save(self) -> None:
        path = checkpoint.save(
            self.checkpoints,
            self.progress,
            self.chunks,
            self.optimizer,
            self.scheduler,
            keep=self.config.checkpoint,
            about=self.about,
        )
        self.say(f"saved {path}")

    def _draw_plots(self) -> None:
        """On rank 0, where the config asks for them."""
        if self.log and self.config.log.plots:
            from megatron_ptrl.evaluation.report import draw_plots

            paths = draw_plots([self.run_dir], self.run_dir / "plots")
            self.say(f"plots: {len(paths)} files in {self.run_dir / 'plots'}")

    def _open_log(self) -> RunLog | None:
        if dist.get_rank() != 0:
            return None
        complete = self.progress.step >= self.config.train.steps
        return RunLog(
            self.run_dir,
            self.config.log,
            first_step=self.progress.step,
            last_step=self.config.train.steps,
            settings=None if complete else yaml.safe_dump(plain_settings(self.config), sort_keys=False),
        )


def plain_settings(config: Any) -> dict[str, Any]:
    """The config as YAML holds it, ready for --config: Megatron-Core's own fields only where they were set."""
    plain = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "model":
            value = model_fields(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        plain[field.name] = value
    return plain
