"""New folders that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def refuse_existing(path: Path) -> None:
    """FileExistsError if something is there, be it a dangling link."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path}: exists already; expected a new folder")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, `PATH.partial`, which becomes `path` when the block ends without an error.

    What a killed attempt left there is removed first; an error leaves nothing.  Raises
    FileExistsError if `path` is there already.
    """
    target = Path(path)
    refuse_existing(target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _fsync(file)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
