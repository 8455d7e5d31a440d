"""Parameters that a training stage keeps on its way, for `explore.strategy=checkpoints`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdpo_jax.pipeline.context import PARAMS, Context

Keep = Callable[[int, Callable[[], Any]], None]


def path(folder: Path, share: float) -> Path:
    """Of the parameters after a share of a stage's steps; those at its end are the stage's own."""
    return folder / (PARAMS if share == 1 else f"{PARAMS}-{share:g}")


def keeper(context: Context, folder: Path, steps: int, base: Any) -> Keep:
    """A trainer's `keep` that saves what takes part in the next rollout; with no steps, call it at 0.

    base: under an adapter, None where every weight is trained.
    """
    explore = context.config.explore
    due: dict[int, list[float]] = {}
    if explore.strategy == "checkpoints":
        for share in explore.checkpoints:
            if share < 1:
                due.setdefault(max(1, round(share * steps)) if steps else 0, []).append(share)

    def keep(step: int, params: Callable[[], Any]) -> None:
        for share in due.get(step, ()):
            context.parameters.save(path(folder, share), params(), base)

    return keep
