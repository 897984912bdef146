"""A run with two checkpoints, the fixture `saved_run`, that tests of checkpoints copy and go on from."""

import shutil
from pathlib import Path

from ranks import Ranks
from tiny import run_tiny, tiny_config

STEPS = 8
SAVED = 4


def make_saved_run(ranks: Ranks, prefix: str, run_dir: Path) -> Path:
    """A TP 2 run to step 8 with a checkpoint at step 4, too."""
    options = {"train__steps": STEPS, "checkpoint__save_every": SAVED, "parallel__tp": 2}
    run_tiny(ranks, 2, tiny_config(prefix, run_dir, **options))
    return run_dir


def copy_until(run_dir: Path, folder: Path, step: int = SAVED) -> Path:
    """The run as it was when `step` had been saved."""
    shutil.copytree(run_dir, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return folder
