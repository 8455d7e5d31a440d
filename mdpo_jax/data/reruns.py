"""Recorded trajectories run again: a file of them in, what the tool says today out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdpo_jax.data.recorded import agreement, blocks_of, fault, identity
from mdpo_jax.environment.interpreter import PythonInterpreter
from mdpo_jax.rows import Row, in_order, read_rows, write_rows


def rerun_file(tool: PythonInterpreter, path: Path, out: Path, batch: int) -> Counter[str]:
    """Run every code block of `path` into `out`; counts of statuses, agreements and rows.

    `batch` trajectories are under way at one time, each in a session of its own; a block starts
    when the one before it in its trajectory has ended, whatever the others do.  Rows come out in
    order as {"id", "blocks": [{"code", "recorded", "output", "status", "seconds"}]}; bad ones are
    counted as `quarantined` and go to `{out}.quarantine`.
    """
    counts: Counter[str] = Counter()

    def counted() -> Iterator[Row]:
        for row in in_order(lambda r: rerun(tool, r), read_rows(path, fault), batch):
            counts["quarantined" if row.reason else "rows"] += 1
            for block in () if row.reason else row.value["blocks"]:
                counts[f"status {block['status']}"] += 1
                counts[agreement(block["recorded"], block["output"])] += 1
            yield row

    write_rows(counted(), path, out)
    return counts


def rerun(tool: PythonInterpreter, row: dict[str, Any]) -> dict[str, Any]:
    """One trajectory's blocks in sequence, in one session."""
    session = tool.start(str(identity(row)))
    done = []
    try:
        for code, recorded in blocks_of(row):
            seen = session.run_cell(code).result()
            done.append(
                {
                    "code": code,
                    "recorded": recorded,
                    "output": seen.text,
                    "status": seen.status,
                    "seconds": round(seen.seconds, 6),
                }
            )
    finally:
        session.close()
    return {"id": identity(row), "blocks": done}
