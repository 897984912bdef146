"""`make quickstart`, shortened: from the standard library's text to a sample, on two processes."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 12


def quickstart(work: Path) -> str:
    done = subprocess.run(
        ["make", "quickstart", f"WORK_DIR={work}", f"ARGS=--steps {STEPS} --megabytes 1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=420,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def value(summary: str, name: str) -> float:
    found = re.search(rf"^{name} +([\d.]+)", summary, re.MULTILINE)
    assert found, f"no {name} in\n{summary}"
    return float(found[1])


@pytest.mark.slow
def test_quickstart_goes_from_text_to_a_sample_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    first = quickstart(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "ce" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["ce"] < steps[0]["ce"] - 0.3
    assert steps[-1]["loss"] != steps[-1]["ce"], "beta -0.25 is in force"
    assert 1 < value(first, "held-out perplexity") < 4096, "better than a uniform guess"
    assert 1 < value(first, "unigram perplexity") < 4096
    assert "sample, temperature" in first
    assert (tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}" / "run.json").exists()
    assert len(list((tmp_path / "run" / "plots").glob("*.png"))) == 8

    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    second = quickstart(tmp_path)
    assert "is complete" in second
    assert value(second, "held-out perplexity") == value(first, "held-out perplexity")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
