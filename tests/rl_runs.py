"""Reinforcement that is small enough for a test: prompts, a pre-trained model, a judge that counts letters."""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ranks import Ranks
from stage_runs import megatron_core
from tiny import Metrics, Settings, parsed, read_metrics, tiny_config

from megatron_ptrl.records import Judgement, Prompt


def make_prompts(path: Path, count: int, task: str = "asr", words: int = 3) -> str:
    """A prompts file; the prompts have different lengths."""
    with path.open("wb") as stream:
        for i in range(count):
            content = " ".join(["def", "return", "import", "class"][(i + j) % 4] for j in range(words + i % 3))
            messages = [{"role": "user", "content": f"{content} {i}"}]
            prompt = Prompt(id=f"{task}{i}", task=task, messages=messages, target="x", reference="x y")
            stream.write(prompt.to_line() + b"\n")
    return str(path)


def rl_config(prefix: str, prompts: list[str | float], run_dir: Path | str, **overrides: Any) -> Settings:
    """Settings of a run of the tiny model; `rollout__samples=3` overrides `rollout.samples`."""
    kept = ("data.train", "data.cache", "train.global_batch", "train.eval_samples")
    settings = {name: value for name, value in tiny_config(prefix, run_dir).items() if name not in kept}
    settings |= {
        "data.tokenizer": prefix + ".tokenizer.json",
        "data.seq_length": 96,  # two or three responses in a row
        "prompts.files": prompts,
        "rollout.prompts": 4,
        "rollout.samples": 4,
        "rollout.max_tokens": 8,
        "rollout.batch": 8,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "train.steps": 3,
    }
    return settings | {name.replace("__", "."): value for name, value in overrides.items()}


class Letters:
    """A judge at once: 1 for a response with an "e" in it. Any figure of a run is then known from its rollouts."""

    def submit(self, prompt: Prompt, response: str, *, truncated: bool) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        future.set_result(self.judge(prompt, response))
        return future

    def judge(self, prompt: Prompt, response: str) -> Judgement:
        return Judgement(reward=float("e" in response), reason="judged", prediction=response, seconds=0.0)

    def close(self) -> None: ...


@contextlib.contextmanager
def reinforcement(settings: Settings, world_size: int, rewarder: Any = None) -> Iterator[Any]:
    """A `Reinforcement` on this rank of the pool with `rewarder` for its judge, its output swallowed."""
    config = parsed(settings, "RLConfig")
    from megatron_ptrl.training.rl import Reinforcement, check

    class Judged(Reinforcement):
        def _make_rewarder(self) -> Any:
            return rewarder or Letters()

    layout, tokenizer = check(config, world_size)
    with megatron_core(config):
        yield Judged(config, layout, tokenizer)


def reinforce(rank: int, world_size: int, settings: Settings, rewarder: Any = None) -> list[Metrics]:
    """A whole run on this rank of the pool; the metrics of every step so far, without the clock's."""
    with reinforcement(settings, world_size, rewarder) as run:
        run.run()
    return read_metrics(settings["run_dir"]) if rank == 0 else []


def read_rollouts(run_dir: Path | str, step: int) -> list[dict[str, Any]]:
    """The lines of a step's dump, without the last one."""
    path = Path(run_dir) / "rollouts" / f"step_{step:08d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()][:-1]


def run_rl(ranks: Ranks, world_size: int, settings: Settings, rewarder: Any = None) -> list[Metrics]:
    """`reinforce` on `world_size` ranks of the pool; rank 0's metrics."""
    return ranks.run(world_size, reinforce, settings, rewarder)[0]
