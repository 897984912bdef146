"""A run of `ptrl rl` killed at any moment: the same command gives the same figures and responses, each prompt once.

A process that has imported all there is makes a child for every life of the run: as a script, this file is that one.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl_runs import make_prompts, reinforcement, rl_config
from tiny import Metrics, Settings, read_metrics

STEPS = 5
DEADLINE = 900.0  # seconds for all lives; half a minute on an idle core


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_rollout(run: Any, step: int) -> None:
    """With half of the step's responses written."""
    generate = run._make_engine

    def make() -> Any:
        engine = generate()
        whole = engine.generate

        def half(requests: Any, **options: Any) -> Any:
            seen = []

            def on_done(number: int, generation: Any) -> None:
                seen.append(number)
                options_done(number, generation)
                if run.progress.step + 1 == step and len(seen) == len(requests) // 2:
                    die()

            options_done = options.pop("on_done")
            return whole(requests, on_done=on_done, **options)

        engine.generate = half
        return engine

    run._make_engine = make


def at_judging(run: Any, step: int) -> None:
    """With all responses written and none of their judgements back."""
    begin = run._begin

    def begun() -> None:
        begin()
        judgements = run.collector._judgements
        run.collector._judgements = lambda *x: die() if run.progress.step + 1 == step else judgements(*x)

    run._begin = begun


def at_update(run: Any, step: int) -> None:
    """With new weights and no figures of the step."""
    move_on = run.scheduler.step
    run.scheduler.step = lambda *x, **y: die() if run.progress.step + 1 == step else move_on(*x, **y)


def at_save(run: Any, step: int) -> None:
    """With every file of the checkpoint but its manifest."""
    from megatron_ptrl.training import checkpoint

    write = checkpoint._write_durably
    checkpoint._write_durably = lambda *x: die() if run.progress.step == step else write(*x)


def life(settings: Settings, prepare: Callable[[Any, int], None] | None, step: int) -> int:
    """One run of the command in a process of its own; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with reinforcement(settings, 1) as run:
                if prepare is not None:
                    prepare(run, step)
                run.run()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) <= 0, "the run failed by itself"
    return os.WTERMSIG(status)


def lives(whole: Settings, killed: Settings) -> list[int]:
    """The undisturbed run, and the one that is killed at each moment; the signals that ended them."""
    moments = [(at_rollout, 2), (at_judging, 3), (at_update, 4), (at_save, 4), (None, 0)]
    return [life(whole, None, 0)] + [life(killed, prepare, step) for prepare, step in moments]


def test_killed_at_any_moment_the_same_command_repeats_the_figures(prefix: str, tmp_path: Path) -> None:
    prompts: list[str | float] = [make_prompts(tmp_path / "prompts.jsonl", 17)]
    options = {"checkpoint__save_every": 2, "train__steps": STEPS, "rollout__resample": 1, "rollout__updates": 2}
    settings = [rl_config(prefix, prompts, tmp_path / name, **options) for name in ("whole", "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(settings)]
    # Into a file: helpers of a killed run hold a pipe open for as long as they live.
    with (tmp_path / "output").open("w") as output:
        code = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=DEADLINE).returncode
    told = (tmp_path / "output").read_text()
    assert code == 0, told[-4000:]
    assert json.loads(told.splitlines()[-1]) == [0, 9, 9, 9, 9, 0]
    log = (tmp_path / "killed" / "log.txt").read_text()
    assert "(step 2)" in log and ".step_00000004.partial: its save was cut short" in log
    expected: list[Metrics] = read_metrics(tmp_path / "whole")
    assert len(expected) == STEPS and expected[1] != expected[2] and expected[-1]["updates"] == 2
    assert read_metrics(tmp_path / "killed") == expected
    for step in range(1, STEPS + 1):
        name = f"rollouts/step_{step:08d}.jsonl"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


if __name__ == "__main__":
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    import megatron_ptrl.training.rl  # noqa: F401

    print(json.dumps(lives(*json.loads(sys.argv[1]))))
