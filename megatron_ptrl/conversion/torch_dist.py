"""Megatron's sharded checkpoints (torch_dist), a tensor at a time and without ranks or a model.

`dist_checkpointing` copies everything it saves into memory first; torch's file writer, which lies beneath it, asks for
one tensor after the other, and its reader for any part of one.
"""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ptrl.errors import InputError

COMMON = "common.pt"
METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor of the checkpoint: from `offsets` on, `sizes` of its `shape`."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype


def write(
    folder: Path,
    groups: Sequence[Sequence[Part]],
    read: Callable[[Part], Tensor],
    *,
    objects: Sequence[tuple[str, Any]] = (),
    common: dict[str, Any],
) -> None:
    """Write a checkpoint into `folder`, a file for each of `groups`.

    read: gives the values of a part, of its `sizes`, when their turn has come
    objects: (name, value) of what is kept by name and is no tensor; BytesIO for one as another checkpoint has it
    common: what is the same on every rank
    Cost in memory: the largest tensor, and those of a group that have different keys: a layer's. Raises OSError.
    """
    planner = _SavePlanner(read, dict(objects))
    plans = [SavePlan([_write_item(part) for part in group]) for group in groups]
    plans.append(SavePlan([WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name, _ in objects]))
    plans, metadata = create_default_global_save_plan([plan for plan in plans if plan.items])
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(True)
    results = []
    for plan in writer.prepare_global_plan(plans):
        future: Future[Any] = writer.write_data(plan, planner)  # type: ignore[assignment]
        results.append(future.result() if isinstance(future, Future) else future.wait())
    writer.finish(metadata, results)
    with (folder / COMMON).open("wb") as stream:
        torch.save(common, stream)
    save_config(CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1), str(folder))


def _write_item(part: Part) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=part.dtype), torch.Size(part.shape))
    return WriteItem(MetadataIndex(part.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, read: Callable[[Part], Tensor], objects: dict[str, Any]) -> None:
        super().__init__()
        self._read, self._objects = read, objects

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.tensor_data is None:
            value = self._objects[write_item.index.fqn]
            if isinstance(value, io.BytesIO):
                return value
            stream = io.BytesIO()
            torch.save([value], stream)  # a list, as Megatron-Core packs them
            return stream
        data = write_item.tensor_data
        offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
        part = Part(write_item.index.fqn, tuple(data.size), offsets, sizes, data.properties.dtype)
        tensor = self._read(part)
        assert tuple(tensor.shape) == part.sizes and tensor.dtype == part.dtype, part
        return tensor


class Reader:
    """A checkpoint's tensors by key. Raises InputError where its metadata cannot be read.

    The metadata is pickled, as torch writes it: read only checkpoints that you trust.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, EOFError, ValueError, AttributeError) as error:
            raise InputError(
                f"{folder / METADATA} cannot be read ({error}); expected a checkpoint of Megatron's torch_dist format"
            ) from error
        self._reader.set_up_storage_reader(self._metadata, True)
        stored = self._metadata.state_dict_metadata
        self.tensors = {
            key: (tuple(told.size), told.properties.dtype)
            for key, told in stored.items()
            if isinstance(told, TensorStorageMetadata)
        }
        """(shape, type) of each."""
        self.objects = {key for key, told in stored.items() if isinstance(told, BytesStorageMetadata)}
        """Names of what is no tensor."""

    def pieces(self, key: str) -> list[Part]:
        """The parts that a tensor was written in."""
        told = self._metadata.state_dict_metadata[key]
        assert isinstance(told, TensorStorageMetadata)
        shape, dtype = self.tensors[key]
        return [Part(key, shape, tuple(chunk.offsets), tuple(chunk.sizes), dtype) for chunk in told.chunks]

    def read(self, part: Part) -> Tensor:
        """The values of a part. Cost in memory: them, and the largest piece that one rank wrote of the tensor.

        Raises InputError where files are missing or cut short, or do not have all of it.
        """
        told = self._metadata.state_dict_metadata[part.key]
        assert isinstance(told, TensorStorageMetadata)
        chunk = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
        items = create_read_items_for_chunk_list(part.key, told, [chunk])
        covered = sum(item.lengths.numel() for item in items)
        if covered != chunk.sizes.numel():
            raise InputError(f"{self.folder} has {covered} of the {chunk.sizes.numel()} values of {part.key}")
        target = torch.empty(part.sizes, dtype=part.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _LoadPlanner(target))
        except (OSError, RuntimeError, EOFError) as error:
            raise InputError(f"{self.folder}: {part.key} cannot be read: {error}") from error
        return target

    def read_object(self, name: str) -> io.BytesIO:
        """The bytes of what is no tensor."""
        index, none = MetadataIndex(name), torch.Size([0])
        planner = _LoadPlanner(torch.empty(0))
        self._reader.read_data(LoadPlan([ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none)]), planner)
        return planner.bytes


def copy(
    reader: Reader,
    folder: Path,
    common: dict[str, Any],
    wanted: Callable[[str], bool],
    *,
    objects: Sequence[tuple[str, Any]],
) -> None:
    """The tensors of a checkpoint that are `wanted`, cut as they were, into the empty `folder`.

    objects, common: as of `write`   Cost in memory: the largest piece that one rank wrote. Raises InputError, OSError.
    """
    groups = [reader.pieces(key) for key in reader.tensors if wanted(key)]
    write(folder, groups, reader.read, objects=objects, common=common)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target
        self.bytes = io.BytesIO()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for dim, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, begin, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # `resolve_tensor` gave a view

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.bytes = value
