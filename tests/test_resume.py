"""Real processes under torchrun, killed or told to stop at any moment: the same command gives the same figures."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Ranks
from tiny import Metrics, Settings, flags, read_metrics, run_tiny, tiny_config

DEADLINE = 600.0  # seconds for anything here; the whole run takes ten on an idle core
PROGRAM = ["-m", "megatron_ptrl"]
STEP_BY_STEP = [str(Path(__file__).with_name("step_by_step.py"))]
STEPS = 24


def command(settings: Settings, program: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [sys.executable, *launcher, *rendezvous, *program, "pretrain", *flags(settings)]


@contextlib.contextmanager
def launched(settings: Settings, program: list[str] = PROGRAM) -> Iterator[subprocess.Popen[str]]:
    """torchrun and its ranks, of which nothing is left afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    with open(Path(settings["run_dir"]).with_suffix(".out"), "a") as output:
        process = subprocess.Popen(command(settings, program), stdout=output, stderr=output, text=True, env=environment)
        try:
            yield process
        finally:
            kill_family(process)


def family(process: subprocess.Popen[str]) -> list[int]:
    """torchrun, the ranks, which have sessions of their own, and the helpers that they started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [process.pid]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def kill_family(process: subprocess.Popen[str]) -> None:
    for pid in family(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(DEADLINE)


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """In the order of the ranks; fewer than two while they are being started or when they have ended."""
    found = {}
    for pid in family(process):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"pretrain" in words:
                found |= {rank: pid for rank in range(2) if f"RANK={rank}".encode() in environment}
    return [found[rank] for rank in sorted(found)]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> list[int]:
    """Goes STEP_BY_STEP to that moment, at which rank 0 is stopped and the others wait for it; their process ids."""
    end = time.monotonic() + DEADLINE
    pids: list[int] = []
    while True:
        assert process.poll() is None, f"the run ended with {process.returncode} before that moment"
        assert time.monotonic() < end, "that moment did not come in time"
        pids = pids if len(pids) == 2 else rank_pids(process)
        if len(pids) == 2 and is_stopped(pids[0]):
            if condition():
                return pids
            os.kill(pids[0], signal.SIGCONT)
        time.sleep(0.005 if len(pids) == 2 else 0.1)  # they import for seconds


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def run_to_its_end(process: subprocess.Popen[str], rank_0: int) -> int:
    """The exit code of what went STEP_BY_STEP."""
    end = time.monotonic() + DEADLINE
    while process.poll() is None:
        assert time.monotonic() < end, "the end did not come in time"
        if is_stopped(rank_0):
            os.kill(rank_0, signal.SIGCONT)
        time.sleep(0.005)
    return process.returncode


def steps_done(settings: Settings) -> int:
    metrics = Path(settings["run_dir"]) / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def finish(settings: Settings) -> list[Metrics]:
    with launched(settings) as process:
        code = process.wait(DEADLINE)
    output = Path(settings["run_dir"]).with_suffix(".out").read_text()
    assert code == 0, output[-4000:]
    return read_metrics(settings["run_dir"])


def run_settings(prefix: str, run_dir: Path) -> Settings:
    options = {"parallel__tp": 2, "train__steps": STEPS, "checkpoint__save_every": 5, "model__hidden_dropout": 0.1}
    return tiny_config(prefix, run_dir, **options, train__eval_samples=6, train__eval_every=STEPS // 2)


@pytest.fixture(scope="module")
def uninterrupted(ranks: Ranks, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> list[Metrics]:
    metrics = run_tiny(ranks, 2, run_settings(prefix, tmp_path_factory.mktemp("whole") / "run"))
    assert len(metrics) == STEPS + 2
    return metrics


def test_killed_in_a_step_and_in_a_save_the_same_command_repeats_the_figures(prefix, tmp_path, uninterrupted):
    settings = run_settings(prefix, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    with launched(settings, STEP_BY_STEP) as process:
        wait_until(lambda: steps_done(settings) == 8, process)
    assert [path.name for path in checkpoints.glob("step_*")] == ["step_00000005"]
    assert steps_done(settings) == 8, "figures after the checkpoint are there to be dropped"
    with launched(settings, STEP_BY_STEP) as process:
        wait_until(lambda: any(checkpoints.glob(".step_00000015.partial/*")), process)
    assert not (checkpoints / "step_00000015").exists() and (checkpoints / ".step_00000015.partial").exists()
    assert finish(settings) == uninterrupted
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "continuing from" in log and ".step_00000015.partial: its save was cut short" in log
    assert not list(checkpoints.glob(".*"))


def test_signals_save_and_go_on_or_save_and_stop(prefix, tmp_path, uninterrupted):
    """Told to one rank only, and not the one that writes the log: all ranks act in the same step."""
    settings = run_settings(prefix, tmp_path / "run") | {"checkpoint.save_every": 0, "checkpoint.keep_last": 9}
    checkpoints = tmp_path / "run" / "checkpoints"
    with launched(settings, STEP_BY_STEP) as process:
        rank_0, other = wait_until(lambda: steps_done(settings) == 2, process)
        os.kill(other, signal.SIGUSR1)
        wait_until(lambda: any(checkpoints.glob("step_*")), process)
        after_save = steps_done(settings)
        wait_until(lambda: steps_done(settings) > after_save, process)
        os.kill(other, signal.SIGTERM)
        assert run_to_its_end(process, rank_0) == 0
    saved = sorted(int(path.name.removeprefix("step_")) for path in checkpoints.iterdir())
    stopped = len([row for row in read_metrics(tmp_path / "run") if "loss" in row])
    assert len(saved) == 2 and 2 <= saved[0] < saved[1] == stopped < STEPS
    assert f"SIGTERM: saved at step {stopped}" in (tmp_path / "run" / "log.txt").read_text()
    assert finish(settings) == uninterrupted


def test_bad_input_inside_the_ranks_ends_them_with_its_one_line(prefix, tmp_path):
    settings = tiny_config(prefix, tmp_path / "run", data__seq_length=10**7)
    with launched(settings) as process:
        assert process.wait(DEADLINE) != 0
    output = (tmp_path / "run.out").read_text()
    assert "too few for one sequence of data.seq_length 10000000" in output
    assert "ptrl pretrain: " in output and "in check_enough" not in output
