"""Raw files -> `Document`s, one at a time.

    files or folders  ->  find_files  ->  read_documents  ->  Document
                                               |
                                               +--> Rejects: records that could not be read, by reason, file and line

A bad record is put aside and the run goes on; a file that cannot be read to its end (a truncated archive, no such
column) stops it, because nobody knows how much would be lost.
"""

import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_ptrl.errors import InputError
from megatron_ptrl.records import Document

TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
COMPRESSED = ("", ".gz", ".zst")
SUFFIXES = tuple(text + packed for text in TEXT_SUFFIXES for packed in COMPRESSED) + (".parquet",)
OUTPUT_SUFFIXES = (".tokenizer.json", ".rejects.jsonl", ".json")


class Rejects:
    """Counts bad records by reason and writes one JSON line for each: file, line (from 1), reason.

    `path=None` only counts. With `strict` the first bad record raises InputError instead.
    """

    def __init__(self, path: Path | None = None, strict: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self._strict = strict
        self._file = path.open("w", encoding="utf-8") if path else None

    def add(self, source: str, line: int, reason: str) -> None:
        """Put one record aside."""
        if self._strict:
            raise InputError(f"{source}:{line}: {reason}; mend it, or drop --strict to put such records aside")
        self.counts[reason] += 1
        if self._file:
            self._file.write(json.dumps({"file": source, "line": line, "reason": reason}) + "\n")

    def __enter__(self) -> "Rejects":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file:
            self._file.close()


def find_files(inputs: Iterable[str], output: str = "") -> list[Path]:
    """The files to read: those named, and those with a known suffix in the folders named, sorted, at any depth.

    What a tokenization wrote beside its `.bin/.idx` (metadata, tokenizer, rejects) is no corpus: it is passed over
    in a folder. `output` is the prefix about to be written.
    Raises InputError for a missing path, an unknown suffix, or when nothing is found.
    """
    found: list[Path] = []
    named = list(inputs)
    for name in named:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in _walk(path) if file.is_file())
            found += [file for file in inside if file.name.endswith(SUFFIXES) and not _is_output(file, output)]
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: unknown kind of file; expected one of {' '.join(SUFFIXES)}")
        else:
            found.append(path)
    if not named:
        raise InputError("no input was given; expected files or folders")
    if not found:
        raise InputError(f"no input files in {', '.join(named)}; expected {' '.join(SUFFIXES)}")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below it. Raises InputError for a folder that cannot be read, which Path.rglob passes over."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; give this user the right to it, or leave it out")

    for root, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(root, name) for name in names)


def _is_output(file: Path, output: str) -> bool:
    for suffix in OUTPUT_SUFFIXES:
        prefix = str(file).removesuffix(suffix)
        if prefix != str(file) and (
            Path(prefix + ".idx").exists() or os.path.abspath(prefix) == os.path.abspath(output)
        ):
            return True
    return False


def read_documents(
    files: Iterable[Path],
    text_field: str,
    rejects: Rejects,
    on_bytes: Callable[[int], None] = lambda bytes_read: None,
) -> Iterator[Document]:
    """Stream the documents of `files` in order; `on_bytes` hears how far it is, in bytes on disk over all files.

    A JSONL file's blank lines are skipped. A byte-order mark is dropped.
    Raises InputError for a file that cannot be read to its end.
    """
    done = 0
    for file in files:
        try:
            size = file.stat().st_size
            with file.open("rb") as raw:
                for document, position in read_stream(str(file), raw, size, text_field, rejects):
                    on_bytes(done + position)
                    yield document
        except OSError as error:
            raise InputError(f"{file}: {error.strerror or error}") from error
        done += size
        on_bytes(done)


def read_stream(
    name: str, raw: IO[bytes], size: int, text_field: str, rejects: Rejects, *, with_fields: bool = False
) -> Iterator[tuple[Document, int]]:
    """The documents of one file, open as `raw`, each with the bytes on disk read so far of its `size`.

    `name` tells the kind of file by its suffix, and stands in the documents and rejects. `with_fields` keeps the
    other fields of a record. Raises InputError for a file that cannot be read to its end.
    """
    try:
        for document, position in _read_file(name, raw, size, text_field, rejects, with_fields):
            reason = _reason_against(document.text)
            if reason:
                rejects.add(document.source, document.line, reason)
            else:
                yield document, position
    except (EOFError, zlib.error) as error:
        raise InputError(f"{name}: damaged archive ({error}); nothing was written") from error


def _reason_against(text: str) -> str | None:
    if not text.strip():
        return "empty document"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "lone surrogate in the text"
    return None


def _read_file(
    name: str, raw: IO[bytes], size: int, text_field: str, rejects: Rejects, with_fields: bool
) -> Iterator[tuple[Document, int]]:
    suffixes = Path(name).suffixes
    if suffixes[-1] == ".parquet":
        yield from _read_parquet(name, raw, size, text_field, rejects, with_fields)
        return
    with uncompressed(name, raw) as stream:
        if ".txt" in suffixes[-2:]:
            for document in _read_txt(name, stream, rejects):
                yield document, size
        else:
            for document in _read_jsonl(name, stream, text_field, rejects, with_fields):
                yield document, raw.tell()


def uncompressed(name: str, raw: IO[bytes]) -> IO[bytes]:
    """`raw`, or what it holds when `name` ends in .gz or .zst."""
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(name, raw), buffer_size=1 << 20)
    return raw


class _ZstdStream(io.RawIOBase):
    """Every frame of a .zst file; zstandard's own reader stops after one, and takes a truncated one for its end."""

    def __init__(self, name: str, raw: IO[bytes]) -> None:
        self._zstandard = _import_extra("zstandard", name)
        self._raw = raw
        self._packed = b""
        self._plain = b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._raw.read(1 << 17)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends within a zstd frame")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._plain = self._frame.decompress(packed)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count


def _read_txt(name: str, stream: IO[bytes], rejects: Rejects) -> Iterator[Document]:
    content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rejects.add(name, content.count(b"\n", 0, error.start) + 1, "invalid UTF-8")
        return
    yield Document(text, name, 1)


def _read_jsonl(
    name: str, stream: IO[bytes], text_field: str, rejects: Rejects, with_fields: bool
) -> Iterator[Document]:
    for line, content in enumerate(stream, start=1):
        try:
            record = content.decode("utf-8-sig" if line == 1 else "utf-8")
            if not record.strip():
                continue
            value = json.loads(record)
        except UnicodeDecodeError:
            rejects.add(name, line, "invalid UTF-8")
        except (ValueError, RecursionError):
            rejects.add(name, line, "not JSON")
        else:
            if not isinstance(value, dict):
                rejects.add(name, line, "not a JSON object")
            elif text_field not in value:
                rejects.add(name, line, f"no field {text_field!r}")
            elif not isinstance(value[text_field], str):
                rejects.add(name, line, f"field {text_field!r} is not a string")
            else:
                text = value.pop(text_field)
                yield Document(text, name, line, value if with_fields else {})


def _read_parquet(
    name: str, raw: IO[bytes], size: int, text_field: str, rejects: Rejects, with_fields: bool
) -> Iterator[tuple[Document, int]]:
    _import_extra("pyarrow", name)
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(raw)
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise InputError(f"{name}: no column {text_field!r}; it has {', '.join(columns)}; set --text_field")
        others = [column for column in columns if with_fields and column != text_field]
        for batch in table.iter_batches(batch_size=256, columns=[text_field, *others]):
            for index, scalar in enumerate(batch.column(text_field)):
                row += 1
                try:
                    value = scalar.as_py()
                    fields = {other: _value_of(batch.column(other)[index]) for other in others}
                except UnicodeDecodeError:
                    rejects.add(name, row, "invalid UTF-8")
                    continue
                if isinstance(value, str):
                    yield Document(value, name, row, fields), size * row // table.metadata.num_rows
                else:
                    rejects.add(name, row, f"field {text_field!r} is not a string")
    except pyarrow.ArrowException as error:
        raise InputError(f"{name}: damaged Parquet after row {row} ({error})") from error


def _value_of(scalar: Any) -> Any:
    """As Python has it; a time that it cannot hold (nanoseconds, the year 9,999,999) as the number that is stored."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError):
        if hasattr(scalar, "keys"):
            return {name: _value_of(value) for name, value in scalar.items()}
        return list(map(_value_of, scalar.values)) if hasattr(scalar, "values") else scalar.value


def _import_extra(package: str, name: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise InputError(f"{name}: reading it needs {package}; pip install megatron-ptrl[data]") from error
