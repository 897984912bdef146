"""Which file of a checkpoint is not as it was written, though its size is right.

torch stores a CRC-32 with every tensor and does not look at it when it reads: values that changed are loaded as they
are. Only where a file cannot be read at all, its checksums tell which one it was.
"""

import io
import zipfile
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

WRITTEN_BY_RANKS = ".distcp"
"""Files with this ending have the tensors: gigabytes, in pieces with checksums."""


def find_damaged(path: Path) -> tuple[str, str] | None:
    """(name, what is wrong) of the first file with a piece that is not as written, None without one.

    Reads all of them, in turns of the ranks. Collective over all ranks. Cost in memory: the largest piece, which is
    what a rank has of a tensor.
    """
    pieces: dict[str, list[tuple[int, int]]] = {}
    for info in FileSystemReader(path).read_metadata().storage_data.values():
        pieces.setdefault(info.relative_path, []).append((info.offset, info.length))
    every: list[list[tuple[str, str]]] = [[] for _ in range(dist.get_world_size())]
    mine = sorted(pieces)[dist.get_rank() :: len(every)]
    dist.all_gather_object(every, [(name, wrong) for name in mine if (wrong := _defect(path / name, pieces[name]))])
    return min((found for part in every for found in part), default=None)


def _defect(file: Path, pieces: list[tuple[int, int]]) -> str | None:
    with file.open("rb") as stream:
        for offset, length in sorted(pieces):
            stream.seek(offset)
            try:
                with zipfile.ZipFile(io.BytesIO(stream.read(length))) as archive:
                    wrong = archive.testzip()
            except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
                return f"at byte {offset}: {error}"
            if wrong is not None:
                return f"at byte {offset}: {wrong} is not as it was written"
    return None
