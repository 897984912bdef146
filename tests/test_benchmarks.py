"""Every benchmark that `make bench` runs works, at a size that takes seconds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "loss.py": ["--tokens", "8", "--vocab", "512", "--rounds", "1", "--no-memory"],
    "linear_head.py": ["--tokens", "32", "--vocab", "512", "--hidden", "16", "--rounds", "1"],
    "training.py": ["--vocab", "512", "--hidden", "64", "--layers", "1", "--seq_length", "32", "--steps", "1"],
    "score.py": ["--vocab", "512", "--hidden", "64", "--layers", "1", "--seq_length", "32", "--rounds", "1"],
    "data.py": ["--documents", "200", "--vocab", "512", "--megabytes", "0.5", "--rounds", "1", "--memory", "0.2"],
    "rollout.py": ["--vocab", "512", "--hidden", "64", "--layers", "1", "--batch", "2", "--tokens", "8", "--rounds=1"],
    "segment.py": ["--documents", "512", "--megabytes", "0.2", "--rounds", "1"],
}


def test_no_benchmark_is_left_out():
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    assert all(f"benchmarks/{name}" in makefile for name in SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_benchmark_prints_a_table_and_writes_its_figures(name, tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / name), *SMALL[name], "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.dumps(json.loads(output.read_text()))
    assert "512" in figures and "ms" in done.stdout
    if name == "training.py":
        assert re.search(r"^# policy loss, responses packed: \d+\.\d+ times reward shaped, plain", done.stdout, re.M)
