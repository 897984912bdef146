"""launch/slurm on a real Slurm of two nodes: whatever becomes of ranks and jobs, the figures are those without it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from slurm_cluster import SlurmCluster, missing_programs
from think_runs import write_corpus
from tiny import Settings, flags, read_metrics, run_tiny, tiny_config

ROOT = Path(__file__).parents[1]
SBATCH = str(ROOT / "launch/slurm/stage.sbatch")
SECONDS = 600.0
STEPS = 30


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch) -> None:
    """Jobs inherit it; they write their logs where they were submitted."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"PTRL_HOME": ROOT, "PYTHON": sys.executable, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")


def wait_for(wanted: str, is_there: Callable[[], object], patience: float = SECONDS) -> None:
    deadline = time.monotonic() + patience
    while not is_there():
        logs = "\n".join(path.read_text()[-3000:] for path in Path().glob("*.out"))
        assert time.monotonic() < deadline, f"no {wanted} in {patience:.0f} s\n{logs}"
        time.sleep(0.02)


def rank_processes(job: str) -> dict[str, psutil.Process]:
    """The ranks of a job that train, by their number."""
    found = {}
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("SLURM_JOB_ID") == job and "RANK" in environment and "pretrain" in process.cmdline():
                found[environment["RANK"]] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def go_on_until(wanted: str, job: str, is_there: Callable[[], object]) -> None:
    """`wait_for`, of a job whose ranks go step by step: the first one stops there, if not before."""

    def looked() -> bool:
        if is_there():
            return True
        for process in rank_processes(job).values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    process.resume()
        return False

    wait_for(wanted, looked)


def is_told(process: psutil.Process) -> bool:
    """Whether it has SIGTERM before it, for when it goes on."""
    pending = re.search(r"(?m)^ShdPnd:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text())
    return bool(pending and int(pending[1], 16) >> (signal.SIGTERM - 1) & 1)


def steps_done(settings: Settings) -> int:
    metrics = Path(settings["run_dir"]) / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def serving() -> list[psutil.Process]:
    """The stub server that a job has started in this test's folder."""
    log = str(Path("answered").absolute())
    found = [process for process in psutil.process_iter(["cmdline"]) if log in (process.info["cmdline"] or [])]
    return [process for process in found if process.name().startswith("python")]


def state(slurm: SlurmCluster, job: str) -> str:
    said = slurm.ask("scontrol", "--oneliner", "show", "job", job)
    return next(word.removeprefix("JobState=") for word in said.split() if word.startswith("JobState="))


def test_a_rank_is_killed_then_time_is_over_and_the_job_goes_on_by_itself(ranks, slurm, prefix, monkeypatch):
    home = Path("home").absolute()
    shutil.copytree(ROOT / "launch", home / "launch")
    launcher = (home / "launch/torchrun.sh").read_text()
    (home / "launch/torchrun.sh").write_text(launcher.replace(" -m megatron_ptrl ", f" {ROOT}/tests/step_by_step.py "))
    monkeypatch.setenv("PTRL_HOME", str(home))
    options = {"train__steps": STEPS, "checkpoint__save_every": 5, "model__hidden_dropout": 0.1}
    settings = tiny_config(prefix, Path("run").absolute(), **options)
    whole = run_tiny(ranks, 2, settings | {"run_dir": str(Path("whole").absolute())})
    job = slurm.ask("sbatch", "--parsable", "--nodes", "2", SBATCH, "pretrain", *flags(settings))

    go_on_until("checkpoint", job, lambda: steps_done(settings) == 7)
    assert set(rank_processes(job)) == {"0", "1"}
    killed = rank_processes(job)["1"]
    killed.kill()
    go_on_until("restart of the ranks", job, lambda: "continuing from" in Path("run/log.txt").read_text())
    resumed = steps_done(settings)
    go_on_until("step after it", job, lambda: steps_done(settings) > resumed + 1)
    first = rank_processes(job)["0"]
    wait_for("stop", lambda: first.status() == psutil.STATUS_STOPPED)
    slurm.ask("scancel", "--signal", "USR1", "--batch", job)  # as --signal=B:USR1@300 does before the end of its time
    wait_for("signal", lambda: is_told(first))
    go_on_until("second start", job, lambda: "start 2" in Path(f"ptrl-{job}.out").read_text())
    go_on_until("end", job, lambda: state(slurm, job) not in ("RUNNING", "COMPLETING"))

    output, log = Path(f"ptrl-{job}.out").read_text(), Path("run/log.txt").read_text()
    assert state(slurm, job) == "COMPLETED", output
    assert "into the queue again" in output and "SIGTERM: saved at step" in log, output
    assert "start 3" not in output and log.count("continuing from") == 2
    assert read_metrics(settings["run_dir"]) == whole and len(whole) == STEPS
    logs = sorted(str(path.relative_to("logs")) for path in Path("logs", job).rglob("stderr.log"))
    # torchrun counts a start that another node's failure caused as none of its own, and gives it no folder of its own.
    assert len(logs) in (5, 6), f"a log for each rank, of each of its three starts: {logs}"


def test_a_server_as_a_step_is_waited_for_and_started_again(slurm, monkeypatch):
    source = write_corpus(Path("in.jsonl"), 40)
    # The first one has answered so many when it is killed, and the second one is left with fewer.
    command = (
        f"{sys.executable} {ROOT}/tests/stub_llm_server.py {Path('answered').absolute()} --port {{port}} --allow 25"
    )
    os.environ["SERVER"], os.environ["SERVER_HEALTH"] = command, "/v1/models"
    try:
        words = ["--input", source, "--output", "out", "--servers", "{servers}", "--then_assemble", "false"]
        words += ["--server.model", "m", "--server.in_flight", "2", "--server.backoff", "0.1"]
        job = slurm.ask("sbatch", "--parsable", "--nodes", "2", SBATCH, "think", *map(str, words))
    finally:
        del os.environ["SERVER"], os.environ["SERVER_HEALTH"]
    wait_for("answer", lambda: Path("answered").exists() and Path("answered").read_text().count("\n") == 25)
    (server,) = serving()
    server.send_signal(signal.SIGKILL)
    wait_for("end", lambda: state(slurm, job) not in ("RUNNING", "COMPLETING"))
    output = Path(f"ptrl-{job}.out").read_text()
    assert state(slurm, job) == "COMPLETED" and "starting it again" in output, output
    asked = Path("answered").read_text().split()
    assert set(asked) == {f"d{i}" for i in range(40)}
    slurm.wait_until_empty()
    assert not serving()


def test_the_flywheel_waits_for_what_it_needs(slurm, monkeypatch):
    home = Path("home").absolute()
    shutil.copytree(ROOT / "launch", home / "launch")
    for name in ("torchrun.sh", "segment.sh"):
        (home / "launch" / name).write_text('#!/usr/bin/env bash\necho "$@" >> stages\n')
    monkeypatch.setenv("PTRL_HOME", str(home))

    def submitted(folder: str) -> list[str]:
        Path(folder).mkdir()
        for name in ("segment", "sft", "rl", "score-base", "score-policy", "pretrain"):
            Path(folder, f"{name}.yaml").touch()
        slurm.ask(str(home / "launch/slurm/flywheel.sh"), folder)
        slurm.wait_until_empty()
        lines = [line.split() for line in Path("stages").read_text().splitlines()]
        judged = [line[0] for line in lines if "http://127.0.0.1" in " ".join(line[line.index("--config") :])]
        assert judged == (["rl"] if "SERVER" in os.environ else []), "the server is the judge of rl, and its alone"
        ran = [Path(line[line.index("--config") + 1]).stem for line in lines]
        Path("stages").unlink()
        return ran

    monkeypatch.setenv("SERVER", f"{sys.executable} -m http.server {{port}}")
    monkeypatch.setenv("SERVER_HEALTH", "/")
    monkeypatch.setenv("FLAGS_RL", "--nodes 2")
    ran = submitted("whole")
    assert sorted(ran) == ["pretrain", "rl", "score-base", "score-policy", "segment", "sft"]
    assert [name for name in ran if name != "score-base"] == ["segment", "sft", "rl", "score-policy", "pretrain"]
    assert ran.index("score-base") < ran.index("pretrain")
    shutil.rmtree("whole")
    monkeypatch.delenv("SERVER")
    (home / "launch/torchrun.sh").write_text('#!/usr/bin/env bash\necho "$@" >> stages; [[ "$1" != rl ]]\n')
    assert set(submitted("whole")) == {"segment", "sft", "rl", "score-base"}, "nothing follows what failed"


def test_a_node_dies_and_another_goes_on(monkeypatch, tmp_path_factory):
    if missing_programs():
        pytest.skip(f"Slurm is not installed: there is no {missing_programs()}")
    home = Path("home").absolute()
    shutil.copytree(ROOT / "launch", home / "launch")
    stage = '#!/usr/bin/env bash\necho "$SLURMD_NODENAME" >> nodes; (($(wc -l < nodes) == 2)) || sleep 300\n'
    (home / "launch/torchrun.sh").write_text(stage)
    monkeypatch.setenv("PTRL_HOME", str(home))
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), "SlurmdTimeout=6") as slurm:
        job = slurm.ask("sbatch", "--parsable", SBATCH, "pretrain")
        wait_for("first start", lambda: Path("nodes").exists() and Path("nodes").read_text().strip())
        node = Path("nodes").read_text().strip()
        slurm.lose_node(node, job)
        wait_for("second start", lambda: Path("nodes").read_text().count("\n") == 2)
        wait_for("end", lambda: state(slurm, job) not in ("RUNNING", "COMPLETING"))
        assert state(slurm, job) == "COMPLETED"
    assert set(Path("nodes").read_text().split()) == {"one", "two"}


def test_bad_use_is_told_in_one_line(slurm, monkeypatch):
    monkeypatch.setenv("PTRL_HOME", "/nowhere")
    job = slurm.ask("sbatch", "--parsable", SBATCH, "pretrain")
    slurm.wait_until_empty()
    assert "there is no /nowhere/launch/torchrun.sh" in Path(f"ptrl-{job}.out").read_text()
    done = subprocess.run(
        [ROOT / "launch/pretrain.sh"], env=os.environ | {"NNODES": "2"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "RDZV_ENDPOINT must be host:port" in done.stderr
