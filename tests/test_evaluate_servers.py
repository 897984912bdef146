"""`ptrl evaluate` with servers: they draw from the checkpoint, and text is still measured by its own weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluating import read, run_evaluation, settings_of
from jsonargparse import ArgumentError
from ranks import Ranks
from rl_runs import make_prompts
from stub_rollout_server import StubRollouts
from tiny import Settings, parsed

from megatron_ptrl.errors import InputError

PATHS = {"sglang": "/generate", "vllm": "/v1/completions"}
CHECKS = {"sglang": 2, "vllm": 1}  # the probe, and SGLang tells its version by the same path
LAYOUTS = {"sglang": (1, {}), "vllm": (2, {"parallel.tp": 2})}
GREEDY = {"rollout.temperature": 0, "rollout.samples": 1, "k": [1]}
PROBLEMS, SEGMENTS = 5, 3


@pytest.fixture(scope="module")
def stub() -> Iterator[StubRollouts]:
    with StubRollouts() as server:
        yield server


@pytest.fixture(scope="module")
def alone(
    ranks: Ranks, reference: Settings, unscored: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """Settings of a finished evaluation by the weights themselves, each token the most probable one."""
    folder = tmp_path_factory.mktemp("prompts")
    problems = [{"question": f"What is {i} + {i}?", "answer": f"#### {i} e"} for i in range(PROBLEMS)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in problems))
    prompts = [str(folder / "sums.jsonl"), make_prompts(folder / "next.jsonl", SEGMENTS)]
    settings = settings_of(reference["run_dir"], folder / "e", data=[unscored], prompts=prompts) | GREEDY
    run_evaluation(ranks, 1, settings)
    yield settings


def served(settings: Settings, stub: StubRollouts, output: Path, kind: str, **changes: Any) -> Settings:
    """The same by a server that has no weights yet."""
    stub.set()
    short = {"rollout.server.attempts": 2, "rollout.server.backoff": 0.05, "rollout.server.probe_tolerance": 1e-4}
    servers = {"rollout.engine": kind, "rollout.servers": [stub.url], "output": str(output)}
    return settings | short | servers | {name.replace("__", "."): value for name, value in changes.items()}


@pytest.mark.parametrize("kind", PATHS)
def test_servers_write_what_the_weights_would_and_text_is_measured_alike(ranks, alone, stub, tmp_path, kind):
    world_size, layout = LAYOUTS[kind]
    run_evaluation(ranks, world_size, served(alone, stub, tmp_path / "e", kind) | layout)
    asked = stub.set()
    assert asked[PATHS[kind]] == PROBLEMS + SEGMENTS + CHECKS[kind]
    assert read(tmp_path / "e", "samples.jsonl") == read(alone["output"], "samples.jsonl")
    mine, theirs = read(tmp_path / "e"), read(alone["output"])
    assert (mine.pop("engine"), theirs.pop("engine")) == (kind, "megatron")
    for name, figure in theirs["figures"].items():
        assert mine["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-5), name
    assert {"data/perplexity", "data/entropy", "sums/pass@1", "next/accuracy"} <= mine["figures"].keys()
    (weights,) = (tmp_path / "e" / "weights").iterdir()
    assert weights.name.startswith("v00000003-") and (weights / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", PATHS)
def test_the_papers_draw_goes_on_from_what_is_done_with_servers_that_report_as_they_like(
    ranks, alone, stub, tmp_path, kind
):
    draw = {"rollout.temperature": 0.6, "rollout.top_p": 0.95, "rollout.samples": 4, "data": [], "k": [1, 2]}
    settings = served(alone, stub, tmp_path / "e", kind) | draw
    # ptrl rl refuses such a server. Here no figure comes from a log-probability of the engine's.
    stub.set("raw_logprobs")
    run_evaluation(ranks, 1, settings)
    asked, samples = stub.set(), read(tmp_path / "e", "samples.jsonl")
    assert asked[PATHS[kind]] == len(samples) + CHECKS[kind] == 4 * (PROBLEMS + SEGMENTS) + CHECKS[kind]
    assert (
        len({line["text"] for line in samples}) > 20
        and {"sums/pass@2", "sums/avg@4"} <= read(tmp_path / "e")["figures"].keys()
    )
    lines = (tmp_path / "e" / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "e" / "samples.jsonl").write_text("".join(lines[:-3]))
    run_evaluation(ranks, 2, settings)
    assert stub.set()[PATHS[kind]] == 4 + CHECKS[kind], "the last prompt's responses alone"
    assert read(tmp_path / "e", "samples.jsonl") == samples
    run_evaluation(ranks, 1, settings | {"rollout.servers": ["http://127.0.0.1:9"]})
    assert read(tmp_path / "e", "samples.jsonl") == samples, "nothing was missing, so nobody was asked"
    with pytest.raises(AssertionError, match="is of an evaluation with another rollout; remove it"):
        run_evaluation(ranks, 1, settings | {"rollout.engine": "megatron", "rollout.servers": []})


def test_a_server_that_does_not_take_the_weights_is_refused(ranks, alone, stub, tmp_path):
    settings = served(alone, stub, tmp_path / "e", "sglang", data=[])
    for fault, said in (("stale_version", "after it was given 'v00000003-"), ("503", "no server could be given")):
        stub.set(fault)
        with pytest.raises(AssertionError, match=said):
            run_evaluation(ranks, 1, settings)
    assert not (tmp_path / "e" / "samples.jsonl").read_text()


def test_settings_that_cannot_work_are_refused():
    for changes, said in (
        ({"rollout.engine": "vllm"}, "expected servers with sglang and vllm"),
        ({"rollout.servers": ["http://localhost:1"]}, "and none with megatron"),
        ({"rollout.engine": "vllm", "rollout.servers": ["http://x"], "rollout.server.in_flight": 0}, "in_flight is 0"),
    ):
        with pytest.raises((InputError, ArgumentError, SystemExit), match=said):
            parsed(settings_of("x", "y") | changes, "EvaluateConfig")
