"""The trajectories of an evaluation on disk, and of each what is scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdpo_jax.chat import Chat
from mdpo_jax.data import store
from mdpo_jax.data.store import Graded
from mdpo_jax.grading.normalise import answer_key
from mdpo_jax.pipeline.harness import Suite
from mdpo_jax.pipeline.summary import segment
from mdpo_jax.reporting.metrics import MetricsWriter, iterate_metrics
from mdpo_jax.reporting.scores import TOO_LONG, Outcome
from mdpo_jax.reporting.site.build import SampleTrajectory


class Outcomes:
    """An append-only file of graded trajectories, one a line; in memory what is scored of them.

    A line that a kill tore is cut off, and so is a second one of a trajectory passed over.
    `add` may be called from any thread.
    """

    def __init__(self, path: Path, *, read_only: bool = False):
        self._found: dict[tuple[str, str, int], Outcome] = {}
        self._writer = None if read_only else MetricsWriter(path)
        for row in iterate_metrics(path):
            self._keep(row)

    def has(self, decoding: str, problem: str, sample: int) -> bool:
        return (decoding, problem, sample) in self._found

    def count(self, decoding: str) -> int:
        """How many are there."""
        return sum(key[0] == decoding for key in self._found)

    def add(self, decoding: str, graded: Graded) -> None:
        """Append a trajectory; it is in the kernel's hands when this returns."""
        if self._writer is None:
            raise ValueError("outcomes: opened to be read; expected read_only=False")
        row = store.graded_row(graded) | {"turns": graded.trajectory.turns, "decoding": decoding}
        self._writer.write(**row)
        self._keep(row)

    def of(self, suite: Suite, samples: int) -> tuple[list[Outcome], list[Outcome]]:
        """A suite's greedy outcomes, and `samples` for each problem; one not sampled is wrong."""

        def of_problem(decoding: str, problem: str, sample: int) -> Outcome:
            found = self._found.get((decoding, problem, sample))
            return found or Outcome(problem, sample, "wrong", TOO_LONG, None, "token_limit", (), 0)

        greedy = [of_problem("greedy", p.id, 0) for p in suite.problems]
        more = [of_problem("sampled", p.id, i) for p in suite.problems for i in range(samples)]
        return greedy, more

    def missing(self, suite: Suite, samples: int) -> int:
        """How many problems of a suite lack an outcome."""
        wanted = [("greedy", 1), ("sampled", samples)]
        return sum(
            not all(self.has(decoding, p.id, i) for decoding, count in wanted for i in range(count))
            for p in suite.problems
        )

    def __enter__(self) -> Outcomes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def _keep(self, row: dict[str, Any]) -> None:
        key = row["decoding"], row["problem_id"], row["sample"]
        answer, finished = row["answer"], row["rule"] != "unfinished"
        self._found[key] = Outcome(
            problem=row["problem_id"],
            sample=row["sample"],
            label=row["label"],
            rule=row["rule"],
            vote=answer_key(answer) if answer is not None and finished else None,
            finish=row["finish"],
            statuses=tuple(row["tool_statuses"]),
            turns=row["turns"],
        )


def shown(path: Path, suites: Sequence[Suite], chat: Chat, count: int) -> list[dict[str, Any]]:
    """The first greedy trajectories of each suite as text, role by role, for the report."""
    wanted = {p.id: (p, s.name) for s in suites for p in s.problems[:count]}
    found: dict[str, dict[str, Any]] = {}
    for row in iterate_metrics(path):
        if row["decoding"] != "greedy" or row["problem_id"] not in wanted:
            continue
        problem, suite = wanted[row["problem_id"]]
        trajectory, verdict = store.graded_from(row)
        found[problem.id] = dataclasses.asdict(
            SampleTrajectory(
                problem=problem.question,
                gold=problem.answer,
                verdict=verdict.label,
                rule=verdict.rule,
                stage=suite,
                segments=[
                    segment(chat.tokenizer, trajectory, role, span)
                    for role, span in trajectory.segments
                ],
            )
        )
    return [found[name] for name in wanted if name in found]
