"""`ptrl segment` in a process of its own that waits at a known place, in a module that its workers import quickly."""

import signal
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forked import forked

from megatron_ptrl.config import SegmentConfig
from megatron_ptrl.executors import PartStep
from megatron_ptrl.segmenting import pipeline
from megatron_ptrl.segmenting.pipeline import SegmentStep, SignStep


class Held(PartStep):
    """A step that waits, and tells so, before it does a part when the output has so many files that match."""

    def __init__(self, *arguments: Any, hold: tuple[Path, str, int]) -> None:
        super().__init__(*arguments)
        self.hold = hold

    def work(self, share: list[int]) -> None:
        output, pattern, count = self.hold
        for number in share:
            if len(list(output.glob(pattern))) >= count:
                output.with_name("held").touch()
                signal.pause()
            super().work([number])


class HeldSigning(Held, SignStep):
    pass


class HeldSegmenting(Held, SegmentStep):
    pass


def run_held(config: SegmentConfig, pattern: str, count: int) -> None:
    hold = Path(config.output), pattern, count
    pipeline.SignStep, pipeline.SegmentStep = partial(HeldSigning, hold=hold), partial(HeldSegmenting, hold=hold)
    pipeline.run(config)


def held(config: SegmentConfig, pattern: str, count: int) -> AbstractContextManager[BaseProcess]:
    """A process that runs the stage until so many files of the output match; killed at the end."""
    mark = Path(config.output).with_name("held")
    mark.unlink(missing_ok=True)
    return forked(run_held, config, pattern, count, until=mark.exists)
