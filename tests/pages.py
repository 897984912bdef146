"""The blocks of the README and of docs/: who runs each, and running them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.DOTALL)


class Block(NamedTuple):
    mark: str
    """Who runs it, or `needs: ` and what it needs; empty where nothing says so."""
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """The page's blocks of shell and Python, in order."""
    return [Block(mark or "", language, code) for mark, language, code in BLOCK.findall(page.read_text())]


def run_shell(code: str, folder: Path) -> None:
    """Run a block as the reader would, in `folder`; neither an error nor a warning passes."""
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert "Warning" not in done.stderr, f"{code}\n{done.stderr}"
