"""Samples and sums of an evaluation -> named figures -> results.json and a table.

samples.jsonl  --sample_figures-->  gsm8k/pass@1, asr/accuracy, ...
text.jsonl     --text_figures-->    corpus/perplexity, corpus/entropy, ...
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_ptrl.evaluation.pass_at_k import Figure, Problem, figures

Named = dict[str, Figure]


@dataclasses.dataclass
class _Tally:
    """What is kept of the samples of one file and task."""

    problems: dict[int, tuple[list[str], list[bool]]] = dataclasses.field(default_factory=dict)
    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    samples: int = 0
    unjudged: int = 0
    truncated: int = 0
    tokens: int = 0


def sample_figures(
    samples: Iterable[dict[str, Any]], ks: Sequence[int], *, wanted: int, resamples: int, seed: int
) -> tuple[Named, dict[str, Any]]:
    """(figures by name, counts by file) of the lines of samples.jsonl, in any order.

    wanted: samples of each prompt

    A name is the file's, with the task behind it where a file has several, and the measure: pass@k, avg@n, cons@n and
    tied@n for problems; pass@k and `accuracy`, which is avg@n, for next segments, whose texts cannot be voted on.
    """
    tallies: dict[tuple[str, str], _Tally] = {}
    for line in samples:
        _count(tallies.setdefault((line["file"], line["task"]), _Tally()), line)
    found: Named = {}
    counts: dict[str, Any] = {}
    for (file, task), tally in sorted(tallies.items()):
        several = sum(name == file for name, _ in tallies) > 1
        name = f"{file}/{task}" if several else file
        problems = [Problem(answers, right) for _, (answers, right) in sorted(tally.problems.items())]
        measures = figures(problems, ks, samples=wanted, resamples=resamples, seed=seed)
        if task != "rlvr":
            # Accuracy is the mean that pass@1 would be once more.
            measures = {
                "accuracy" if key == f"avg@{wanted}" else key: value
                for key, value in measures.items()
                if key != "pass@1" and not key.startswith(("cons@", "tied@"))
            }
        found |= {f"{name}/{key}": value for key, value in measures.items()}
        counts[name] = {
            "task": task,
            "problems": len(tally.problems),
            "samples": tally.samples,
            "unjudged": tally.unjudged,
            "truncated_share": tally.truncated / tally.samples,
            "response_tokens_mean": tally.tokens / tally.samples,
            "outcomes": dict(sorted(tally.outcomes.items())),
        }
    return found, counts


def _count(tally: _Tally, line: dict[str, Any]) -> None:
    answers, right = tally.problems.setdefault(line["place"], ([], []))
    tally.samples += 1
    tally.tokens += len(line["token_ids"])
    tally.truncated += line["finish_reason"] == "length"
    tally.outcomes[line["reason"]] += 1
    if line["reward"] is None:
        tally.unjudged += 1
    else:
        answers.append(line["prediction"])
        right.append(line["reward"] > 0)


def text_figures(chunks: Iterable[dict[str, Any]]) -> tuple[Named, dict[str, Any]]:
    """(figures by name, counts by data) of the lines of text.jsonl: cross entropy, perplexity, entropy.

    In nats a token; the figures have no interval, because the tokens are all of the data and not a sample.
    """
    sums: dict[str, dict[str, list[float]]] = {}
    for line in sorted(chunks, key=lambda line: line["chunk"]):
        of_data = sums.setdefault(line["name"], {key: [] for key in ("tokens", "logprob", "entropy")})
        for key, values in of_data.items():
            values.append(line[key])
    found: Named = {}
    counts: dict[str, Any] = {}
    for name, totals in sorted(sums.items()):
        tokens = math.fsum(totals["tokens"])
        ce = -math.fsum(totals["logprob"]) / tokens
        means = {
            "cross_entropy": ce,
            "perplexity": math.exp(min(ce, 700.0)),
            "entropy": math.fsum(totals["entropy"]) / tokens,
        }
        found |= {f"{name}/{key}": Figure(value, None, None, int(tokens)) for key, value in means.items()}
        counts[name] = {"tokens": int(tokens)}
    return found, counts


def table(named: Named) -> str:
    """A Markdown table: figure, value, its 95 % interval, what it is a mean of."""
    rows = [["figure", "value", "95 % interval", "over"], ["---", "---:", "---:", "---:"]]
    for name, figure in named.items():
        known = figure.low is not None and figure.high is not None
        interval = f"{figure.low:.4f} to {figure.high:.4f}" if known else "-"
        rows.append([name, f"{figure.value:.4f}", interval, f"{figure.problems:,}"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    )


def as_json(named: Named) -> dict[str, Any]:
    """The figures as results.json holds them."""
    return {name: dataclasses.asdict(figure) for name, figure in named.items()}
