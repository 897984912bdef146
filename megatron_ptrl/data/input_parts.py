"""Files and folders -> parts of a corpus -> records, and the folder that is of one corpus and one set of settings.

    list_inputs  ->  make_parts, of about as many megabytes  ->  read_part  ->  Document or Unreadable

A part is what a process works on: its output does not depend on who does it, nor when.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from megatron_ptrl.data.corpus import SUFFIXES, Rejects, find_files, read_stream
from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Document

Position = tuple[int, int]
"""File of the part, from 0; line or row in it, from 1."""


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    path: str
    """As fsspec takes it."""
    label: str
    """The path below what the user named: what documents without an id are called by."""
    size: int
    stamp: str = ""
    """Another one after the file was written: local, its time of modification; remote, what the store says of it."""


Part = tuple[InputFile, ...]


@dataclass(frozen=True)
class Unreadable:
    """A record that is no document."""

    source: str
    line: int
    why: str


def list_inputs(inputs: list[str], output: Path) -> list[InputFile]:
    """The files to read, in order; in a folder, what the output is of is passed over.

    Raises InputError for what is missing, of no known kind, or named and the output itself.
    """
    found: list[InputFile] = []
    own = os.path.realpath(output) + os.sep
    for name in inputs:
        if "://" in name:
            found += _list_remote(name)
        else:
            inside = os.path.isdir(name) and not (os.path.realpath(name) + os.sep).startswith(own)
            found += [
                file for file in _list_local(name) if not (inside and os.path.realpath(file.path).startswith(own))
            ]
    if not inputs:
        raise InputError("no input was given; expected files or folders")
    if not found:
        raise InputError(f"no input files in {', '.join(inputs)}; expected {' '.join(SUFFIXES)}")
    for file in found:
        if os.path.realpath(file.path.removeprefix("file://")).startswith(own):
            raise InputError(f"{file.path} is input and lies in the output folder; choose another output")
    return found


def _list_local(name: str) -> Iterator[InputFile]:
    for file in find_files([name]):
        label = file.relative_to(name) if Path(name).is_dir() else Path(file.name)
        told = file.stat()
        yield InputFile(str(file), label.as_posix(), told.st_size, str(told.st_mtime_ns))


def _list_remote(name: str) -> Iterator[InputFile]:
    try:
        system, root = fsspec.core.url_to_fs(name)
        files = sorted(file for file in system.find(root) if file.endswith(SUFFIXES))
        for file in files:
            label = file[len(root) :].strip("/") or file.rpartition("/")[2]
            yield InputFile(system.unstrip_protocol(file), label, system.size(file) or 0, str(system.ukey(file)))
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{name}: {error}") from error


def make_parts(files: list[InputFile], megabytes: float) -> list[Part]:
    """The files in their order, taken together up to `megabytes`; a larger file is a part of its own."""
    parts: list[Part] = []
    size = float("inf")
    for file in files:
        if size + file.size > megabytes * 1e6:
            parts.append(())
            size = 0
        parts[-1] += (file,)
        size += file.size
    return parts


def begin(output: Path, plan: dict[str, Any]) -> None:
    """Make the folder, with `plan` in plan.json. Raises InputError where it is there already, of another plan."""
    path = output / "plan.json"
    if path.exists():
        try:
            found = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}; expected the plan of the run that made it") from error
        different = [name for name in plan if found.get(name) != plan[name]]
        if different:
            raise InputError(f"{output} is of another {', '.join(different)}; remove it, or choose another output")
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(plan, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"output {output}: {error.strerror}") from error


class _Unreadables(Rejects):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Unreadable] = []

    def add(self, source: str, line: int, reason: str) -> None:
        self.found.append(Unreadable(source, line, reason))


def read_part(files: Iterable[InputFile], text_field: str) -> Iterator[tuple[Position, Document | Unreadable]]:
    """Every record of the part, in order. Raises InputError for a file that cannot be read to its end."""
    for number, file in enumerate(files):
        unreadable = _Unreadables()
        try:
            # A local name may hold what means something in a URL.
            with fsspec.open(file.path, "rb") if "://" in file.path else open(file.path, "rb") as raw:
                for document, _ in read_stream(file.path, raw, file.size, text_field, unreadable, with_fields=True):
                    yield from (((number, bad.line), bad) for bad in unreadable.found)
                    unreadable.found.clear()
                    yield (number, document.line), document
        except OSError as error:
            raise InputError(f"{file.path}: {error.strerror or error}") from error
        yield from (((number, bad.line), bad) for bad in unreadable.found)
