"""What the one-command entries promise: every target parses, the pins cover what the project needs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    """The direct dependencies, without the optional ones that need a GPU or an account."""
    sections = re.findall(r"^(dependencies|data|dev) = \[\n(.*?)^\]", PROJECT, flags=re.M | re.S)
    assert {name for name, _ in sections} == {"dependencies", "data", "dev"}
    found = [text for _, block in sections for text in re.findall(r'^  "([^"]+)"', block, flags=re.M)]
    return [text for text in found if not text.startswith("megatron-ptrl")]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "target, mentions",
    [
        (
            "quickstart",
            ["-m venv .venv", "-c constraints.txt", "--no-build-isolation -e", "examples/quickstart/run.py"],
        ),
        ("test", ["--no-build-isolation -e '.[dev]'", "-m pytest"]),
        ("lint", ["ruff check", "ruff format --check", "mypy", "clang-format --dry-run -Werror"]),
        ("bench", ["benchmarks/loss.py", "benchmarks/linear_head.py", "benchmarks/training.py", "benchmarks/score.py"]),
        ("gpu", ["torch.cuda.is_available()", "-m pytest -q -m gpu", "benchmarks/loss.py --device cuda"]),
        ("docs", ["--no-build-isolation -e '.[dev]'", "-m mkdocs build --strict", "--site-dir site"]),
        ("help", ["Makefile"]),
    ],
)
def test_target_parses(tmp_path, target, mentions):
    # Copied away from the stamps of this checkout, so that the set-up is in what make would do.
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    plan = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert [text for text in mentions if text not in plan] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_second_call_sets_nothing_up(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()

    def plan() -> str:
        return subprocess.run(["make", "-n", "bench"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "pip install" not in plan()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "new_kernel.cpp").touch()
    assert "pip install" in plan()


def test_ci_runs_lint_and_tests_only():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert re.findall(r"^make .*$", script, flags=re.M) == ["make lint", "make test"]


def test_constraints_pin_every_direct_dependency():
    pinned = {normal(line.split("==")[0]) for line in PINS}
    names = {normal(re.split(r"[\[>=<!~; ]", text)[0]) for text in requirements()}
    assert names - pinned == set()
    assert {"torch==2.13.0", "megatron-core==0.16.1"} <= set(PINS)


def test_constraints_are_exact_and_split_by_python_version():
    names: dict[str, list[str]] = {}
    for line in PINS:
        matched = re.fullmatch(r'([\w.-]+)==[\w.]+(?:; python_version (>=|<) "3\.11")?', line)
        assert matched, line
        names.setdefault(normal(matched[1]), []).append(matched[2] or "")
    only_older = {"async-timeout", "exceptiongroup", "tomli", "six"}
    assert all(sorted(kinds) in ([""], ["<", ">="]) or name in only_older for name, kinds in names.items())


def test_pyproject_has_lower_bounds_only():
    for text in requirements():
        assert re.fullmatch(
            r"[\w.-]+(\[\w+\])?>=[\d.]+(; (sys_platform == 'linux'|python_version >= '3.11'))?", text
        ), text
