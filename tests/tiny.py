"""A corpus, a model and a run that are small enough for a test: seconds on one core, in the pool's processes.

Settings are a plain dict of dotted names, as on the command line, because Megatron-Core's own fields live in a class
that is made while parsing and cannot be pickled.
"""

import contextlib
import io
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ranks import Ranks
from stage_runs import megatron_core

from megatron_ptrl.config import TokenizeConfig
from megatron_ptrl.data.tokenize_stage import run as tokenize

Settings = dict[str, Any]
Metrics = dict[str, float]

VOCAB = 512
WALL_CLOCK = ("seconds", "seconds_mean", "seconds_p95", "tokens_per_second")


def make_corpus(folder: Path, megabytes: float = 0.4) -> str:
    """Prefix of a tokenized part of the running Python's standard library, in shuffled order."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(1).shuffle(paths)
    source, size = folder / "corpus.jsonl", 0
    with source.open("w", encoding="utf-8") as stream:
        for path in paths:
            text = path.read_text(encoding="utf-8")[:20_000]
            stream.write(json.dumps({"text": text}) + "\n")
            size += len(text)
            if size > megabytes * 1e6:
                break
    prefix = str(folder / "corpus")
    with contextlib.redirect_stdout(io.StringIO()):
        tokenize(TokenizeConfig(input=[str(source)], output=prefix, vocab_size=VOCAB))
    return prefix


def tiny_config(prefix: str, run_dir: Path | str, **overrides: Any) -> Settings:
    """Settings of a run of 4 layers; `train__steps=3` overrides `train.steps`."""
    settings: Settings = {
        "run_dir": str(run_dir),
        "model.num_layers": 4,
        "model.hidden_size": 64,
        "model.num_attention_heads": 4,
        "model.num_query_groups": 2,
        "model.ffn_hidden_size": 128,
        "data.train": [prefix],
        "data.seq_length": 64,
        "data.cache": str(Path(prefix).parent / "cache"),
        "optimizer.lr": 2e-3,
        "optimizer.warmup_steps": 2,
        "train.steps": 10,
        "train.global_batch": 8,
        "train.micro_batch": 2,
        "train.eval_samples": 0,
        "log.tensorboard": False,
        "log.plots": False,
    }
    return settings | {name.replace("__", "."): value for name, value in overrides.items()}


def flags(settings: Settings) -> list[str]:
    """The settings as `--name=value` arguments."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]


def parsed(settings: Settings, config: str = "PretrainConfig") -> Any:
    """The settings as that class of megatron_ptrl.config; for a process of the pool, whose torch may be patched."""
    from megatron_ptrl.training import host

    host.install_if_no_cuda()
    import megatron_ptrl.config
    from megatron_ptrl.cli import parse

    return parse(getattr(megatron_ptrl.config, config), flags(settings), prog="ptrl")


@contextlib.contextmanager
def pretraining(settings: Settings, world_size: int) -> Iterator[Any]:
    """A `Pretraining` on this rank of the pool, its output swallowed; the pool closes the process groups."""
    config = parsed(settings)
    from megatron_ptrl.data.indexed import resolve_tokenizer
    from megatron_ptrl.training.layout import check_layout
    from megatron_ptrl.training.pretrain import Pretraining

    layout = check_layout(config, world_size)
    with megatron_core(config):
        yield Pretraining(config, layout, resolve_tokenizer(config.data))


def train(rank: int, world_size: int, settings: Settings) -> list[Metrics]:
    """A whole run on this rank of the pool; the metrics of every step so far, without the clock's."""
    with pretraining(settings, world_size) as run:
        run.run()
    return read_metrics(settings["run_dir"]) if rank == 0 else []


def read_metrics(run_dir: Path | str) -> list[Metrics]:
    """metrics.jsonl without what depends on the clock."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(WALL_CLOCK)} for line in lines]


def run_tiny(ranks: Ranks, world_size: int, settings: Settings) -> list[Metrics]:
    """`train` on `world_size` ranks of the pool; rank 0's metrics."""
    return ranks.run(world_size, train, settings)[0]


def assert_close_metrics(actual: list[Metrics], expected: list[Metrics], tolerances: dict[str, float]) -> None:
    """Equal step by step to the relative tolerance that each figure has; the message names the worst one."""
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    worst = {
        name: max(abs(a[name] - e[name]) / (abs(e[name]) or 1.0) for a, e in zip(actual, expected, strict=True))
        for name in tolerances
    }
    failed = {name: error for name, error in worst.items() if not error <= tolerances[name]}
    assert not failed, f"relative errors {failed}, allowed {tolerances}; all: {worst}"
