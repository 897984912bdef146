"""`run.py --small` of an example, as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples"


def run_small(name: str, work_dir: Path, *words: str) -> list[list[str]]:
    """The example with one seed; the cells of the table that it leaves in `work_dir`, row by row."""
    command = [sys.executable, str(FOLDER / name / "run.py"), "--small", "--seeds", "1", *words]
    done = subprocess.run(
        [*command, "--work_dir", str(work_dir)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (line for line in (work_dir / "table.md").read_text().splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
