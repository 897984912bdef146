"""Fine-tuning that is small enough for a test: conversations of any lengths, a pre-trained model."""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ranks import Ranks
from stage_runs import megatron_core
from tiny import Metrics, Settings, parsed, read_metrics, tiny_config

WORDS = ("def", "return", "import", "class", "self", "None")


def make_chats(path: Path, count: int, seed: int = 1) -> str:
    """A file of conversations; an answer repeats the last word of its question, so there is something to learn."""
    draw = random.Random(seed)
    with path.open("w") as stream:
        for _ in range(count):
            messages = []
            for _ in range(draw.choice([1, 1, 2])):
                words = draw.choices(WORDS, k=draw.randint(1, 4))
                messages.append({"role": "user", "content": " ".join(words)})
                messages.append({"role": "assistant", "content": " ".join([words[-1]] * draw.randint(1, 3))})
            stream.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def sft_config(prefix: str, chats: str, run_dir: Path | str, **overrides: Any) -> Settings:
    """Settings of a run of the tiny model; `train__epochs=2` overrides `train.epochs`."""
    kept = ("data.train", "data.cache", "train.steps")
    settings = {name: value for name, value in tiny_config(prefix, run_dir).items() if name not in kept}
    settings |= {
        "data.train": [chats],
        "data.tokenizer": prefix + ".tokenizer.json",
        "data.seq_length": 96,
        "train.global_batch": 4,
        "train.epochs": 2,
        "optimizer.warmup_steps": 0,
    }
    return settings | {name.replace("__", "."): value for name, value in overrides.items()}


@contextlib.contextmanager
def fine_tuning(settings: Settings, world_size: int) -> Iterator[Any]:
    """A `SupervisedTuning` on this rank of the pool, its output swallowed."""
    config = parsed(settings, "SFTConfig")
    from megatron_ptrl.training.sft import check, tuning

    layout, tokenizer = check(config, world_size)
    with megatron_core(config):
        yield tuning(config, layout, tokenizer)


def tune(rank: int, world_size: int, settings: Settings) -> list[Metrics]:
    """A whole run on this rank of the pool; the metrics of every step so far, without the clock's."""
    with fine_tuning(settings, world_size) as run:
        run.run()
    return read_metrics(settings["run_dir"]) if rank == 0 else []


def run_sft(ranks: Ranks, world_size: int, settings: Settings) -> list[Metrics]:
    """`tune` on `world_size` ranks of the pool; rank 0's metrics."""
    return ranks.run(world_size, tune, settings)[0]
