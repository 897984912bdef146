"""`ptrl rl` with a judge behind a server: what it says, what it does not say, and that it is not there."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from rl_runs import Letters, make_prompts, read_rollouts, reinforcement, rl_config
from stub_llm_server import StubServer
from tiny import Metrics, Settings, read_metrics

from megatron_ptrl.records import Judgement, Prompt

TAGGED = "<|startofprediction|>{}<|endofprediction|>"
# The server says 1 to what the reference, "x y", begins with, and something else than a score to what is poison.
WRITTEN = [TAGGED.format("x"), TAGGED.format("wrong"), TAGGED.format("poison"), "x without tags"]


def judged_by_a_server(rank: int, world_size: int, settings: Settings) -> list[Metrics] | str:
    """The figures of a run whose policy writes `WRITTEN` to every prompt; or what stopped it."""
    from megatron_ptrl.errors import InputError
    from megatron_ptrl.rollout.engine import Generation
    from megatron_ptrl.rollout.rewards import make_rewarder
    from megatron_ptrl.training.rl import Reinforcement

    with reinforcement(settings, world_size) as run:
        texts = [run.tokenizer.encode(text) for text in WRITTEN]

        class Engine:
            name, weight_version = "written", 0

            def generate(self, requests: Any, *, on_done: Any = None, **options: Any) -> list[Generation]:
                found = [
                    Generation(list(map(int, texts[i % 4])), [-6.0] * len(texts[i % 4]), "stop") for i in range(16)
                ]
                for number, generation in enumerate(found if on_done else []):
                    on_done(number, generation)
                return found

            def sync(self, *arguments: Any) -> None: ...

            def close(self) -> None: ...

        run._make_engine = Engine
        run._make_rewarder = lambda: make_rewarder(run.config.judge)
        assert isinstance(run, Reinforcement)
        try:
            run.run()
        except InputError as error:
            return str(error)
    return read_metrics(settings["run_dir"])


def settings_of(prefix: str, folder: Path, url: str, **changes: Any) -> Settings:
    prompts: list[str | float] = [make_prompts(folder / "prompts.jsonl", 4)]
    judge = {"judge.kind": "openai", "judge.servers": json.dumps([url]), "judge.server.backoff": 0.01}
    return rl_config(prefix, prompts, folder / "run", train__steps=1, **changes) | judge


@pytest.mark.parametrize("fault", ["score_2", "prose"])
def test_what_the_server_does_not_score_is_in_nothing(ranks: Ranks, prefix: str, tmp_path: Path, fault: str) -> None:
    with StubServer(tmp_path / "log", "--fault", fault, "--every", "1000000") as server:
        settings = settings_of(prefix, tmp_path, server.url, rollout__max_unjudged=0.25)
        (row,) = ranks.run(1, judged_by_a_server, settings)[0]
        fewer = settings | {"rollout.max_unjudged": 0.2, "run_dir": str(tmp_path / "fewer")}
        told = ranks.run(1, judged_by_a_server, fewer)[0]
    assert row["unjudged_share"] == row["outcome_unparsed"] == 0.25 and row["reward"] == pytest.approx(1 / 3)
    assert row["outcome_no_tags"] == row["gate_failed_share"] == 0.25 and row["outcome_judged"] == 0.5
    lines = read_rollouts(tmp_path / "run", 1)
    assert [line["reward"] for line in lines] == [1.0, 0.0, None, 0.0] * 4
    assert [round(line["advantage"], 3) for line in lines] == [1.155, -0.577, 0, -0.577] * 4
    assert row["num_tokens"] == sum(len(line["token_ids"]) for line in lines if line["reward"] is not None)
    assert told.startswith("4 of 16 responses could not be judged (unparsed 4), more than rollout.max_unjudged 0.2")
    assert not (tmp_path / "fewer" / "checkpoints").exists()


def test_a_server_that_is_down_stops_the_run_in_one_line(ranks: Ranks, prefix: str, tmp_path: Path) -> None:
    with StubServer(tmp_path / "log") as server:
        url = server.url
    settings = settings_of(prefix, tmp_path, url) | {"judge.server.patience": 1.0, "judge.server.model": "m"}
    told = ranks.run(1, judged_by_a_server, settings)[0]
    assert "no server has answered for" in told and url in told and "\n" not in told
    assert not (tmp_path / "run" / "checkpoints").exists()


def stopped_by_its_judge(rank: int, world_size: int, settings: Settings) -> tuple[int, str]:
    """How many responses a run had judged whose judge refuses the first one at once; and what stopped it."""
    from megatron_ptrl.errors import InputError

    class Gone(Letters):
        asked = 0

        def submit(self, prompt: Prompt, response: str, *, truncated: bool) -> Future[Judgement]:
            self.asked += 1
            future: Future[Judgement] = Future()
            future.set_exception(InputError("judge: there is none"))
            return future

    gone = Gone()
    with reinforcement(settings, world_size, gone) as run, pytest.raises(InputError) as caught:
        run.run()
    return gone.asked, str(caught.value)


def test_no_more_is_written_for_a_judge_that_has_gone(ranks: Ranks, prefix: str, tmp_path: Path) -> None:
    prompts: list[str | float] = [make_prompts(tmp_path / "prompts.jsonl", 4)]
    settings = rl_config(prefix, prompts, tmp_path / "run", train__steps=1, rollout__batch=1)
    assert ranks.run(1, stopped_by_its_judge, settings)[0] == (1, "judge: there is none")
