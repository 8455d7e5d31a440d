"""Parameters on disk between stages: one Orbax checkpoint, whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class RunCheckpointError(ValueError):
    """A checkpoint of a run that is missing or cannot be read."""


def save_params(path: Path, params: Any) -> None:
    """Write params to `path`; a torn earlier attempt there is replaced.

    Orbax writes beside it and renames, so a kill leaves the old state or the new, never half.
    """
    path = path.absolute()
    if path.exists():
        shutil.rmtree(path)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)


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
