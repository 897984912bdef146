"""Corpora for `ptrl think`, its settings at a test's pace, and what it wrote."""

import json
from pathlib import Path
from typing import Any

from megatron_ptrl.config import ExecutorConfig, ServerConfig, ThinkConfig


def write_corpus(path: Path, count: int, *, first: int = 0, poison: int | None = None) -> Path:
    """Documents whose first word is their id, which the stub server logs; number `poison` fails there every time."""
    with path.open("w", encoding="utf-8") as stream:
        for i in range(first, first + count):
            name = f"poison{i}" if i == poison else f"d{i}"
            record = {"id": name, "text": f"{name} " + "some words " * (i % 7), "domain": ("maths", "law")[i % 2]}
            stream.write(json.dumps(record) + "\n")
    return path


def think_config(inputs: list[Path], output: Path, urls: list[str], **changed: Any) -> ThinkConfig:
    """Settings that retry within milliseconds; keyword arguments go to whichever part of the settings has the field."""
    changed = {"then_assemble": False} | changed
    server: dict[str, Any] = {"model": "m", "backoff": 0.01, "timeout": 60.0, "patience": 120.0, "in_flight": 8}
    parts: dict[str, Any] = {"server": ServerConfig, "executor": ExecutorConfig}
    given: dict[str, dict[str, Any]] = {"server": server, "executor": {}}
    for part, kind in parts.items():
        given[part] |= {name: changed.pop(name) for name in list(changed) if name in kind.__dataclass_fields__}
    return ThinkConfig(
        input=[str(path) for path in inputs],
        output=str(output),
        servers=urls,
        **{part: kind(**given[part]) for part, kind in parts.items()},
        **changed,
    )


def read_lines(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The objects of all files, in order."""
    return [json.loads(line) for path in sorted(folder.glob(pattern)) for line in path.open(encoding="utf-8")]


def thoughts(output: Path) -> list[dict[str, Any]]:
    return read_lines(output, "thoughts/*.jsonl")


def rejects(output: Path) -> list[dict[str, Any]]:
    return read_lines(output, "rejects/*.jsonl")


def contents(output: Path) -> dict[str, bytes]:
    """Thoughts, rejects and training set by file name."""
    folders = (output / "thoughts", output / "rejects", output)
    files = [path for folder in folders for path in folder.glob("*") if path.is_file() and path.name != "plan.json"]
    return {path.name: path.read_bytes() for path in files}
