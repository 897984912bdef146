"""Servers that misbehave: every document is done or rejected, none twice, none missing, and the run ends."""

import asyncio
import re
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from forked import SECONDS, forked
from stub_llm_server import LIKE, StubServer
from think_runs import rejects, think_config, thoughts, write_corpus

from megatron_ptrl.errors import InputError
from megatron_ptrl.thinking.generators import GeneratorUnusable
from megatron_ptrl.thinking.pipeline import run

KEY = "sk-this-must-not-be-seen-0123456789"


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "hang", "not_json", "not_chat"])
def test_what_passes_is_tried_again(fault, tmp_path):
    source = write_corpus(tmp_path / "in.jsonl", 40)
    with StubServer(tmp_path / "log", "--fault", fault, "--every", "6") as server:
        # On a machine that is too busy to answer in time, a document may need many attempts.
        patient = {"timeout": 2.0, "attempts": 100} if fault == "hang" else {}
        run(think_config([source], tmp_path / "out", [server.url], **patient))
        answered = server.answered()
    assert [thought["id"] for thought in thoughts(tmp_path / "out")] == [f"d{i}" for i in range(40)]
    assert set(answered) == {f"d{i}" for i in range(40)} and not rejects(tmp_path / "out")
    # And may be answered to nobody.
    assert len(answered) == 40 or fault == "hang"


REASONS = {
    "400": ("bad_request", "status 400"),
    "429": ("server_error", "status 429.*after 40 requests"),
    "500": ("server_error", "status 500.*after 2 requests"),
    "drop": ("server_error", "connection lost"),
    "hang": ("timeout", "no reply within 2 s, after 2"),
    "not_json": ("malformed_reply", "not a JSON object: '<html>busy</html>', after 2"),
    "not_chat": ("malformed_reply", "not a chat completion"),
    "no_tag": ("no_thinking", "neither tags nor reasoning_content in the reply: 'An answer at once.'"),
}


@pytest.mark.parametrize("fault", REASONS)
def test_what_does_not_pass_is_rejected_with_its_reason(fault, tmp_path):
    # Alone where a time limit decides, which on a busy machine any document might exceed.
    first, count, timeout = (7, 1, 2.0) if fault == "hang" else (0, 20, 60.0)
    source = write_corpus(tmp_path / "in.jsonl", count, first=first, poison=7)
    with StubServer(tmp_path / "log", "--fault", fault, "--every", "1000") as server:
        run(think_config([source], tmp_path / "out", [server.url], attempts=2, backoff=0.001, timeout=timeout))
    others = [f"d{i}" for i in range(first, first + count) if i != 7]
    assert [thought["id"] for thought in thoughts(tmp_path / "out")] == others
    (rejected,) = rejects(tmp_path / "out")
    reason, detail = REASONS[fault]
    assert (rejected["id"], rejected["reason"], rejected["stage"]) == ("poison7", reason, "generate")
    assert re.search(detail, rejected["detail"]), rejected["detail"]
    assert rejected["document"] == {"id": "poison7", "text": "poison7 ", "domain": "law"}


def test_settings_that_the_server_refuses_stop_the_run(tmp_path):
    """Else a wrong model's name would put every document aside."""
    source = write_corpus(tmp_path / "in.jsonl", 20)
    config = think_config([source], tmp_path / "out", ["http://localhost:1/v1"])
    with StubServer(tmp_path / "log", "--fault", "400", "--every", "1") as server:
        with pytest.raises(GeneratorUnusable, match="refuses even a short question with status 400.*server.extra_body"):
            run(replace(config, servers=[server.url]))
    assert not thoughts(tmp_path / "out") and not rejects(tmp_path / "out")
    with StubServer(tmp_path / "log") as server:
        run(replace(config, servers=[server.url]))
    assert len(thoughts(tmp_path / "out")) == 20


def test_a_document_that_is_refused_first_is_told_from_settings_that_are(tmp_path):
    source = write_corpus(tmp_path / "in.jsonl", 3, poison=0)
    with StubServer(tmp_path / "log", "--fault", "400", "--every", "1000") as server:
        run(think_config([source], tmp_path / "out", [server.url], in_flight=1))
        assert server.answered() == ["What", "d1", "d2"]
    assert [rejected["id"] for rejected in rejects(tmp_path / "out")] == ["poison0"]


@pytest.mark.parametrize("like", LIKE)
def test_the_thinking_is_found_in_what_each_server_sends(like, tmp_path):
    source = write_corpus(tmp_path / "in.jsonl", 2)
    with StubServer(tmp_path / "log", "--like", like) as server:
        run(think_config([source], tmp_path / "out", [server.url]))
    for thought in thoughts(tmp_path / "out"):
        assert re.fullmatch("Let me think. [0-9a-f]{64} é東", thought["thinking"])
        assert (thought["finish_reason"], thought["thinking_tokens"]) == ("stop", 7) and thought["prompt_tokens"] > 7
    assert len(thoughts(tmp_path / "out")) == 2


def test_load_is_spread_and_a_dead_server_is_left_out(tmp_path):
    source = write_corpus(tmp_path / "in.jsonl", 120)
    with socket.socket() as taken:  # bound, and never listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        flags = ("--gather", "60", "--allow", "0")
        with StubServer(tmp_path / "a", *flags) as a, StubServer(tmp_path / "b", *flags) as b:
            config = think_config([source], tmp_path / "out", [dead, a.url, b.url], in_flight=64, timeout=SECONDS)
            # Neither answers before each has half of the documents.
            with forked(run, config, until=lambda: a.most_at_once() == b.most_at_once() == 60) as process:
                a.allow(120)
                b.allow(120)
                process.join(SECONDS)
                assert process.exitcode == 0
            assert len(a.answered()) == len(b.answered())
            assert sorted([*a.answered(), *b.answered()]) == sorted(f"d{i}" for i in range(120))
    assert len(thoughts(tmp_path / "out")) == 120 and not rejects(tmp_path / "out")


def test_a_server_that_is_killed_and_comes_back(tmp_path):
    source = write_corpus(tmp_path / "in.jsonl", 100)
    server = StubServer(tmp_path / "log", "--latency", "0.004", "--allow", "30")
    config = think_config([source], tmp_path / "out", [server.url], attempts=2, in_flight=2)
    thread = threading.Thread(target=run, args=(config,))
    with server:
        thread.start()
        while len(server.answered()) < 30:
            assert thread.is_alive()
            time.sleep(0.01)
    # Long enough for several attempts to be refused, which do not count.
    time.sleep(2.5)
    with StubServer(tmp_path / "log", "--port", str(server.port)) as again:
        thread.join(timeout=60)
        assert not thread.is_alive()
        answered = again.answered()
    assert [thought["id"] for thought in thoughts(tmp_path / "out")] == [f"d{i}" for i in range(100)]
    # What was on its way when the server died is asked again, and nothing else is.
    assert len(answered) <= 100 + config.server.in_flight and not rejects(tmp_path / "out")


def test_without_any_server_the_run_stops_and_can_be_continued(tmp_path):
    source = write_corpus(tmp_path / "in.jsonl", 10)
    server = StubServer(tmp_path / "log")
    with server:
        pass
    config = think_config([source], tmp_path / "out", [server.url], patience=0.5)
    with pytest.raises(GeneratorUnusable, match="no server has answered for .*no connection.*repeat the command"):
        run(config)
    assert not thoughts(tmp_path / "out") and not rejects(tmp_path / "out")
    with StubServer(tmp_path / "log", "--port", str(server.port)):
        run(config)
    assert len(thoughts(tmp_path / "out")) == 10


def test_patience_ends_though_every_document_waits_for_its_next_attempt(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "in.jsonl", 2)
    with StubServer(tmp_path / "log") as server:
        pass
    config = think_config([source], tmp_path / "out", [server.url], patience=0.5, backoff=30.0)
    sleep = asyncio.sleep

    async def sleep_briefly(seconds: float) -> None:
        assert seconds < 1.0, "the first wait is of 15 s at least"
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep_briefly)
    with pytest.raises(GeneratorUnusable, match="no server has answered for"):
        run(config)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", ["401", "500"])
def test_the_key_is_nowhere(fault, workers, tmp_path, monkeypatch, capfd):
    """The server says the key back in its errors."""
    sources = [write_corpus(tmp_path / f"{i}.jsonl", 6, first=6 * i, poison=3 + 6 * i) for i in range(2)]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = ""
    with StubServer(tmp_path / "log", "--fault", fault, "--every", "1000") as server:
        config = think_config(
            sources, tmp_path / "out", [server.url], attempts=2, part_megabytes=1e-6, tasks=workers, workers=workers
        )
        if fault == "401":
            with pytest.raises(GeneratorUnusable, match=r"401 for Bearer \*\*\*.*OPENAI_API_KEY") as error:
                run(config)
            said = repr(error.value) + "".join(str(frame.locals) for frame in error.traceback)
        else:
            run(config)
            assert all("500 for Bearer ***" in rejected["detail"] for rejected in rejects(tmp_path / "out"))
            assert len(rejects(tmp_path / "out")) == 2
    captured = capfd.readouterr()
    assert KEY not in said + captured.out + captured.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and all(KEY.encode() not in path.read_bytes() for path in files)


def test_credentials_in_a_url_are_refused_unseen(tmp_path):
    for url in (f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}"):
        with pytest.raises(InputError, match="carries credentials or a query; put the key into") as error:
            think_config([], tmp_path, [url])
        assert KEY not in str(error.value)


@pytest.mark.parametrize("model", [None, "m"])
def test_the_model_is_asked_for_once_when_it_is_not_given(model, tmp_path):
    source = write_corpus(tmp_path / "in.jsonl", 3)
    with StubServer(tmp_path / "log") as server:
        run(think_config([source], tmp_path / "out", [server.url.removesuffix("/v1")], model=model))
    assert {thought["model"] for thought in thoughts(tmp_path / "out")} == {model or "stub"}


def test_a_wrong_url_stops_the_run(tmp_path):
    source = write_corpus(tmp_path / "in.jsonl", 3)
    with StubServer(tmp_path / "log", "--fault", "404", "--every", "1") as server:
        with pytest.raises(GeneratorUnusable, match="status 404.*check the URL, server.model"):
            run(think_config([source], Path(tmp_path / "out"), [server.url]))
