"""Several answers to each problem -> pass@k, avg@n, cons@n, each with an interval over the problems.

    answers and whether each is right  ->  Problem  ->  a value for each problem  ->  mean, 95 % interval

An answer that could not be judged is no part of a problem: it counts neither as right nor as wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from megatron_ptrl.rollout.verify import same_number, same_text

INTERVAL = 0.95


@dataclass(frozen=True, slots=True)
class Problem:
    """The judged answers to one problem."""

    answers: Sequence[str]
    """What was found in each response; empty where nothing was."""
    right: Sequence[bool]
    """Whether the verifier or the judge took it, of the same length."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over problems."""

    value: float
    low: float | None
    """Lower end of the 95 % interval; None for fewer than two problems, which say nothing of their spread."""
    high: float | None
    problems: int
    """How many it is the mean of: those with enough judged answers."""


@dataclass(frozen=True, slots=True)
class Consensus:
    """What most answers to a problem say."""

    answer: str
    """The first one written of those that were said most often; empty where there is no answer at all."""
    value: float
    """1 for a right one, 0 for a wrong one; after a tie the share of right ones among those that were tied."""
    tied: bool


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k answers is right.

    1 - C(n - c, k) / C(n, k), n `samples` of which c are `right` (arXiv:2107.03374), computed as
    1 - prod_{i = n - c + 1}^{n} (1 - k / i), which does not overflow; 1 where n - c < k. Cost: c products.
    Raises ValueError for k above `samples`.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} of {right} right among {samples}; expected 0 <= right <= samples and 1 <= k <= samples"
        )
    if samples - right < k:
        return 1.0
    return float(1.0 - numpy.prod(1.0 - k / numpy.arange(samples - right + 1, samples + 1)))


def consensus(problem: Problem) -> Consensus:
    """The majority of the answers, each a vote; a response without an answer has none.

    All right answers are one candidate, because the verifier has seen that they say the same. Wrong ones are the same
    candidate where they are the same number or the same text, so a wrong formula written in two ways is two.
    """
    first: list[str] = []
    is_right: list[bool] = []
    votes: list[int] = []
    for answer, right in zip(problem.answers, problem.right, strict=True):
        if not answer:
            continue
        known = (
            i for i, a in enumerate(first) if (right and is_right[i]) or (right == is_right[i] and _same(answer, a))
        )
        number = next(known, None)
        if number is None:
            number = len(first)
            first, is_right, votes = [*first, answer], [*is_right, right], [*votes, 0]
        votes[number] += 1
    if not votes:
        return Consensus("", 0.0, False)
    top = [i for i, count in enumerate(votes) if count == max(votes)]
    return Consensus(first[top[0]], sum(is_right[i] for i in top) / len(top), len(top) > 1)


def _same(answer: str, other: str) -> bool:
    return bool(same_number(answer, other)) or same_text(answer, other)


def bootstrap_interval(values: Sequence[float], *, resamples: int, seed: int) -> tuple[float, float] | None:
    """The middle 95 % of the means of `resamples` draws with replacement; None for fewer than two values.

    The same values and seed give the same interval. Cost: resamples x values additions.
    """
    if len(values) < 2:
        return None
    rng, found = numpy.random.default_rng(seed), numpy.asarray(values, numpy.float64)
    means = [found[rng.integers(len(found), size=len(found))].mean() for _ in range(resamples)]
    low, high = numpy.quantile(means, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return float(low), float(high)


def figures(
    problems: Sequence[Problem], ks: Sequence[int], *, samples: int, resamples: int, seed: int
) -> dict[str, Figure]:
    """pass@k for each k, avg@n, cons@n and the share of ties behind it, over the problems with enough judged answers.

    samples: n, the answers that each problem has been given; some may be missing because they could not be judged

    A k that no problem has enough answers for is left out.
    """
    measures: dict[str, tuple[int, Callable[[Problem], float]]] = {
        f"pass@{k}": (k, lambda p, k=k: pass_at_k(len(p.right), sum(p.right), k))  # type: ignore[misc]
        for k in ks
    }
    measures[f"avg@{samples}"] = (1, lambda p: sum(p.right) / len(p.right))
    measures[f"cons@{samples}"] = (1, lambda p: consensus(p).value)
    measures[f"tied@{samples}"] = (1, lambda p: float(consensus(p).tied))
    found = {}
    for name, (least, measure) in measures.items():
        values = [measure(problem) for problem in problems if len(problem.right) >= least]
        if values:
            low, high = bootstrap_interval(values, resamples=resamples, seed=seed) or (None, None)
            found[name] = Figure(sum(values) / len(values), low, high, len(values))
    return found
