"""The most memory that `ptrl think` and `ptrl assemble` take for a corpus of one large file, all processes together.

The commands run as a user would start them, the assembly training its vocabulary; the server, which is no part of them,
is not counted.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(megabytes: float, workers: int) -> list[dict[str, Any]]:
    """For each command its name, the MB it read, seconds, and the peak in MB."""
    from think_rate import answering

    with tempfile.TemporaryDirectory() as name, answering() as url:
        corpus, out = Path(name) / "corpus.jsonl", Path(name) / "out"
        write_corpus(corpus, megabytes)
        # A server that always thinks the same would be put aside as one that runs in a loop.
        think = ["think", "--input", str(corpus), "--output", str(out), "--servers", url, "--server.model", "m"]
        assemble = ["assemble", "--input", str(out / "thoughts"), "--output", str(out / "train")]
        return [
            watched([*think, "--then_assemble", "false"], corpus),
            watched(
                [*assemble, "--filters.max_compression", "0", "--workers", str(workers)],
                out / "thoughts" / "00000.jsonl",
            ),
        ]


def write_corpus(path: Path, megabytes: float) -> None:
    """Documents of 4,000 characters on average, pieces of the Python standard library, in one file."""
    from library_text import piece, read_library

    chosen = random.Random(1)
    library = read_library(chosen)
    size = count = 0
    with path.open("wb") as stream:
        while size < megabytes * 1e6:
            record = {"id": str(count), "text": piece(library, chosen, 4000), "domain": "code"}
            size += stream.write(json.dumps(record).encode() + b"\n")
            count += 1


def watched(command: list[str], read: Path) -> dict[str, Any]:
    """One `ptrl` command, from its start to its end."""
    from process_watch import Watch

    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "megatron_ptrl", *command])
    with Watch(process.pid) as watch:
        code = process.wait()
    if code:
        raise SystemExit(f"ptrl {command[0]} ended with {code}")
    return {
        "command": f"ptrl {command[0]}",
        "megabytes": read.stat().st_size / 1e6,
        "seconds": time.perf_counter() - start,
        "peak": watch.peak,
    }
