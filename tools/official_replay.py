"""A restatement of how the paper's published code runs tools, to measure against.

Mirrored: a pool of min(jobs, cpus) processes that is opened for each batch, with 20 s for a job
(pebble); a job replays a trajectory's cells in one fresh IPython shell and returns what the last one
wrote to stdout and stderr, without `Out[n]: `, or the last paragraph of a traceback.

Not mirrored: the block's text passing through a triple-quoted string (backslashes go wrong there),
two empty cells an observation, the inner alarm, and the text search for `input(`.  All of it costs
time or changes outputs; none of it would make the original faster than this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_DISPLAY = re.compile(r"Out\[\d+\]: ?\n?")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
TIMEOUT_S = 20


def replay(cells: Sequence[str]) -> str:
    """The last cell's observation, after all of them ran in a new shell."""
    from IPython.core.interactiveshell import (  # pyright: ignore[reportMissingImports]
        InteractiveShell,
    )
    from IPython.utils.capture import capture_output  # pyright: ignore[reportMissingImports]

    shell, said = InteractiveShell(), ""
    for cell in cells:
        with capture_output() as captured:
            shell.run_cell(cell)
        said = captured.stdout + captured.stderr
    said = _COLOUR.sub("", said)
    _, trace, report = said.partition("Traceback")
    said = report.strip().split("\n\n")[-1] if trace else _DISPLAY.sub("", said)
    return said.strip() or "Result is not defined"


def run_batch(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Observations of one batch of histories, each a trajectory's cells up to the newest."""
    from pebble import ProcessPool  # pyright: ignore[reportMissingImports]

    said = []
    with ProcessPool(max_workers=min(len(jobs), os.cpu_count() or 1)) as pool:
        results = pool.map(replay, jobs, timeout=TIMEOUT_S).result()
        while len(said) < len(jobs):
            try:
                said.append(next(results))
            except TimeoutError:
                said.append("Timeout Error")
            except Exception as error:  # a worker that died
                said.append(type(error).__name__)
    return said


def lockstep(trajectories: Sequence[Sequence[str]], batch: int) -> list[list[str]]:
    """All observations: in groups of `batch`, every trajectory's turn waits for the group's turn."""
    said: list[list[str]] = [[] for _ in trajectories]
    for first in range(0, len(trajectories), batch):
        group = range(first, min(first + batch, len(trajectories)))
        for turn in range(max(len(trajectories[i]) for i in group)):
            active = [i for i in group if turn < len(trajectories[i])]
            found = run_batch([trajectories[i][: turn + 1] for i in active])
            for i, text in zip(active, found, strict=True):
                said[i].append(text)
    return said
