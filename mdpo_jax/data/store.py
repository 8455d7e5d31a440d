"""Trajectories with their verdicts as JSON lines, one file a chunk, written whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mdpo_jax.types import Pair, Problem, Trajectory, Verdict


class Graded(NamedTuple):
    """A trajectory and what the grader said of it."""

    trajectory: Trajectory
    verdict: Verdict


class StoreError(ValueError):
    """A file of trajectories that cannot be read back."""


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Rows as gzipped JSON lines, through `*.partial`, fsync and rename; byte-equal for equal rows."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(partial, "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=3) as out,
    ):
        for row in rows:
            out.write(json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
    with open(partial, "rb") as done:
        os.fsync(done.fileno())
    partial.rename(path)


def read_lines(path: Path) -> Iterator[dict]:
    """The rows of `write_lines`; StoreError names the file and line that is not one."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise StoreError(f"{path}:{number}: not a JSON line ({error.msg})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise StoreError(
            f"{path}: not a whole gzip file ({error}); delete its folder and run again"
        ) from None


def read_folder(folder: Path) -> Iterator[dict]:
    """The rows of all of a folder's files, in the order of their names."""
    for file in sorted(folder.glob("*.jsonl.gz")):
        yield from read_lines(file)


def graded_row(graded: Graded) -> dict:
    """A graded trajectory as a plain dict."""
    t, v = graded
    return {
        **trajectory_row(t),
        "label": v.label,
        "rule": v.rule,
        "answer": v.answer,
    }


def graded_from(row: dict) -> Graded:
    """The inverse of `graded_row`."""
    return Graded(trajectory_from(row), Verdict(row["label"], row["rule"], row["answer"]))


def trajectory_row(t: Trajectory) -> dict:
    """A trajectory as a plain dict; log-probs with the digits that float32 needs.

    Where it branched off is written only if it did.
    """
    origin = {} if t.parent is None else {"parent": t.parent, "branch": t.branch}
    return {
        "problem_id": t.problem_id,
        "sample": t.sample,
        "policy": t.policy,
        "finish": t.finish,
        "tool_statuses": list(t.tool_statuses),
        **origin,
        "ids": t.ids.tolist(),
        "roles": t.roles.tolist(),
        "log_probs": _floats(t.log_probs),
    }


def trajectory_from(row: dict) -> Trajectory:
    """The inverse of `trajectory_row`."""
    return Trajectory(
        problem_id=row["problem_id"],
        sample=row["sample"],
        policy=row["policy"],
        ids=np.asarray(row["ids"], np.int32),
        roles=np.asarray(row["roles"], np.uint8),
        log_probs=np.asarray(row["log_probs"], np.float32),
        tool_statuses=tuple(row["tool_statuses"]),
        finish=row["finish"],
        parent=row.get("parent"),
        branch=row.get("branch", 0),
    )


def pair_row(pair: Pair) -> dict:
    """A pair as a plain dict, with its reference log-probs if it has them."""
    row: dict = {"chosen": trajectory_row(pair.chosen), "rejected": trajectory_row(pair.rejected)}
    for side in ("chosen_reference", "rejected_reference"):
        values = getattr(pair, side)
        row[side] = None if values is None else _floats(values)
    return row


def pair_from(row: dict) -> Pair:
    """The inverse of `pair_row`."""

    def reference(side: str) -> np.ndarray | None:
        return None if row[side] is None else np.asarray(row[side], np.float32)

    return Pair(
        trajectory_from(row["chosen"]),
        trajectory_from(row["rejected"]),
        reference("chosen_reference"),
        reference("rejected_reference"),
    )


def scored_row(trajectory: Trajectory, reference: np.ndarray) -> dict:
    """A trajectory with the log-probs of its tokens under a reference, as a plain dict."""
    return trajectory_row(trajectory) | {"reference_log_probs": _floats(reference)}


def scored_from(row: dict) -> tuple[Trajectory, np.ndarray]:
    """The inverse of `scored_row`."""
    return trajectory_from(row), np.asarray(row["reference_log_probs"], np.float32)


def problem_row(problem: Problem) -> dict:
    """A problem as a plain dict."""
    return {
        "id": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "source": problem.source,
        "tags": dict(problem.tags),
    }


def problem_from(row: dict) -> Problem:
    """The inverse of `problem_row`."""
    return Problem(row["id"], row["question"], row["answer"], row["source"], row["tags"])


def _floats(values: np.ndarray) -> list[float]:
    """The shortest decimals that give the same float32 back."""
    return [float(str(x)) for x in values.astype(np.float32)]
