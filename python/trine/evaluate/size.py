"""How big a model is, in memory and on disk."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; storage that several of them share counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def disk_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of the file at `path`, or of all files below it where it is a folder."""
    path = Path(path)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size
