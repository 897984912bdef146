"""pass@k, avg@n and cons@n against enumeration and worked numbers."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ptrl.evaluation.pass_at_k import Problem, bootstrap_interval, consensus, figures, pass_at_k


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_it_is_the_share_of_subsets_with_a_right_one(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        exact = Fraction(sum(any(subset) for subset in subsets), len(subsets))
        assert pass_at_k(samples, right, k) == pytest.approx(float(exact), abs=1e-12), (right, k)


def test_worked_numbers():
    assert pass_at_k(64, 1, 8) == pytest.approx(8 / 64)
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 3, 2) == 1.0
    assert pass_at_k(10_000, 3, 1000) == pytest.approx(1 - 9000 * 8999 * 8998 / (10_000 * 9999 * 9998))
    for wrong in ((4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)):
        with pytest.raises(ValueError, match="expected 0 <= right"):
            pass_at_k(*wrong)


def test_it_is_unbiased():
    # Its expectation over binomial counts is the probability that one of k independent answers is right.
    chance, samples, k = 0.3, 6, 3
    counts = [sum(bits) for bits in itertools.product([0, 1], repeat=samples)]
    binomial = [counts.count(c) * chance**c * (1 - chance) ** (samples - c) for c in range(samples + 1)]
    expected = sum(share * pass_at_k(samples, c, k) for c, share in enumerate(binomial))
    assert expected == pytest.approx(1 - (1 - chance) ** k)


@pytest.mark.parametrize(
    ("answers", "value", "answer", "tied"),
    [
        ("7R 8 8", 0.0, "8", False),
        ("7R 7R 8", 1.0, "7", False),
        ("1/2R 0.5R 3 3 4", 0.5, "1/2", True),  # the right ones are one candidate; as many say 3
        ("1/2R 0.5R \\frac12R 3 3", 1.0, "1/2", False),
        ("3 3.0 7R", 0.0, "3", False),  # the same number
        ("8 7R 9", 1 / 3, "8", True),
        ("- - - 7R", 1.0, "7", False),  # no answer is no vote
        ("- -", 0.0, "", False),
        ("Yes yes noR", 0.0, "Yes", False),
    ],
)
def test_the_majority(answers, value, answer, tied):
    words = answers.split()
    problem = Problem([word.removesuffix("R").replace("-", "") for word in words], [w.endswith("R") for w in words])
    found = consensus(problem)
    assert (found.value, found.answer, found.tied) == (pytest.approx(value), answer, tied)


def test_figures_over_problems():
    problems = [
        Problem(["7", "7", "8", "8"], [True, True, False, False]),
        Problem(["1", "2", "3", "3"], [False] * 4),
        Problem(["5", "5"], [True, True]),  # two more could not be judged
        Problem([], []),  # none could
    ]
    found = figures(problems, [1, 2, 4, 8], samples=4, resamples=200, seed=1)
    assert list(found) == ["pass@1", "pass@2", "pass@4", "avg@4", "cons@4", "tied@4"]
    assert found["pass@1"].value == pytest.approx((0.5 + 0 + 1) / 3) == found["avg@4"].value
    assert found["pass@2"].value == pytest.approx((5 / 6 + 0 + 1) / 3) and found["pass@2"].problems == 3
    assert (found["pass@4"].value, found["pass@4"].problems) == (0.5, 2)
    assert found["cons@4"].value == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["tied@4"].value == pytest.approx(1 / 3)
    low, high = found["pass@1"].low, found["pass@1"].high
    assert low is not None and high is not None and 0 <= low < found["pass@1"].value < high <= 1
    alone = figures(problems[:1], [1], samples=4, resamples=10, seed=1)["pass@1"]
    assert (alone.low, alone.high) == (None, None)
    assert figures([], [1], samples=4, resamples=10, seed=1) == {}


def test_the_interval_is_that_of_the_normal_approximation():
    values = [1.0] * 120 + [0.0] * 280
    low, high = bootstrap_interval(values, resamples=4000, seed=3) or (0, 0)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.006) and high == pytest.approx(0.3 + half, abs=0.006)
    assert bootstrap_interval(values, resamples=50, seed=3) == bootstrap_interval(values, resamples=50, seed=3)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 12))
def test_more_tries_are_never_worse(right, k):
    samples, c = len(right), sum(right)
    values = [pass_at_k(samples, c, k) for k in range(1, samples + 1)]
    assert values == sorted(values) and values[0] == pytest.approx(c / samples)
    assert values[-1] == float(c > 0)
