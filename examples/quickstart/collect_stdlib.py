"""The standard library of the running Python -> a JSONL corpus, one module a line. No network.

    python collect_stdlib.py OUTPUT.jsonl [--megabytes 6] [--seed 1234]

Each line is {"text": ..., "source": "json/decoder.py"}.
"""

import argparse
import json
import random
import sysconfig
from pathlib import Path

# Installed packages, tests and their deliberately broken files are no sample of ordinary code.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "config"}


def modules(root: Path) -> list[Path]:
    """Python files below `root`, relative to it, sorted."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path for path in found if not SKIPPED.intersection(path.parts))


def collect(output: Path, megabytes: float, seed: int) -> tuple[int, int]:
    """Write modules in an order shuffled by `seed` until `megabytes` are full; returns (modules, bytes of text)."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = modules(root)
    random.Random(seed).shuffle(paths)
    count = size = 0
    with output.open("w", encoding="utf-8") as stream:
        for path in paths:
            if size >= megabytes * 1e6:
                break
            content = (root / path).read_bytes()
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                stream.write(json.dumps({"text": text, "source": path.as_posix()}) + "\n")
                count += 1
                size += len(content)
    return count, size


def main() -> None:
    """Parse the command line and collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("--megabytes", type=float, default=6.0, help="stop after about this much text (default 6)")
    parser.add_argument("--seed", type=int, default=1234, help="order of the modules")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    count, size = collect(arguments.output, arguments.megabytes, arguments.seed)
    print(f"{arguments.output}: {count} modules, {size / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main()
