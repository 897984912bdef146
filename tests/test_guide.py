"""Every block of the README and of docs/guide/ is run here, run by CI, or says what it needs."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from pages import ROOT, blocks, run_shell

# In the order in which a reader comes to them: each goes on with what those before it wrote.
PAGES = ("README.md", *(f"docs/guide/{name}.md" for name in ("training", "reference", "thinking", "reinforcement")))
BLOCKS = list(dict.fromkeys(block for page in PAGES for block in blocks(ROOT / page)))
HERE = "run by tests/test_guide.py"
ELSEWHERE = (
    "run by CI",
    "make test: run by CI; make quickstart: by tests/test_quickstart.py, shortened",
    "run by tests/test_benchmarks.py, at a small size",
    "run by tests/test_quickstart.py, shortened: TPT",
    "run by tests/test_quickstart.py, shortened: RLPT",
    "run by tests/test_flywheel.py, at its smallest",
    "run by tests/test_tpt_example.py, at its smallest",
    "run by tests/test_rlpt_example.py, at its smallest",
)


def test_every_block_says_who_runs_it() -> None:
    assert set(PAGES[1:]) == {str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "guide").iterdir()}
    assert len(BLOCKS) >= 20
    for mark, _, code in BLOCKS:
        assert mark in (HERE, *ELSEWHERE) or mark.startswith("needs: "), f"unmarked block:\n{code}"


def test_python_blocks_run_and_the_equivalence_holds() -> None:
    names: dict = {}
    for mark, language, code in BLOCKS:
        if language == "python" and mark == HERE:
            exec(code, names)
    torch.testing.assert_close(names["loss"], names["expected"])


@pytest.mark.slow
def test_shell_blocks_run(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    modules = sorted(Path(os.__file__).parent.glob("[ab]*.py"))
    for module in modules[::2]:
        (tmp_path / "corpus" / f"{module.stem}.txt").write_text(module.read_text())
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as more:
        for module in modules[1::2]:
            more.write(json.dumps({"text": module.read_text()}) + "\n")
    for mark, language, code in BLOCKS:
        if language == "bash" and mark == HERE:
            run_shell(code, tmp_path)
    plots = {path.name for path in (tmp_path / "comparison").glob("*.png")}
    assert {"loss.png", "ce.png", "entropy.png"} <= plots
