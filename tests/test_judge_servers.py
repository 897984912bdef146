"""Judges behind servers that misbehave: a score is a clear 0 or 1, and everything else is no reward, not 0."""

import asyncio
import socket
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
from judging import answer, openai_config, prompt
from stub_llm_server import StubServer

from megatron_ptrl.config import JudgeConfig, ServerConfig
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Judgement
from megatron_ptrl.rollout.judge_server import parse_score
from megatron_ptrl.rollout.rewards import Rewarder, make_rewarder
from megatron_ptrl.thinking.generators import GeneratorUnusable, Request
from megatron_ptrl.thinking.servers import Servers

SECONDS = 60.0
ALWAYS = ("--every", "1000")  # only what begins with "poison"
KEY = "sk-this-must-not-be-seen-0123456789"


def judge(rewarder: Rewarder, *predictions: str) -> list[Judgement]:
    """The predictions' judgements; the reference is "right poison answers only"."""
    asked = prompt("right poison", "answers only")
    futures = [rewarder.submit(asked, answer(prediction), truncated=False) for prediction in predictions]
    return [future.result(SECONDS) for future in futures]


def judged(config: JudgeConfig, *predictions: str) -> tuple[list[tuple[float | None, str]], dict[str, float]]:
    rewarder = make_rewarder(config)
    try:
        return [(judgement.reward, judgement.reason) for judgement in judge(rewarder, *predictions)], rewarder.counts()
    finally:
        rewarder.close()


@pytest.mark.parametrize(
    "reply, plain, thinking",
    [
        ("Score: 1", 1, 1),
        ("Score: 0", 0, 0),
        (" score:1 \n", 1, 1),
        ("**Score: 1**", 1, 1),
        ("**Score:** 0.", 0, 0),
        ("They mean the same.\nScore: 1", 1, 1),
        ("Score: 0\nScore: 1", None, 1),
        ("<think>Score: 0</think>Score: 1", None, 1),
        ("<think>Score: 1</think>", None, None),
        ("<think>Score: 1", 1, 1),
        ("Score: 1\nNo, wait.\nScore: 2", None, None),
        ("Score: 2", None, None),
        ("Score: 10", None, None),
        ("Score: 0.5", None, None),
        ("Score: 0|1", None, None),
        ("Score: 1 of 2", None, None),
        ("Score: -1", None, None),
        ("Score:", None, None),
        ("1", None, None),
        ("The underscore: 1", None, None),
        ("", None, None),
    ],
)
def test_a_score_is_a_clear_zero_or_one(reply, plain, thinking):
    assert (parse_score(reply), parse_score(reply, thinking=True)) == (plain, thinking)


def test_the_papers_prompt_is_sent_with_both_texts_in_their_places(tmp_path):
    with StubServer(tmp_path / "log") as server:
        rewards, _ = judged(openai_config([server.url]), "right", "{reference} wrong", "Right poison answers")
    assert rewards == [(1.0, "judged"), (0.0, "judged"), (1.0, "judged")]


def test_the_strict_reward_asks_for_the_whole_segment(tmp_path):
    with StubServer(tmp_path / "log") as server:
        config = openai_config([server.url], reward="strict")
        assert judged(config, "right poison", "right poison answers")[0] == [(1.0, "judged"), (0.0, "judged")]


REASONS = {
    "429": "server_error",
    "500": "server_error",
    "400": "bad_request",
    "drop": "server_error",
    "not_json": "malformed_reply",
    "not_chat": "malformed_reply",
    "prose": "unparsed",
    "score_2": "unparsed",
    "both_scores": "unparsed",
    "thought": "unparsed",  # unless judge.thinking
}


@pytest.mark.parametrize("fault", REASONS)
def test_what_brings_no_score_brings_no_reward(fault, tmp_path, caplog):
    with StubServer(tmp_path / "log", "--fault", fault, *ALWAYS) as server:
        rewards, counts = judged(openai_config([server.url]), "right", "poison", "poison answers", "wrong")
    reason = REASONS[fault]
    assert rewards == [(1.0, "judged"), (None, reason), (None, reason), (0.0, "judged")]
    assert (counts["judged"], counts["failed/" + reason]) == (2, 2)
    assert fault == "400" or counts["judge/" + reason] >= 2
    # Said once, however often it happens.
    assert [record.message.count("no judgement") for record in caplog.records] == [1]


@pytest.mark.parametrize("fault", ["429", "500", "drop", "not_json", "prose", "score_2"])
def test_what_passes_is_asked_again(fault, tmp_path):
    with StubServer(tmp_path / "log", "--fault", fault, "--every", "4") as server:
        config = openai_config([server.url], server={"attempts": 10, "in_flight": 1}, parse_attempts=10)
        rewards, counts = judged(config, *["right", "wrong"] * 20)
    assert rewards == [(1.0, "judged"), (0.0, "judged")] * 20
    assert counts["judge/" + REASONS[fault]] >= 10


def test_a_judge_that_thinks(tmp_path):
    with StubServer(tmp_path / "log", "--fault", "thought", "--every", "1") as server:
        config = openai_config([server.url], thinking=True, max_tokens=4096)
        assert judged(config, "right", "wrong")[0] == [(1.0, "judged")] * 2


def test_a_judge_that_is_slow_is_given_up_at_the_deadline(tmp_path):
    """Long before the server's own timeout, and with its place given back, which is the only one."""
    with StubServer(tmp_path / "log", "--fault", "hang", *ALWAYS) as server:
        config = openai_config([server.url], deadline=1.0, server={"patience": 0.9, "in_flight": 1, "model": "m"})
        rewarder = make_rewarder(config)
        (given_up,) = judge(rewarder, "poison")
        # A real answer has no deadline that a busy machine might miss.
        rewarder._config = replace(config, deadline=SECONDS)
        (right,) = judge(rewarder, "right")
        rewarder.close()
    assert (given_up.reward, given_up.reason, right.reward, right.reason) == (None, "deadline", 1.0, "judged")


@pytest.mark.parametrize("model", ["m", None])
def test_a_judge_that_is_down_stops_the_run_after_patience(model):
    with socket.socket() as taken:  # bound, and never listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        rewarder = make_rewarder(openai_config([url], server={"patience": 1.0, "model": model}))
        started = time.monotonic()
        with pytest.raises(InputError, match="judge: no server (has answered for|tells its model's name)"):
            judge(rewarder, *["right"] * 200)
        assert time.monotonic() - started > 0.9
        rewarder.close()


def test_a_judge_that_breaks_on_everything_stops_the_run_long_before_patience(tmp_path):
    """A server that is loading is not there, or says 503."""
    with StubServer(tmp_path / "log", "--fault", "500", "--every", "1") as server:
        rewarder = make_rewarder(openai_config([server.url], server={"patience": 120.0, "attempts": 9}))
        with pytest.raises(InputError, match="judge: no server has ever answered with anything but an error.* 500"):
            judge(rewarder, *["right"] * 3)
        rewarder.close()


@pytest.mark.parametrize("trying, silent, stops", [(0, 2.5, True), (1, 2.5, False), (1, 4.5, True), (0, 1.5, False)])
def test_a_trial_of_a_sick_server_is_waited_for_once(trying, silent, stops):
    """Of several sick servers one is always being tried, so that no moment without any might come."""
    servers = Servers(["http://a", "http://b"], ServerConfig(patience=2.0, timeout=2.0))
    servers._servers[1].in_flight = trying
    with pytest.raises(GeneratorUnusable, match="no server has answered for") if stops else nullcontext():
        assert 0 < servers._check_patience(servers._last_reply + silent) <= 1.0


def test_a_judge_that_dies_and_comes_back_and_one_that_starts_late(tmp_path):
    server = StubServer(tmp_path / "log")
    rewarder = make_rewarder(openai_config([server.url], server={"patience": 120.0}))
    with server:
        assert judge(rewarder, "right")[0].reward == 1.0
    futures = [rewarder.submit(prompt("right"), answer("right"), truncated=False) for _ in range(20)]
    late = make_rewarder(openai_config([server.url], server={"patience": 120.0}))
    late_future = late.submit(prompt("right"), answer("right"), truncated=False)
    time.sleep(1.0)
    assert not any(future.done() for future in [*futures, late_future])
    with StubServer(tmp_path / "log", "--port", str(server.port)):
        assert [future.result(SECONDS).reward for future in [*futures, late_future]] == [1.0] * 21
    rewarder.close()
    late.close()


def test_a_pause_between_two_steps_is_no_outage(tmp_path):
    """The judge is not asked while the policy is trained, which may take longer than `patience`."""
    with StubServer(tmp_path / "log", "--latency", "0.05") as server:
        config = openai_config([server.url], server={"patience": 0.6, "in_flight": 1})
        rewarder = Rewarder(make_rewarder(config).judge, config, at_once=8)
        assert judge(rewarder, "right")[0].reward == 1.0
        time.sleep(1.0)
        assert [judgement.reward for judgement in judge(rewarder, *["right"] * 4)] == [1.0] * 4
        rewarder.close()


def test_a_request_that_is_given_up_takes_no_others_turn(tmp_path):
    async def give_up(url: str) -> int:
        servers = Servers([url], ServerConfig(in_flight=1, model="m"))
        request = Request("p", [{"role": "user", "content": "poison"}], 1, 0.0, 1.0, [], 0)
        tasks = [asyncio.create_task(servers.generate(request)) for _ in range(5)]
        while len(servers._waiting) < 4:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await servers.close()
        return len(servers._waiting)

    with StubServer(tmp_path / "log", "--fault", "hang", *ALWAYS) as server:
        assert asyncio.run(give_up(server.url)) == 0


def test_requests_go_out_together(tmp_path):
    with StubServer(tmp_path / "log", "--gather", "32") as server:
        config = openai_config([server.url], server={"in_flight": 32})
        assert judged(config, *["right"] * 256)[0] == [(1.0, "judged")] * 256
        assert server.most_at_once() == 32


def test_the_key_is_in_no_log(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with StubServer(tmp_path / "log", "--fault", "500", *ALWAYS) as server:
        assert judged(openai_config([server.url]), "poison")[0] == [(None, "server_error")]
    said = caplog.text + "".join(capfd.readouterr())
    assert "500 for Bearer ***" in said and KEY not in said


def test_a_template_without_its_holes_is_refused(tmp_path):
    path = tmp_path / "judge.txt"
    path.write_text("Is {predicted} right?")
    with pytest.raises(InputError, match=r"judge.txt has no \{reference\}; expected \{reference\} and \{predicted\}"):
        make_rewarder(openai_config(["http://x"], template=str(path)))
    with pytest.raises(InputError, match="judge.template .*expected a text file"):
        make_rewarder(openai_config(["http://x"], template=str(tmp_path / "none")))
