"""Text to measure with that every machine has: pieces of the Python standard library."""

import random
import sysconfig
from pathlib import Path


def read_library(chosen: random.Random) -> str:
    """600 of its files, end to end, in an order of `chosen`."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    chosen.shuffle(paths)
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths[:600])


def piece(library: str, chosen: random.Random, length: int) -> str:
    """Some of the library, half to one and a half times `length` characters."""
    begin = chosen.randrange(len(library) - 2 * length)
    return library[begin : begin + length // 2 + chosen.randrange(length)]
