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


def find_damaged(path: Path) -> str | None:
    """The first file with a piece whose checksum is wrong, None without one. Reads all of them, in turns of the ranks.

    Collective over all ranks. Cost in memory: the largest piece, which is what a rank has of a tensor.
    """
    pieces: dict[str, list[tuple[int, int]]] = {}
    for info in FileSystemReader(path).read_metadata().storage_data.values():
        pieces.setdefault(info.relative_path, []).append((info.offset, info.length))
    every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    mine = sorted(pieces)[dist.get_rank() :: len(every)]
    dist.all_gather_object(every, [name for name in mine if not _is_whole(path / name, pieces[name])])
    return min((name for part in every for name in part), default=None)


def _is_whole(file: Path, pieces: list[tuple[int, int]]) -> bool:
    with file.open("rb") as stream:
        for offset, length in sorted(pieces):
            stream.seek(offset)
            try:
                with zipfile.ZipFile(io.BytesIO(stream.read(length))) as archive:
                    if archive.testzip() is not None:
                        return False
            # What zipfile raises of bytes that are no archive any more: that is the answer to the question.
            except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError):
                return False
    return True
