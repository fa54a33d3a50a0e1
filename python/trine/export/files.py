"""Files that are whole or not there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def written_beside(path: str | PathLike) -> Iterator[Path]:
    """A path of the same name in a folder beside, from where all files move to `path`'s folder.

    They move when the block ends; where it raises, nothing does.
    """
    path = Path(path).resolve()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        yield part
        # The file itself comes last: what it refers to is there already.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == part):
            file.replace(path.parent / file.name)
