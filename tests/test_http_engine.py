"""Servers as the rollout engine: what they say is what the trainer computes, and a server that is wrong is found out.

The servers are processes that load the exported weights and draw from them; see stub_rollout_server.
"""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rl_runs import make_prompts, reinforcement, rl_config, run_rl
from stub_rollout_server import StubRollouts
from test_layouts import TP_PP_SP
from tiny import Settings

from megatron_ptrl.errors import InputError
from megatron_ptrl.rollout.engine import Generation, Request

KINDS = ["sglang", "vllm"]
PLAIN = {"temperature": 1.0, "top_p": 1.0}
# Large weights, so that tokens differ in probability and one step of training shows.
MODEL = {"model__num_layers": 2, "model__init_method_std": 0.2, "optimizer__lr": 1e-2}


@pytest.fixture(scope="module")
def stubs() -> Iterator[list[StubRollouts]]:
    with StubRollouts() as first, StubRollouts() as second:
        yield [first, second]


@pytest.fixture
def settings(prefix: str, tmp_path: Path, stubs: list[StubRollouts]) -> Iterator[Settings]:
    for stub in stubs:
        stub.set()
    yield rl_config(prefix, [make_prompts(tmp_path / "p.jsonl", 8)], tmp_path / "run", **MODEL) | {
        "rollout.servers": [stub.url for stub in stubs],
        "rollout.server.attempts": 2,
        "rollout.server.backoff": 0.05,
        "rollout.server.probe_tolerance": 1e-4,
    }


def requests() -> list[Request]:
    prompts = [[5], [7, 300, 9], list(range(40, 90)), [400, 3, 3, 8]]
    return [Request(prompt, 5 + 4 * (i % 2), 2**62 + i) for i, prompt in enumerate(prompts * 3)]


def at_work(rank: int, world_size: int, settings: Settings, wanted: list[Request]) -> dict[str, Any]:
    """Responses, how far they are from the trainer's, and what the folders and versions are after three hand-overs."""
    with reinforcement(settings, world_size) as run:
        from megatron_ptrl.training.engines import trainers_logprobs
        from megatron_ptrl.training.mcore import unwrap

        engine = run._make_engine()
        engine.sync(0, run._export)
        done: list[tuple[int, Generation]] = []
        first = engine.generate(wanted, **PLAIN, on_done=lambda number, found: done.append((number, found)))
        far = 0.0
        for request, found in zip(wanted, first, strict=True):
            ids = request.prompt_ids + found.token_ids
            expected = trainers_logprobs(run.config, run.chunks, 512, ids)[-len(found.token_ids) :]
            far = max(far, *(abs(a - b) for a, b in zip(expected, found.logprobs, strict=True)))
        again = engine.generate(wanted, **PLAIN)
        for version in (1, 2):
            for parameter in unwrap(run.chunks[0]).parameters():
                parameter.data.mul_(1.1)
            engine.sync(version, run._export)
        return {
            "first": first,
            "again": again,
            "changed": engine.generate(wanted, **PLAIN),
            "done": done,
            "far": far,
            "version": engine.weight_version,
            "folders": sorted(path.name for path in (run.run_dir / "weights").iterdir()),
        }


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_the_trainers_and_weights_are_handed_over(ranks, settings, stubs, kind):
    wanted = requests()
    found = ranks.run(1, at_work, settings | {"rollout.engine": kind}, wanted)[0]
    assert found["far"] < 1e-4 and found["version"] == 2
    assert found["first"] == found["again"] != found["changed"]
    assert sorted(found["done"], key=lambda pair: pair[0]) == list(enumerate(found["first"]))
    for request, response in zip(wanted, found["first"], strict=True):
        assert 0 < len(response.token_ids) <= min(request.max_tokens, 64 - len(request.prompt_ids))
        assert math.isfinite(sum(response.logprobs)) and response.finish_reason in ("stop", "length")
    assert [re.sub("-.*", "", name) for name in found["folders"]] == ["v00000001", "v00000002"]
    asked = [stub.set() for stub in stubs]
    path = {"sglang": "/generate", "vllm": "/v1/completions"}[kind]
    assert all(counts[path] >= 3 * len(wanted) // 2 for counts in asked), asked
    if kind == "vllm":
        assert all(counts["/reset_prefix_cache"] == 3 for counts in asked)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_change_nothing(ranks, settings, kind):
    settings = settings | {"rollout.engine": kind}
    (alone,) = ranks.run(1, at_work, settings, requests()[:4])
    split = {name.replace("__", "."): value for name, value in TP_PP_SP.items()} if kind == "vllm" else {}
    everywhere = ranks.run(4 if split else 2, at_work, settings | split, requests()[:4])
    for found in everywhere:
        assert found["far"] < 1e-4 and found["folders"] == everywhere[0]["folders"]
        for key in ("first", "changed"):
            assert [g.token_ids for g in found[key]] == [g.token_ids for g in alone[key]]
        assert [found["first"][number] for number, _ in found["done"]] == [told for _, told in found["done"]]
        assert len(found["done"]) == 4


def asked_wrongly(rank: int, world_size: int, settings: Settings, faults: list[tuple[str, str]]) -> dict[str, str]:
    """What the engine says with each fault of all servers, at the next hand-over or at the next response."""
    with reinforcement(settings, world_size) as run:
        from megatron_ptrl.training.mcore import unwrap

        told = {}
        for when, fault in faults:
            stubs = _Faults(settings["rollout.servers"])
            stubs.set("")
            engine = run._make_engine()
            engine.sync(0, run._export)
            stubs.set(fault)
            start = time.monotonic()
            try:
                if when == "sync":
                    parameter = unwrap(run.chunks[0]).decoder.final_layernorm.weight
                    parameter.data[:8] *= 1.002  # within the tolerance below
                    engine.sync(1, run._export)
                else:
                    warm = {"temperature": 0.7, "top_p": 0.9} if fault == "raw_logprobs" else PLAIN
                    engine.generate([Request([5, 6, 7], 4, i) for i in range(6)], **warm)
                told[fault] = "nothing"
            except InputError as error:
                told[fault] = str(error)
            assert time.monotonic() - start < 30
        return told


class _Faults:
    def __init__(self, urls: list[str]) -> None:
        self._urls = urls

    def set(self, fault: str) -> None:
        import urllib.request

        for url in self._urls:
            urllib.request.urlopen(f"{url}/fault?{fault}").read()


WRONG = {
    ("sync", "stale"): "to the last bit what they were",
    ("sync", "stale_version"): r"has weights 'v00000000-\w+' after it was given 'v00000001",
    ("sync", "503"): r"no server could be given the weights .*status 503.*with the model in .*/weights/v00000001-\w+,",
    ("sync", "hang"): "no server could be given the weights .*no reply within 1 s",
    ("generate", "no_ids"): "output_token_logprobs|token_ids",
    ("generate", "503"): "status 503.*given up after 2 attempts",
    ("generate", "503_once"): "^nothing$",
    ("generate", "hang"): "no reply within 1 s; given up after 2 attempts",
    ("generate", "nan"): "expected one number of at most 0 for each",
    ("generate", "400"): "status 400.*max_tokens is too large",
    ("generate", "raw_logprobs"): "are those at temperature 1 while it draws by another",
    ("generate", "wrong_version"): "written with weights 'old'",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_wrong_is_told(ranks, settings, kind):
    wrong = {key: told for key, told in WRONG.items() if key[1] != "wrong_version" or kind == "sglang"}
    settings = settings | {
        "rollout.engine": kind,
        "rollout.server.timeout": 1.0,
        "rollout.server.probe_tolerance": 0.1,
    }
    for when in ("sync", "generate"):
        chosen = [key for key in wrong if key[0] == when]
        found = ranks.run(1, asked_wrongly, settings, chosen)[0]
        for key in chosen:
            assert re.search(wrong[key], found[key[1]]), (key, found[key[1]])
            assert "\n" not in found[key[1]]


def another_model(rank: int, world_size: int, settings: Settings) -> str:
    with reinforcement(settings, world_size) as run:
        from megatron_ptrl.training.mcore import unwrap

        def export(folder: Path) -> None:
            run._export(folder)
            unwrap(run.chunks[0]).decoder.final_layernorm.weight.data[:4] *= 2  # the trainer goes on, alone

        with pytest.raises(InputError) as caught:
            run._make_engine().sync(0, export)
        return str(caught.value)


def test_a_server_with_other_weights_is_refused(ranks, settings):
    told = ranks.run(2, another_model, settings | {"rollout.engine": "vllm"})
    assert all(re.search("nats from the trainer's on average, more than .* 0.0001", text) for text in told)


def with_one_killed(rank: int, world_size: int, settings: Settings, pid: int) -> dict[str, Any]:
    import os
    import signal

    with reinforcement(settings, world_size) as run:
        engine = run._make_engine()
        engine.sync(0, run._export)
        wanted = requests()
        before = engine.generate(wanted, **PLAIN)
        killed = []

        def kill(number: int, found: Generation) -> None:
            if not killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(number)

        during = engine.generate(wanted, **PLAIN, on_done=kill)
        out = [server.out for server in engine._fleet.servers]
        engine.sync(1, run._export)
        return {"before": before, "during": during, "after": engine.generate(wanted, **PLAIN), "out": out}


def test_a_server_that_is_killed_is_left_out(ranks, settings, stubs):
    with StubRollouts() as third:
        settings = settings | {"rollout.engine": "sglang", "rollout.servers": [stubs[0].url, third.url]}
        found = ranks.run(1, with_one_killed, settings, third.process.pid)[0]
    assert found["before"] == found["during"] == found["after"]
    assert found["out"][0] is None and "no connection" in found["out"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_reinforcement_with_servers(ranks, settings, kind):
    rows = run_rl(ranks, 2, settings | {"rollout.engine": kind, "parallel.tp": 2})
    assert [row["step"] for row in rows] == [1, 2, 3] and sum(row["updates"] for row in rows) > 0
    for row in rows:
        if row["updates"]:
            assert abs(row["token_mult_prob_error"] - 1) < 1e-4 and row["logprob_difference_max"] < 1e-3
            assert abs(row["ratio"] - 1) < 1e-5
    assert len(list((Path(settings["run_dir"]) / "weights").iterdir())) == 2


REFUSED = {
    "expected servers with sglang and vllm": {"rollout.engine": "vllm", "rollout.servers": []},
    "and none with megatron": {"rollout.engine": "megatron", "rollout.servers": ["http://localhost:1"]},
    "more than 1700 seconds together": {"rollout.engine": "vllm", "rollout.server.deadline": 1500},
    "model.activation_func is gelu": {"rollout.engine": "vllm", "model.activation_func": "gelu"},
}


def refused(rank: int, world_size: int, settings: Settings) -> str:
    from jsonargparse import ArgumentError
    from tiny import parsed

    from megatron_ptrl.training.engines import check_engine

    try:
        config = parsed(settings, "RLConfig")
        check_engine(config, config.rollout)
    except (InputError, ArgumentError, SystemExit) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("told", REFUSED)
def test_settings_that_cannot_work_are_refused(ranks, settings, told):
    assert told in ranks.run(1, refused, settings | REFUSED[told])[0]


def test_the_key_is_in_no_error(stubs, monkeypatch):
    import asyncio

    from megatron_ptrl.config import RolloutServerConfig
    from megatron_ptrl.rollout.http_fleet import Fleet

    monkeypatch.setenv("ROLLOUT_API_KEY", "token-abc")
    stubs[0].set("400")

    async def ask() -> None:
        fleet = Fleet([stubs[0].url], RolloutServerConfig())
        async with fleet.opened():
            await fleet.ask(fleet.servers[0], "/generate", {})

    with pytest.raises(InputError) as caught:
        asyncio.run(ask())
    assert "too large for Bearer ***" in str(caught.value)
