"""A training stage on its way: what a rerun goes on from, to the same bits.

    metrics.jsonl      a row a step
    progress-400/      parameters or adapter, optimiser, average, value head, after 400 steps
    progress.json      {"step": 400, "place": the batches' iterator, "metrics": bytes of its rows}

progress.json is written last and names a folder that is whole; the one before it is removed after.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

from mdpo_jax import hosts
from mdpo_jax.pipeline.files import read_json, write_json
from mdpo_jax.reporting.metrics import iterate_metrics
from mdpo_jax.training import checkpoint
from mdpo_jax.training.state import TrainState

METRICS, NOTE = "metrics.jsonl", "progress.json"


class Progress:
    """Of the stage in `folder`, kept every so many of its `total` steps; every=0: never.

    A trainer's `saves`: all processes call, and each writes what it holds.
    """

    def __init__(self, folder: Path, every: int, total: int):
        self.folder, self._every, self._total = folder, every, total

    @functools.cached_property
    def _note(self) -> dict[str, Any]:
        return hosts.by_first(self._found)

    def _found(self) -> dict[str, Any]:
        nothing = {"step": 0, "place": None, "metrics": 0}
        note = self.folder / NOTE
        found = read_json(note) if note.exists() else nothing
        metrics = self.folder / METRICS
        rows = metrics.stat().st_size if metrics.exists() else 0
        whole = rows >= found["metrics"] and _state(self.folder, found["step"]).is_dir()
        return found if whole else nothing

    @property
    def steps(self) -> int:
        """How many steps were made; 0 where nothing was kept."""
        return self._note["step"]

    def begin(self) -> None:
        """Cut the metrics back to the rows of those steps, once, before more are written."""
        path = self.folder / METRICS
        if self.steps:
            os.truncate(path, self._note["metrics"])
        else:
            (self.folder / NOTE).unlink(missing_ok=True)  # of rows that are gone
            path.unlink(missing_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """Metrics of those steps."""
        if not self.steps:
            return []
        return [r for r in iterate_metrics(self.folder / METRICS) if r["step"] < self.steps]

    def restore(self, like: TrainState) -> tuple[TrainState, Any]:
        """The state after them, and where the batches' iterator stood."""
        state = checkpoint.load_params(_state(self.folder, self.steps), like)
        return state, self._note["place"]

    def after(self, step: int, state: TrainState, place: Any) -> None:
        """Keep the state, when it is time; OSError when the disk is full."""
        if not self._every or step % self._every or step >= self._total:
            return
        path = _state(self.folder, step)
        try:
            checkpoint.save_params(path, state)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}, at step {step}; what is done until then is kept (fewer saves: "
                "a larger train.save_every, none: 0)",
                error.filename,
            ) from error
        if hosts.first():
            with open(self.folder / METRICS, "rb") as rows:
                os.fsync(rows.fileno())
                size = os.fstat(rows.fileno()).st_size
            write_json(self.folder / NOTE, {"step": step, "place": place, "metrics": size})
            _remove(self.folder, but=path)


def finished(folder: Path) -> None:
    """Remove what a stage that is done needs no more."""
    if hosts.first():
        (folder / NOTE).unlink(missing_ok=True)
        _remove(folder)


def _state(folder: Path, step: int) -> Path:
    return folder / f"progress-{step}"


def _remove(folder: Path, but: Path | None = None) -> None:
    for path in folder.glob("progress-*"):
        if path != but:
            shutil.rmtree(path)
