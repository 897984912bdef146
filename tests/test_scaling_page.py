"""docs/scaling.md has the tables that the formulas give, and its commands work."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder on the path, here and in processes that are started here."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def filled(rank: int, world_size: int, pages: list[str]) -> list[str]:
    import layouts

    return [layouts.filled(page) for page in pages]


def test_the_page_has_the_tables_of_the_formulas(ranks, benchmarks):
    changed = PAGE.replace("`n*(28 + k*z)`", "`n*(32 + k*z)`")
    assert changed != PAGE
    ((made, repaired),) = ranks.run(1, filled, [PAGE, changed])
    assert made == PAGE, "python benchmarks/layouts.py --write brings the page up to date"
    assert repaired == PAGE


def test_the_counter_says_how_a_case_compares(benchmarks, capsys):
    import collectives

    assert collectives.main(["dp"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("dp: 2 ranks, as predicted\n")
    assert re.search(r"dp cp +reduce-scatter +[\d,]+ bytes x 1 +Megatron-Core", printed)
    assert printed.endswith("1 cases, 0 not as predicted\n")


def test_the_number_of_cases_on_the_page_is_that_of_the_counter(benchmarks):
    from collective_cases import CASES

    assert {int(n) for n in re.findall(r"all (\d+) (?:without|cases)", PAGE)} == {len(CASES)}
