"""The rollout stage: problems in chunks, a file each, dealt to the processes of the run.

chunk       0   1   2   3   4   5        those that are not on disk, in one order for all
process     0   1   0   1   0   1        what a killed process had not written is dealt anew
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mdpo_jax import hosts
from mdpo_jax.data import store
from mdpo_jax.data.store import Graded
from mdpo_jax.environment.determinism import Rechecks
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.evaluation import Advance, sample
from mdpo_jax.pipeline.files import missing
from mdpo_jax.pipeline.stages import read_problems
from mdpo_jax.rollout.activity import Activity, together
from mdpo_jax.types import Problem

_log = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """Problems that one policy is sampled on, and the file of what comes of it."""

    file: Path
    problems: Sequence[Problem]
    samples: range


def rollout(
    context: Context, folder: Path, iteration: int, sources: Sequence[tuple[Path, int]],
    advance: Advance,
) -> dict[str, Any]:  # fmt: skip
    """Sample each problem from a mixture of policies: (parameters, samples) each, in order."""
    problems, paths = read_problems(context, f"iteration-{iteration}"), [p for p, _ in sources]

    def work(place: int, chunk: Chunk, tell: Callable[[int], None]) -> list[Graded]:
        return sample(
            context, chunk.problems, samples=chunk.samples, stream=f"iteration-{iteration}",
            policy=str(paths[place].relative_to(context.directory)),
            sampling=context.sampling(context.config.rollout.temperature), advance=tell,
        )  # fmt: skip

    chunks, first = [], 0
    for _, count in sources:  # samples are numbered through all of them
        samples = range(first, first + count)
        chunks.append(cut(context, folder, problems, first, samples) if count else [])
        first += count
    return dealt(context, paths, chunks, work, advance)


def dealt(
    context: Context, policies: Sequence[Path], chunks: Sequence[Sequence[Chunk]],
    work: Callable[[int, Chunk, Callable[[int], None]], list[Graded]], advance: Advance,
) -> dict[str, Any]:  # fmt: skip
    """Write the file of every chunk of every policy, in the policies' order; the stage's summary.

    A chunk that is on disk is not sampled again.  work: what a loaded policy, by its place, makes of
    a chunk; all files of the policies before it are there.
    """
    gone = missing([chunk.file for of in chunks for chunk in of])
    own, labels = set(hosts.mine(gone)), Counter[str]()
    before_us, active = context.interpreter.rechecks(), context.engine.activity.copy()
    asked = (p for of in chunks for chunk in of for p in chunk.problems)
    context.engine.expect(max(len(context.chat.prompt(p.question)) for p in asked))

    def tell(done: int) -> None:
        share = f", correct {labels['correct'] / labels.total():.0%}" if labels else ""
        advance(done, context.engine.live() + share)

    for place, (path, of) in enumerate(zip(policies, chunks, strict=True)):
        hosts.wait()
        # All load together: the weights come from the devices of all.
        if any(chunk.file in gone for chunk in of):
            context.sampler.load(context.load(path))
        for chunk in of:
            if chunk.file in own:
                found = work(place, chunk, tell)
                store.write_lines(chunk.file, map(store.graded_row, found))
                labels.update(graded.verdict.label for graded in found)
            elif chunk.file not in gone:
                there = [row["label"] for row in store.read_lines(chunk.file)]
                labels.update(there)
                advance(len(there))
    hosts.wait()  # until every chunk is there
    rates = hosts.everyone(dataclasses.asdict(context.engine.activity - active))
    compiled = hosts.everyone([context.sampler.compilations(), context.sampler.late_compilations()])
    return {
        **_rechecks(context, before_us),
        **(_counts(chunks) if hosts.first() else {}),
        "activity": together([Activity(**of) for of in rates]).report(),
        "compilations": max(count for count, _ in compiled),
        "compilations_after_warm_up": max(count for _, count in compiled),
    }


def cut(
    context: Context, folder: Path, problems: Sequence[Problem], number: int,
    samples: range = range(0),
) -> list[Chunk]:  # fmt: skip
    """The chunks of one policy; number: how its files' names begin, which puts them in order."""
    size = context.config.rollout.chunk_problems
    return [
        Chunk(folder / f"{number:03d}-{at:06d}.jsonl.gz", problems[at : at + size], samples)
        for at in range(0, len(problems), size)
    ]


def _counts(chunks: Sequence[Sequence[Chunk]]) -> dict[str, Any]:
    """Of all files, whoever wrote them."""
    labels, statuses = Counter[str](), Counter[str]()
    for row in (row for of in chunks for chunk in of for row in store.read_lines(chunk.file)):
        labels[row["label"]] += 1
        # Those before it branched off are its parent's.
        statuses.update(row["tool_statuses"][row.get("branch", 0) :])
    # These mean that the machine, not the code, may have been slow.
    lost = statuses["timeout"] + statuses["killed"]
    if lost:
        _log.warning(
            "rollout: %d tool calls of %d timed out or were killed", lost, statuses.total()
        )
    return {
        "trajectories": labels.total(),
        "correct": labels["correct"] / max(1, labels.total()),
        "statuses": dict(sorted(statuses.items())),
    }


def _rechecks(context: Context, before: Rechecks) -> dict[str, int]:
    """Tool calls that were run again since `before`, and how many then said something else.

    Those of these processes: a rollout that was killed and resumed tells of its last part.
    """
    if not context.config.tool.check_determinism:
        return {}
    now = context.interpreter.rechecks()
    found = hosts.everyone([now.checked - before.checked, now.differed - before.differed])
    checked, differing = (sum(part) for part in zip(*found, strict=True))
    if differing and hosts.first():
        _log.warning("rollout: %d of %d tool calls that were run again differ", differing, checked)
    return {"rechecked_calls": checked, "differing_calls": differing}
