"""kill -9 and the same command again: nothing generated twice beyond what was in flight, the same bytes in the end."""

import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import SECONDS, forked
from stub_llm_server import StubServer
from think_runs import contents, rejects, think_config, thoughts, write_corpus

from megatron_ptrl.config import AssembleConfig, SamplingConfig, ThinkConfig, ThinkingFilterConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking.journal import Journal, Source
from megatron_ptrl.thinking.pipeline import run

DOCUMENTS = 90
DIGEST = b"8 bytes!"
SOURCE = Source([], "")
ASSEMBLED: dict[str, Any] = {
    "then_assemble": True,
    "assemble": AssembleConfig(vocab_size=300, filters=ThinkingFilterConfig(languages=[])),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        path = write_corpus(folder / f"{number}.jsonl", DOCUMENTS // 3, first=number * DOCUMENTS // 3, poison=40)
        with path.open("a") as stream:
            stream.write("no json\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with StubServer(folder / "log", "--fault", "400", "--every", "100000") as server:
        run(think_config([corpus], folder / "out", [server.url], part_megabytes=0.004, **ASSEMBLED))
    assert len(thoughts(folder / "out")) == DOCUMENTS - 1 and len(rejects(folder / "out")) == 4
    return contents(folder / "out")


def kill_when(config: ThinkConfig, server: StubServer, answered: int) -> None:
    """With that many documents answered in all, and the next ones in flight."""
    server.allow(answered)
    with forked(run, config, until=lambda: len(server.answered()) == answered):
        pass


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_several_points(workers, corpus, undisturbed, tmp_path):
    with StubServer(tmp_path / "log", "--fault", "400", "--every", "100000") as server:
        config = think_config(
            [corpus],
            tmp_path / "out",
            [server.url],
            part_megabytes=0.004,
            in_flight=4,
            tasks=workers,
            workers=workers,
            **ASSEMBLED,
        )
        points = (1, 20, 33, 70)
        for answered in points:
            kill_when(config, server, answered)
        server.allow(1000)
        run(config)
    # A run whose first reply is a refusal asks a question of its own, whether its settings are to blame.
    asked = [word for word in server.answered() if word != "What"]
    assert contents(tmp_path / "out") == undisturbed and {"train.bin", "train.idx", "train.json"} < set(undisturbed)
    assert set(asked) == {f"d{i}" for i in range(DOCUMENTS) if i != 40}
    in_flight = 4 * workers
    assert len(asked) <= DOCUMENTS - 1 + len(points) * in_flight
    assert not list((tmp_path / "out" / "journal").glob("*[0-9].jsonl")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("tasks, workers, megabytes", [(3, 1, 0.004), (2, 2, 0.004), (5, 1, 1e-6)])
def test_bytes_do_not_depend_on_tasks(tasks, workers, megabytes, corpus, undisturbed, tmp_path):
    with StubServer(tmp_path / "log", "--fault", "400", "--every", "100000") as server:
        config = think_config(
            [corpus], tmp_path / "out", [server.url], part_megabytes=megabytes, tasks=tasks, workers=workers
        )
        run(config)
        first = len(server.answered())
        run(config)
        assert len(server.answered()) == first == DOCUMENTS - 1
    found = contents(tmp_path / "out")
    for kind in ("generate", "0"):
        names = [sorted(name for name in files if name.startswith(kind)) for files in (found, undisturbed)]
        joined = [
            b"".join(files[name] for name in some) for files, some in zip((found, undisturbed), names, strict=True)
        ]
        assert joined[0] == joined[1] != b""


def test_a_torn_line_is_dropped(tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.add((0, 2), DIGEST, "rejects", b'{"id": "b", "reason": "bad_request"}')
        journal.add((0, 1), DIGEST, "thoughts", b'{"id": "a"}')
        journal.add((0, 3), DIGEST, "thoughts", b'{"id": "c"}')
    path = tmp_path / "journal" / "00000.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with Journal(tmp_path, 0) as journal:
        assert [journal.has((0, line), DIGEST) for line in range(5)] == [False, True, True, False, False]
        assert not journal.has((1, 1), DIGEST) and not journal.is_finished
        journal.add((0, 3), DIGEST, "thoughts", b'{"id": "again"}')
        journal.publish(SOURCE)
        assert journal.is_finished and journal.counts() == {"thoughts": 2, "bad_request": 1}
    assert [thought["id"] for thought in thoughts(tmp_path)] == ["a", "again"]
    assert [rejected["id"] for rejected in rejects(tmp_path)] == ["b"] and not path.exists()


def test_a_journal_takes_little_memory_for_a_record(tmp_path):
    records = 20_000
    tracemalloc.start()
    try:
        with Journal(tmp_path, 0) as journal:
            for line in reversed(range(1, records + 1)):
                journal.add((0, line), DIGEST, "thoughts", b'{"id": "%d"}' % line)
            journal.publish(SOURCE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [int(thought["id"]) for thought in thoughts(tmp_path)] == list(range(1, records + 1))
    assert peak < 120 * records


def test_killed_between_the_last_rename_and_the_end_of_the_journal(corpus, undisturbed, tmp_path, monkeypatch):
    config = {"part_megabytes": 0.004} | ASSEMBLED
    with StubServer(tmp_path / "log", "--fault", "400", "--every", "100000") as server:
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "drop_leftover", lambda self: None)
            run(think_config([corpus], tmp_path / "out", [server.url], **config))
        assert len(list((tmp_path / "out" / "journal").glob("*[0-9].jsonl"))) == 3
        run(think_config([corpus], tmp_path / "out", [server.url], **config))
        assert len(server.answered()) == DOCUMENTS - 1
    assert contents(tmp_path / "out") == undisturbed
    assert not list((tmp_path / "out" / "journal").glob("*[0-9].jsonl"))


@pytest.mark.parametrize(
    "tail",
    [
        b"0 3 0000000000000000 thou",
        b"\xff\x00\x00 1 0000000000000000 thoughts\t{}\n",
        b"0 x 0000000000000000 rejects\t{}\n",
        b"\n",
        b"0 3 0000000000000000 thoughts\t{",
    ],
)
def test_what_a_crash_left_behind_the_last_line_is_dropped(tail, tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.add((0, 1), DIGEST, "thoughts", b'{"id": "a"}')
    path = tmp_path / "journal" / "00000.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    with Journal(tmp_path, 0) as journal:
        assert journal.has((0, 1), DIGEST) and not journal.has((0, 3), DIGEST)
        journal.add((0, 3), DIGEST, "thoughts", b'{"id": "c"}')
        journal.publish(SOURCE)
    assert [thought["id"] for thought in thoughts(tmp_path)] == ["a", "c"]


def _limited(config: ThinkConfig, size: int, told: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        run(config)
    except InputError as error:
        told.put(str(error))


# A document's line has about 300 bytes, a part 30 of them.
@pytest.mark.parametrize("size", [10, 7_000])
def test_a_full_disk_stops_the_run_in_one_line_and_it_goes_on_where_it_was(size, corpus, undisturbed, tmp_path):
    with StubServer(tmp_path / "log", "--fault", "400", "--every", "100000") as server:
        config = think_config([corpus], tmp_path / "out", [server.url], part_megabytes=0.004, **ASSEMBLED)
        run(replace(config, output=str(tmp_path / "plan"), then_assemble=False))
        server.forget()
        context = multiprocessing.get_context("fork")
        told = context.Queue()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "plan.json").write_bytes((tmp_path / "plan" / "plan.json").read_bytes())
        process = context.Process(target=_limited, args=(config, size, told))
        process.start()
        message = told.get(timeout=SECONDS)
        process.join()
        assert (
            "File too large; what is done is kept" in message
            and (size < 100) == (not server.answered())
            and "\n" not in message
        )
        run(config)
        assert len(server.answered()) <= DOCUMENTS - 1 + config.server.in_flight
    assert contents(tmp_path / "out") == undisturbed and not list(tmp_path.rglob("*.tmp"))


def test_thoughts_that_cannot_be_written_are_written_later(tmp_path):
    with (
        pytest.raises(InputError, match="00000.jsonl: Is a directory; what is done is kept"),
        Journal(tmp_path, 0) as journal,
    ):
        journal.add((0, 1), DIGEST, "thoughts", b'{"id": "a"}')
        (tmp_path / "thoughts" / "00000.tmp").mkdir()
        journal.publish(SOURCE)
    (tmp_path / "thoughts" / "00000.tmp").rmdir()
    with Journal(tmp_path, 0) as journal:
        assert journal.has((0, 1), DIGEST) and not journal.has((0, 3), DIGEST)
        journal.publish(SOURCE)
    assert [thought["id"] for thought in thoughts(tmp_path)] == ["a"]


def test_a_worker_that_is_killed_ends_the_run_and_not_the_work(corpus, undisturbed, tmp_path):
    with StubServer(tmp_path / "log", "--allow", "20", "--fault", "400", "--every", "100000") as server:
        config = think_config(
            [corpus], tmp_path / "out", [server.url], part_megabytes=0.004, in_flight=2, tasks=2, workers=2, **ASSEMBLED
        )
        code = "import sys, pickle, megatron_ptrl.thinking.pipeline as p; p.run(pickle.loads(sys.stdin.buffer.read()))"
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdin.write(pickle.dumps(config))
        process.stdin.close()
        while len(server.answered()) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        holders = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _holds(pid, tmp_path / "out")]
        assert holders and process.pid not in holders
        os.kill(holders[0], signal.SIGKILL)
        assert process.wait(timeout=SECONDS) == 1
        assert b"ended with exit code -9" in process.stderr.read()
        process.stderr.close()
        server.allow(1000)
        run(config)
        assert len(server.answered()) <= DOCUMENTS - 1 + 4
    assert contents(tmp_path / "out") == undisturbed


def _holds(pid: int, folder: Path) -> bool:
    """Whether the process has a file of the folder open."""
    try:
        return any(os.readlink(link).startswith(f"{folder}/") for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def test_two_processes_do_not_share_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ptrl.thinking.journal.SECONDS_FOR_THE_LOCK", 0.05)
    with Journal(tmp_path, 0):
        with pytest.raises(InputError, match="another process is at it"):
            Journal(tmp_path, 0).__enter__()


def test_another_corpus_or_other_settings_are_refused(tmp_path):
    source = write_corpus(tmp_path / "in.jsonl", 3)
    out = tmp_path / "out"
    with StubServer(tmp_path / "log") as server:
        run(think_config([source], out, [server.url]))
        before = contents(out)
        for changed, named in (({"seed": 1}, "seed"), ({"sampling": SamplingConfig(top_p=0.5)}, "sampling")):
            with pytest.raises(InputError, match=f"is of another {named}; remove it, or choose another output"):
                run(think_config([source], out, [server.url], **changed))
        with source.open("a") as stream:
            stream.write(json.dumps({"text": "one more"}) + "\n")
        with pytest.raises(InputError, match="is of another input"):
            run(think_config([source], out, [server.url]))
    assert contents(out) == before


def test_a_corpus_that_was_edited_is_refused_though_its_size_is_the_same(tmp_path, monkeypatch):
    sources = [write_corpus(tmp_path / f"{number}.jsonl", 3, first=3 * number) for number in range(2)]
    was = sources[1].read_text()
    settings = {"part_megabytes": 1e-6, "in_flight": 1}
    with StubServer(tmp_path / "log") as server:
        begun = think_config(sources, tmp_path / "begun", [server.url], **settings)
        with monkeypatch.context() as patched, pytest.raises(InputError, match="stopped"):
            patched.setattr(Journal, "publish", broken_off)
            run(begun)
        finished = think_config(sources, tmp_path / "finished", [server.url], **settings)
        run(finished)
        before = contents(tmp_path / "finished")

        for path in sources:  # as a copy of the corpus has it
            os.utime(path, ns=(0, 0))
        run(finished)
        with monkeypatch.context() as patched:
            patched.setattr("megatron_ptrl.thinking.same_corpus.read_part", None)  # the new time is known by now
            run(finished)

        sources[1].write_text(was.replace("law", "war"))
        with pytest.raises(InputError, match=f"other documents than {sources[1]} hold now; restore them"):
            run(finished)
        sources[0].write_text(sources[0].read_text().replace("d1 some words", "d1 same words"))
        with pytest.raises(InputError, match="00000.jsonl is of another input: record 2 of file 1 of the part"):
            run(begun)
    assert contents(tmp_path / "finished") == before


def broken_off(journal: Journal, source: Source) -> None:
    raise InputError("stopped")
