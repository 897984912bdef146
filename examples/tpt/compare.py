"""Runs -> a table and a plot: sums that no training has seen, and the loss of documents that hold them.

    python compare.py --sums held_out.jsonl --output FOLDER NAME=RUN[,RUN...] ...

Runs of one name are the same method under several seeds: shown as their mean and, where there are several, +- their
standard deviation over seeds (n - 1 in the denominator). Everything is greedy.

    directly         share of the sums right where the document goes on with its total, written in one go
    after thinking   share right at the end of the thinking behind a document that leaves its total open
    CE documents     nats a token of documents that state their total, without thinking
    CE totals        nats a token of those totals alone

A model is given the same documents either way, never its total. One that has seen no thinking writes none: its share
after thinking is measured like the others', and is 0 for want of a total, not of arithmetic.
"""

import argparse
import asyncio
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the examples keep what they share

import matplotlib

matplotlib.use("Agg")
import torch  # noqa: E402
from comparison import named_runs, table  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from sums import Sum, is_right  # noqa: E402

from megatron_ptrl.errors import InputError  # noqa: E402
from megatron_ptrl.thinking.embedded import EmbeddedGenerator, open_embedded  # noqa: E402
from megatron_ptrl.thinking.generators import Request  # noqa: E402

ROWS_AT_ONCE = 64
THINKING_TOKENS = 96
Measured = dict[str, list[dict[str, float]]]  # by name, the columns of every run
COLUMNS = {"directly": "{:.1%}", "after thinking": "{:.1%}", "CE documents": "{:.4f}", "CE totals": "{:.4f}"}


async def measure(run: Path, sums: Sequence[Sum]) -> dict[str, float]:
    """The columns of the table for one run."""
    generator = open_embedded(str(run), batch=ROWS_AT_ONCE)
    try:
        totals = await write(generator, [one.up_to_total for one in sums], max_tokens=6)
        thinking = await write(generator, [f"{one.text(stated=False)}\n\n<think>" for one in sums], THINKING_TOKENS)
        documents, figures = cross_entropy(generator, sums)
    finally:
        await generator.close()
    return {
        "directly": statistics.mean(first_number(text) == one.total for text, one in zip(totals, sums, strict=True)),
        "after thinking": statistics.mean(is_right(text, one.total) for text, one in zip(thinking, sums, strict=True)),
        "CE documents": documents,
        "CE totals": figures,
    }


async def write(generator: EmbeddedGenerator, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """What the model writes behind each prompt, up to the end of the thinking."""
    requests = [
        Request(str(i), [{"role": "user", "content": text}], max_tokens, 0.0, 1.0, ["</think>"], seed=0)
        for i, text in enumerate(prompts)
    ]
    return [reply.text for reply in await asyncio.gather(*map(generator.generate, requests))]


def first_number(text: str) -> int | None:
    """Of what the model wrote; digits of its own stand apart from what follows."""
    found = re.match(r"\s*(\d+)\D", text)
    return int(found[1]) if found else None


@torch.no_grad()
def cross_entropy(generator: EmbeddedGenerator, sums: Sequence[Sum]) -> tuple[float, float]:
    """Nats a token of the documents that state their totals, but for their first tokens, and of the totals alone."""
    everywhere: list[float] = []
    in_totals: list[float] = []
    for one in sums:
        tokens = generator.tokenizer.encode(one.text(stated=True))
        begin = len(generator.tokenizer.encode(one.up_to_total))
        end = begin + len(generator.tokenizer.encode(f" {one.total}"))
        row = torch.tensor([tokens])
        positions = torch.arange(len(tokens) - 1)[None]
        loss = generator.model(row[:, :-1], positions, None, labels=row[:, 1:].contiguous())[0].tolist()
        everywhere += loss
        in_totals += loss[begin - 1 : end - 1]
    return statistics.mean(everywhere), statistics.mean(in_totals)


def by_run(measured: Measured) -> str:
    """What the means hide: the share that each run of a name has right."""
    lines = []
    for name, runs in measured.items():
        for column in ("directly", "after thinking"):
            shares = ", ".join(COLUMNS[column].format(run[column]) for run in runs)
            lines.append(f"{name}, right {column}, run by run: {shares}")
    return "\n".join(lines)


def draw(measured: Measured, path: Path) -> None:
    """A panel a column; a bar is a mean, a dot a run."""
    figure, panels = pyplot.subplots(1, len(COLUMNS), figsize=(3 * len(COLUMNS), 3), layout="constrained")
    for panel, column in zip(panels, COLUMNS, strict=True):
        for place, runs in enumerate(measured.values()):
            values = [run[column] for run in runs]
            panel.bar(place, statistics.mean(values), color=("#56b4e9", "#d55e00")[place % 2], width=0.6)
            panel.plot([place] * len(values), values, "o", color="black", markersize=4)
        panel.set_xticks(range(len(measured)), list(measured))
        share = "%" in COLUMNS[column]
        panel.set_title(f"right {column}" if share else column)
        panel.set_ylabel("share of held-out sums" if share else "nats per token")
        panel.set_ylim(0, 1.05 if share else None)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Measure every run, print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN[,RUN...]")
    parser.add_argument("--sums", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for table.md and comparison.png")
    arguments = parser.parse_args()
    sums = [Sum(**json.loads(line)) for line in arguments.sums.read_text(encoding="utf-8").splitlines()]
    try:
        measured = {
            name: [asyncio.run(measure(run, sums)) for run in runs] for name, runs in named_runs(arguments.runs).items()
        }
    except InputError as error:
        sys.exit(f"compare.py: {error}")
    text = f"{table(measured, COLUMNS)}\n\n{by_run(measured)}"
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(measured, arguments.output / "comparison.png")


if __name__ == "__main__":
    main()
