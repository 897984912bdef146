"""Runs -> a table: what each model can do on problems that no training has seen, and how well it foretells text.

    python compare.py --problems held_out.jsonl --prose held_out_prose.jsonl [--output table.md] NAME=RUN[,RUN...] ...

Runs of one name are the same method under several seeds: shown as their mean and, where there are several, +- their
standard deviation over seeds (n - 1 in the denominator). One process, no gradients.

    right          share of the held-out problems whose greedy answer ends in the right number
    CE problems    nats a token of the rightly worked solutions, given the question
    CE prose       nats a token of held-out prose
    mean weight    of the training tokens, over the run's steps; - where nothing was weighted
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ptrl.training import host

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

host.install_if_no_cuda()

from comparison import named_runs, table  # noqa: E402
from policy import forward, make_rows, sample  # noqa: E402
from problems import is_right  # noqa: E402

from megatron_ptrl.cli import parse  # noqa: E402
from megatron_ptrl.config import PretrainConfig  # noqa: E402
from megatron_ptrl.data.indexed import resolve_tokenizer  # noqa: E402
from megatron_ptrl.data.tokenizer import Tokenizer  # noqa: E402
from megatron_ptrl.errors import InputError  # noqa: E402
from megatron_ptrl.evaluation.metrics import read_metrics  # noqa: E402
from megatron_ptrl.training import checkpoint, mcore  # noqa: E402

ROWS_AT_ONCE = 64
Measured = dict[str, list[dict[str, float | None]]]  # by name, the columns of every run
COLUMNS = {"right": "{:.1%}", "CE problems": "{:.4f}", "CE prose": "{:.4f}", "mean weight": "{:.4f}"}


@dataclass(frozen=True)
class HeldOut:
    """What every model is measured on."""

    problems: list[dict[str, Any]]
    prose: list[str]


def measure(model: Any, tokenizer: Tokenizer, held_out: HeldOut, new_tokens: int) -> dict[str, float]:
    """The columns of the table but the last."""
    prompts = [tokenizer.encode(problem["prompt"]) for problem in held_out.problems]
    generator = torch.Generator()
    answers = sample(model, tokenizer, prompts, new_tokens=new_tokens, temperature=0, generator=generator)
    right = [
        is_right(tokenizer.decode(answer[:-1]), problem["answer"])
        for answer, problem in zip(answers, held_out.problems, strict=True)
    ]
    solutions = [[*tokenizer.encode(problem["solution"]), tokenizer.eod] for problem in held_out.problems]
    prose = [[*tokenizer.encode(text), tokenizer.eod] for text in held_out.prose]
    return {
        "right": statistics.mean(right),
        "CE problems": cross_entropy(model, prompts, solutions),
        # The first token of a document is foretold by nothing, in training too.
        "CE prose": cross_entropy(model, [text[:1] for text in prose], [text[1:] for text in prose]),
    }


@torch.no_grad()
def cross_entropy(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> float:
    """Nats a token of the answers, given their prompts and what stands before."""
    model.eval()
    total = tokens = 0.0
    for begin in range(0, len(prompts), ROWS_AT_ONCE):
        end = begin + ROWS_AT_ONCE
        rows = make_rows(prompts[begin:end], answers[begin:end])
        loss = forward(model, rows.tokens, rows.labels).cpu()
        total += float((loss * rows.answer_mask).sum())
        tokens += float(rows.answer_mask.sum())
    return total / tokens


def mean_weight(run: Path) -> float | None:
    """Of the logged steps; None for a run that logs no weights."""
    metrics = read_metrics(run)
    _, weights = metrics.series("remit_weight_mean", metrics.train)
    return statistics.mean(weights) if weights else None


def main() -> None:
    """Measure every run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN[,RUN...]")
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of an answer at most (default 32)")
    parser.add_argument("--output", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    held_out = HeldOut(
        [json.loads(line) for line in arguments.problems.read_text(encoding="utf-8").splitlines()],
        [json.loads(line)["text"] for line in arguments.prose.read_text(encoding="utf-8").splitlines()],
    )
    try:
        text = table(compare(named_runs(arguments.runs), held_out, arguments.new_tokens), COLUMNS)
    except InputError as error:
        sys.exit(f"compare.py: {error}")
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def compare(named: dict[str, list[Path]], held_out: HeldOut, new_tokens: int) -> Measured:
    """The figures of every run; all runs hold the same model, built once."""
    first = next(iter(named.values()))[0]
    config = parse(PretrainConfig, ["--config", str(first / "config.yaml")], prog="compare.py")
    tokenizer = resolve_tokenizer(config.data)
    mcore.initialize(config)
    chunks = mcore.build_model(config, tokenizer.vocab_size)
    measured: Measured = {}
    for name, runs in named.items():
        measured[name] = []
        for run in runs:
            found = checkpoint.find_on_rank_0(run / "checkpoints")
            if found.path is None:
                raise InputError(f"{run} has no whole checkpoint; run run.py again")
            checkpoint.load_weights(found.path, chunks)
            figures = measure(chunks[0], tokenizer, held_out, new_tokens)
            measured[name].append({**figures, "mean weight": mean_weight(run)})
    mcore.shutdown()
    return measured


if __name__ == "__main__":
    main()
