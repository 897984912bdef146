"""Evaluated runs -> a table and a plot.

    python compare.py --output FOLDER NAME=RUN[,RUN...] ...

A run directory has its metrics.jsonl and, in held_out/, what `ptrl evaluate` wrote about stories that no training has
seen: 8 responses a prompt at temperature 1. Runs of one name are the same method under several seeds: shown as their
mean and, where there are several, +- their standard deviation over seeds (n - 1 in the denominator).

    next sentence       share of the responses that the prefix reward takes
    just that           share that the strict reward takes: neither more nor less than the next sentence
    masked sentence     share right where the sentence behind it is shown
    questions, pass@8   share of the answers that are right, and of the questions with a right one among 8
    tokens              mean length of a response to the questions about next sentences
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

import matplotlib

matplotlib.use("Agg")
import numpy  # noqa: E402
from comparison import named_runs, table  # noqa: E402
from matplotlib import pyplot  # noqa: E402

from megatron_ptrl.config import JudgeConfig, LexicalConfig  # noqa: E402
from megatron_ptrl.errors import InputError  # noqa: E402
from megatron_ptrl.evaluation.metrics import read_metrics  # noqa: E402
from megatron_ptrl.rollout.lexical import LexicalJudge  # noqa: E402

Measured = dict[str, list[dict[str, float]]]  # by name, the columns of every run
COLUMNS = {
    "next sentence": "{:.1%}",
    "just that": "{:.1%}",
    "masked sentence": "{:.1%}",
    "questions": "{:.1%}",
    "pass@8": "{:.1%}",
    "tokens": "{:.1f}",
}
COLOURS = ("#888888", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
SMOOTHED_STEPS = 5


def measure(run: Path) -> dict[str, float]:
    """The columns of the table for one run."""
    results = json.loads((run / "held_out" / "results.json").read_text(encoding="utf-8"))
    lines = (run / "held_out" / "samples.jsonl").read_bytes().splitlines()
    figures = results["figures"]
    tries = "pass@8" if "questions/pass@8" in figures else "pass@1"  # a small run has two responses a prompt
    return {
        "next sentence": figures["asr/accuracy"]["value"],
        "just that": asyncio.run(strictly([json.loads(line) for line in lines])),
        "masked sentence": figures["msr/accuracy"]["value"],
        "questions": figures["questions/pass@1"]["value"],
        "pass@8": figures[f"questions/{tries}"]["value"],
        "tokens": results["prompts"]["asr"]["response_tokens_mean"],
    }


async def strictly(samples: Sequence[dict[str, Any]]) -> float:
    """The share of the predictions of next sentences that are that sentence, whole."""
    judge = LexicalJudge(JudgeConfig(reward="strict", lexical=LexicalConfig(threshold=97)))
    return statistics.mean([await judge.score(s["prediction"], s["target"]) for s in samples if s["task"] == "asr"])


def curves(runs: Sequence[Path], metric: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(steps, values (runs, steps)) of a metric, each a mean over a few steps around it."""
    found = []
    for run in runs:
        metrics = read_metrics(run)
        values = numpy.array(metrics.series(metric, metrics.train)[1])
        width = min(SMOOTHED_STEPS, len(values))
        found.append(numpy.convolve(values, numpy.ones(width) / width, mode="valid"))
    steps = numpy.arange(found[0].size) + (width + 1) / 2
    return steps, numpy.stack(found)


def draw(named: dict[str, list[Path]], measured: Measured, path: Path) -> None:
    """Training, as means with bands of a deviation over seeds; then the held-out stories, where a dot is a run."""
    colours = dict(zip(named, COLOURS, strict=False))
    rlvr = [name for name in named if name.endswith("RLVR")]
    rlpt = [name for name in named if name not in ("cold start", *rlvr)]
    figure, panels = pyplot.subplots(1, 4, figsize=(18, 3.8), layout="constrained")
    for panel, names, metric, title in (
        (panels[0], rlpt, "reward", "reward on new prompts"),
        (panels[1], rlpt, "response_tokens_mean", "tokens a response"),
        (panels[2], rlvr, "reward", "reward on new questions"),
    ):
        for name in names:
            steps, values = curves(named[name], metric)
            mean, deviation = values.mean(0), values.std(0, ddof=min(1, len(values) - 1))
            panel.plot(steps, mean, color=colours[name], label=name)
            panel.fill_between(steps, mean - deviation, mean + deviation, color=colours[name], alpha=0.2, linewidth=0)
        panel.set_title(f"{title} (mean of {SMOOTHED_STEPS} steps)")
        panel.set_xlabel("step")
        if names:
            panel.legend(frameon=False)
    shown = ("next sentence", "masked sentence", "questions")
    width = 0.8 / len(measured)
    for number, (name, runs) in enumerate(measured.items()):
        for place, column in enumerate(shown):
            values = [run[column] for run in runs]
            x = place + (number - (len(measured) - 1) / 2) * width
            label = name if place == 0 else None
            panels[3].bar(x, statistics.mean(values), color=colours[name], width=width, label=label)
            panels[3].plot([x] * len(values), values, "o", color="black", markersize=3)
    panels[3].set_xticks(range(len(shown)), shown)
    panels[3].set_title("held-out stories: share right")
    panels[3].set_ylim(0, 1.05)
    panels[3].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Read every run, print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN[,RUN...]")
    parser.add_argument("--output", type=Path, required=True, help="folder for table.md and comparison.png")
    arguments = parser.parse_args()
    named = named_runs(arguments.runs)
    try:
        measured = {name: [measure(run) for run in runs] for name, runs in named.items()}
        draw(named, measured, arguments.output / "comparison.png")
    except (InputError, OSError) as error:
        sys.exit(f"compare.py: {error}")
    text = table(measured, COLUMNS)
    print(text)
    (arguments.output / "table.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
