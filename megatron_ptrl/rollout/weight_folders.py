"""A new folder for each version of the weights: servers that keep a path's content would go on with old ones."""

import os
import secrets
import shutil
from pathlib import Path

from megatron_ptrl.errors import InputError

KEPT = 2
"""Folders that stay: servers may still map the files of the last but one."""


class WeightFolders:
    """The folders in `parent`, as the rank that writes sees them."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent

    def begin(self, version: int) -> Path:
        """An empty folder with a hidden name that no earlier run used. Raises InputError."""
        # A run that was killed may come to the same version again, with other weights.
        partial = self._parent / f".v{version:08d}-{secrets.token_hex(3)}.partial"
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise InputError(
                f"rollout.server.weights: {partial}: {error.strerror}; expected a folder to write to"
            ) from error
        return partial

    def finish(self, partial: Path) -> Path:
        """Give the folder its name, now that it is whole, and remove all but the last `KEPT`."""
        folder = partial.with_name(partial.name[1:].removesuffix(".partial"))
        os.replace(partial, folder)
        folders = sorted(self._parent.glob("v*-*"), key=lambda path: path.stat().st_mtime_ns)
        for old in [*folders[:-KEPT], *self._parent.glob(".v*.partial")]:
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return folder
