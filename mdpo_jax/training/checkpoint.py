"""Parameters on disk between stages: one Orbax checkpoint, whole or absent."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mdpo_jax import hosts


class RunCheckpointError(ValueError):
    """A checkpoint of a run that is missing or cannot be read."""


def save_params(path: Path, params: Any) -> None:
    """Write params to `path`; what an earlier attempt left there is removed first.

    Orbax writes beside it and renames, so a kill leaves nothing there or all of it.  Raises OSError
    when the disk is full.  Of several processes all must call, and each writes what it holds.
    """
    path = path.absolute()
    if hosts.first() and path.exists():
        shutil.rmtree(path)
    hosts.wait()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, params)
    except ValueError as error:  # tensorstore's word for every failure
        if "No space left" in str(error) or "ENOSPC" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


def load_params(path: Path, like: Any) -> Any:
    """Params from `path` with the shapes, types and shardings of `like` (arrays or abstract)."""
    path = path.absolute()
    if not path.is_dir():
        raise RunCheckpointError(f"checkpoint {path}: not found; expected a folder of parameters")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, abstract)
    except (ValueError, OSError, KeyError) as error:
        line = str(error).splitlines()[0]
        raise RunCheckpointError(f"checkpoint {path}: cannot be read ({line})") from error
