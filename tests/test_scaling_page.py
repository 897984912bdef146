"""docs/scaling.md has the tables that the formulas give, and its commands work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder on the path, here and in the pool's processes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def filled(rank: int, world_size: int, page: str) -> str:
    import layouts

    return layouts.filled(page)


def test_the_page_has_the_tables_of_the_formulas(ranks, benchmarks):
    (made,) = ranks.run(1, filled, PAGE)
    assert made == PAGE, "python benchmarks/layouts.py --write brings the page up to date"


def test_a_table_that_was_changed_by_hand_is_seen(ranks, benchmarks):
    changed = PAGE.replace("`n*(28 + k*z)`", "`n*(32 + k*z)`")
    assert changed != PAGE
    assert ranks.run(1, filled, changed) == [PAGE]


def test_the_counter_says_how_a_case_compares():
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "collectives.py"), "dp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("dp: 2 ranks, as predicted\n")
    assert re.search(r"dp cp +reduce-scatter +[\d,]+ bytes x 1 +Megatron-Core", done.stdout)
    assert done.stdout.endswith("1 cases, 0 not as predicted\n")


def test_the_number_of_cases_on_the_page_is_that_of_the_counter():
    cases = (ROOT / "benchmarks" / "collective_cases.py").read_text()
    count = len(re.findall(r"^    \"[^\"]+\": Case\(", cases, re.M))
    assert {int(n) for n in re.findall(r"all (\d+) (?:without|cases)", PAGE)} == {count}
