"""Files of safetensors, a tensor at a time: the length of a JSON header, the header, the tensors end to end.

a folder of model.safetensors, or of its parts and their index  <-->  names, types, shapes, and the tensors in turn
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ptrl.errors import InputError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_LENGTH = 8


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Stored(Described):
    """A tensor and where it is."""

    path: Path
    begin: int

    def read(self) -> Tensor:
        """The tensor, the only copy of it in memory. Raises InputError when the file has become shorter."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        with self.path.open("rb") as stream:
            stream.seek(self.begin)
            if stream.readinto(buffer.numpy().data) != self.nbytes:
                raise InputError(f"{self.path}: {self.name} ends before its {self.nbytes} bytes")
        return buffer.view(self.dtype).view(self.shape)


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model by its name. Reads headers only.

    Raises InputError, naming file and tensor, for a folder without safetensors, an index that does not fit the files, a
    file that is cut short or longer than its header says, and a type other than F32, BF16 and F16.
    """
    if (folder / WHOLE).is_file():
        return read_header(folder / WHOLE)
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        instead = f"; {pickled[0]} is pickled, save the model as safetensors" if pickled else ""
        raise InputError(f"{folder} has neither {WHOLE} nor {INDEX}{instead}")
    try:
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX}: expected a weight_map of tensors to files ({error})") from error
    found: dict[str, Stored] = {}
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / INDEX} names {file}, which is not there")
        for name, stored in read_header(folder / file).items():
            if places.get(name) != file:
                raise InputError(f"{folder / file} has {name}, which {INDEX} says is in {places.get(name)}")
            found[name] = stored
    for name in places:
        if name not in found:
            raise InputError(f"{folder / places[name]} has no {name}, which {INDEX} says it has")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises InputError as `open_folder`."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH), "little")
        if size < _LENGTH or _LENGTH + length > size:
            raise InputError(f"{path} is cut short: {size} bytes, and its header alone is said to have {length}")
        text = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _stored(name, told, path, _LENGTH + length) for name, told in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its header is not one of safetensors ({error})") from error
    end = max((stored.begin + stored.nbytes for stored in found.values()), default=_LENGTH + length)
    if end != size:
        raise InputError(f"{path} has {size} bytes, and its tensors end at {end}; it was cut short or added to")
    return found


def _stored(name: str, told: dict[str, Any], path: Path, base: int) -> Stored:
    if told["dtype"] not in _DTYPES:
        raise InputError(f"{path}: {name} is of type {told['dtype']}; expected one of {', '.join(_DTYPES)}")
    begin, end = told["data_offsets"]
    stored = Stored(name, tuple(told["shape"]), _DTYPES[told["dtype"]], path, base + begin)
    if end - begin != stored.nbytes:
        raise InputError(f"{path}: {name} has {end - begin} bytes, and its shape {stored.shape} takes {stored.nbytes}")
    return stored


def write(
    folder: Path, described: Sequence[Described], tensors: Iterator[Tensor], shard_bytes: int | None = None
) -> None:
    """Write `tensors`, which come in the order of `described`, as they come.

    shard_bytes: more than these go into several files with an index, a larger tensor into one of its own; None for one
    Raises OSError.
    """
    shards = _shards(described, shard_bytes)
    names = [WHOLE] if len(shards) == 1 else [_part(i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as stream:
            stream.write(_header(shard))
            for each in shard:
                tensor = next(tensors)
                assert tuple(tensor.shape) == each.shape and tensor.dtype == each.dtype, each.name
                stream.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        places = {each.name: name for name, shard in zip(names, shards, strict=True) for each in shard}
        index = {"metadata": {"total_size": sum(each.nbytes for each in described)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _part(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _shards(described: Sequence[Described], shard_bytes: int | None) -> list[list[Described]]:
    shards: list[list[Described]] = [[]]
    size = 0
    for each in described:
        if shard_bytes is not None and shards[-1] and size + each.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.nbytes
    return shards


def _header(shard: Sequence[Described]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in shard:
        begin, end = end, end + each.nbytes
        header[each.name] = {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH, "little") + text
