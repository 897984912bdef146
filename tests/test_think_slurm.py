"""`ptrl think` on a real Slurm: the bytes of a run without it, whatever becomes of the jobs."""

import time
from pathlib import Path

import psutil
import pytest
from slurm_cluster import PARTITION, SlurmCluster
from stub_llm_server import StubServer
from think_runs import contents, think_config, write_corpus

from megatron_ptrl.__main__ import main
from megatron_ptrl.thinking.pipeline import run

KEY = "sk-this-must-not-be-seen-0123456789"
DOCUMENTS = 40
IN_FLIGHT = 4


def think(*arguments: str) -> int:
    """The command, for two parts of the files in `in`, with two tasks."""
    flags = {
        "input": "in",
        "output": "out dir",
        "part_megabytes": "1e-6",
        "server.model": "m",
        "server.in_flight": str(IN_FLIGHT),
        "executor.kind": "slurm",
        "executor.tasks": "2",
        "executor.workers": "2",
        "executor.partition": PARTITION,
        "assemble.vocab_size": "300",
        "assemble.filters.languages": "[]",
    }
    return main(["think", *(word for name, value in flags.items() for word in (f"--{name}", value)), *arguments])


@pytest.fixture
def expected(tmp_path, monkeypatch) -> dict[str, bytes]:
    """What the local executor writes of the corpus in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    Path("in").mkdir()
    sources = [write_corpus(Path("in") / f"{i}.jsonl", DOCUMENTS // 2, first=i * DOCUMENTS // 2) for i in range(2)]
    with StubServer(tmp_path / "local.log") as server:
        run(think_config(sources, Path("expected"), [server.url], part_megabytes=1e-6))
    return contents(Path("expected"))


def submitted(slurm: SlurmCluster) -> list[str]:
    """The numbers of the jobs that wait or run, in the order of their submission."""
    return sorted(set(slurm.ask("squeue", "-h", "-o", "%F").split()), key=int)


def test_a_job_that_is_submitted_twice(slurm, expected, capsys):
    with StubServer(Path("log")) as server:
        # Kept in the queue until both are there: their tasks start together and want the same parts.
        slurm.ask("scontrol", "update", f"PartitionName={PARTITION}", "State=DOWN")
        for _ in range(2):
            assert think("--servers", server.url) == 0
            said = "2 of 2 parts submitted; repeat the command when they are done"
            assert said in capsys.readouterr().out
        jobs = submitted(slurm)
        assert len(jobs) == 2
        slurm.ask("scontrol", "update", f"PartitionName={PARTITION}", "State=UP")
        slurm.wait_until_empty()
        assert [slurm.states(job) for job in jobs] == [{"0": "COMPLETED", "1": "COMPLETED"}] * 2
        assert contents(Path("out dir")) == expected
        assert not list(Path("out dir").glob("journal/*[0-9].jsonl"))
        assert think("--servers", server.url) == 0 and f"{DOCUMENTS} thoughts in 2 parts" in capsys.readouterr().out
        assert sorted(server.answered()) == sorted(f"d{i}" for i in range(DOCUMENTS))
    assert Path("out dir/train.bin").stat().st_size and not submitted(slurm)
    assert all(KEY.encode() not in path.read_bytes() for path in Path("out dir").rglob("*") if path.is_file())


def is_python_of(process: psutil.Process, task: str) -> bool:
    """Whether it is the Python of this test's task, rather than the srun that waits for it."""
    words = process.info["cmdline"] or [""]
    ours = words[-1].startswith(str(Path.cwd())) and Path(words[0]).name.startswith("python")
    return ours and process.environ()["SLURM_ARRAY_TASK_ID"] == task


def test_tasks_that_are_killed(slurm, expected):
    # Every fifth request is never answered, so neither task can end by itself.
    with StubServer(Path("first"), "--fault", "hang", "--every", "5") as server:
        assert think("--servers", server.url) == 0
        (job,) = submitted(slurm)
        deadline = time.monotonic() + 60
        while {int(name[1:]) < DOCUMENTS // 2 for name in server.answered()} != {True, False}:
            assert time.monotonic() < deadline, "no document of one of the two parts is answered"
            time.sleep(0.02)
        (process,) = [process for process in psutil.process_iter(["cmdline"]) if is_python_of(process, task="1")]
        process.kill()
        slurm.ask("scancel", f"{job}_0")
        slurm.wait_until_empty()
        assert slurm.states(job) == {"0": "CANCELLED", "1": "FAILED"}
        done = len(server.answered())
    with StubServer(Path("second")) as server:
        assert think("--servers", server.url) == 0
        slurm.wait_until_empty()
        assert contents(Path("out dir")) == expected
        assert len(server.answered()) <= DOCUMENTS - done + 2 * IN_FLIGHT


def test_what_slurm_refuses_is_told_in_one_line(slurm, expected, capfd, monkeypatch):
    assert think("--servers", "http://127.0.0.1:1/v1", "--executor.partition", "none") == 2
    error = capfd.readouterr().err
    assert "invalid partition specified: none" in error and "did not take the job" in error and "Traceback" not in error
    monkeypatch.setenv("PATH", "")
    assert think("--servers", "http://127.0.0.1:1/v1") == 2
    assert "there is no sbatch on the PATH" in capfd.readouterr().err
