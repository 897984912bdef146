"""Ctrl-C and files that this user may not touch end a command in one line; what may be a fault of ours does not."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ptrl import __main__ as command_line
from megatron_ptrl.data.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """A shell starts what has `&` behind it with the signal ignored, and what that starts inherits it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_for(happened, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < end, "it did not come to the middle of its work"
        time.sleep(0.02)


def test_ctrl_c_is_told_once_by_a_command_with_workers(tmp_path: Path) -> None:
    train_tokenizer(["one two three four"], tmp_path / "tokenizer.json", vocab_size=300)
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "out"
    written = tmp_path / "out.bin.tmp"
    corpus.write_text((json.dumps({"text": "one two three four " * 40}) + "\n") * 50_000)  # work for many seconds
    words = ["tokenize", "--input", corpus, "--output", output, "--tokenizer", tmp_path / "tokenizer.json"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "megatron_ptrl", *map(str, words), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group, to which a terminal sends Ctrl-C
    )
    try:
        wait_for(lambda: written.exists() and written.stat().st_size > 0, process)
        os.killpg(process.pid, signal.SIGINT)
        printed, told = process.communicate(timeout=60)
    finally:
        process.kill()
    # By the signal, which a shell calls 130: a loop of a shell ends with a command that ended so.
    assert process.returncode == -signal.SIGINT
    assert (printed, told) == ("", "ptrl tokenize: interrupted; start the same command again to go on\n")
    assert not (tmp_path / "out.bin").exists()


IDLE_WORKER = """
import os, signal, time
from megatron_ptrl.data.indexed_output import in_order

try:
    for kept, name in in_order(((n, n) for n in "abc"), os.path.basename, 1, bool, ()):
        time.sleep(0.3)  # it has done all three
        os.killpg(0, signal.SIGINT)
except KeyboardInterrupt:
    print("told")
"""


def test_a_worker_that_waits_for_work_ends_without_a_word() -> None:
    command = [sys.executable, "-W", "ignore", "-c", IDLE_WORKER]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "told\n", "")


WORKER_WITH_MORE_TO_DO = """
import os, signal, time
from megatron_ptrl.data.indexed_output import in_order

for n, _ in in_order(((n, 0.1) for n in range(9)), time.sleep, 1, bool, ()):
    os.killpg(0, signal.SIGINT)
print(n)
"""


def test_what_is_told_to_ignore_it_keeps_its_workers() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    command = [sys.executable, "-W", "ignore", "-c", WORKER_WITH_MORE_TO_DO]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


def run_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def run(_: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "_import", lambda _: SimpleNamespace(run=run))
    return command_line.main(["report"])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_file_that_may_not_be_touched_is_told_in_one_line(monkeypatch, capsys, code):
    assert run_that_raises(monkeypatch, OSError(code, os.strerror(code), "runs/a/log.txt")) == 2
    expected = (
        f"ptrl report: runs/a/log.txt: {os.strerror(code)}; give this user the right to it, or name another path\n"
    )
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no", "a"), PermissionError(errno.EPERM, "no name, as of os.kill")]
)
def test_what_may_be_a_fault_of_ours_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        run_that_raises(monkeypatch, error)
