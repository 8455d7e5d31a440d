"""From graded trajectories to pairs: the recipe's filters, then one right with one wrong."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from mdpo_jax.data.pairing import choose
from mdpo_jax.data.store import Graded
from mdpo_jax.exploration import Choice
from mdpo_jax.types import Pair, Trajectory


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which trajectories may enter a pair (recipe 5.3); see config.Pairs for the fields.

    choice: of those, which right one goes with which wrong one (data/pairing.py).
    """

    per_problem: int = 1
    max_tokens: int = 2048
    keep_limit: bool = False
    require_tool: bool = True
    drop_error_before_answer: bool = True
    choice: Choice = "random"


@dataclasses.dataclass(frozen=True)
class Selection:
    """The pairs, the right trajectories by problem (RAFT's data), and why others were dropped."""

    pairs: tuple[Pair, ...]
    correct: tuple[Trajectory, ...]
    dropped: Counter[str]
    problems: int
    mixed: int


def reason_to_drop(graded: Graded, rules: Rules) -> str | None:
    """The first filter that a trajectory fails, or None."""
    trajectory, verdict = graded
    limited = trajectory.finish in ("turn_limit", "token_limit")
    if verdict.label == "unknown":
        return "unknown_verdict"
    if len(trajectory.ids) > rules.max_tokens:
        return "too_long"
    if limited and not rules.keep_limit:
        return "limit"
    if rules.require_tool and not trajectory.tool_statuses:
        return "no_tool_call"
    last_failed = bool(trajectory.tool_statuses) and trajectory.tool_statuses[-1] != "ok"
    if rules.drop_error_before_answer and last_failed and verdict.correct:
        return "error_before_answer"
    return None


def select(graded: Iterable[Graded], rules: Rules, seed: str) -> Selection:
    """Filter, drop repeats, and pair within each problem, at random unless the rules say otherwise.

    Both sides are shuffled by a hash of (seed, problem), so the choice does not depend on the order
    of files; up to `per_problem` disjoint pairs are zipped, as the official builder does where it can.
    """
    dropped: Counter[str] = Counter()
    sides: dict[str, tuple[list[Trajectory], list[Trajectory]]] = {}
    seen: set[tuple[str, bytes]] = set()
    for entry in graded:
        trajectory = entry.trajectory
        right, wrong = sides.setdefault(trajectory.problem_id, ([], []))
        reason = reason_to_drop(entry, rules)
        content = (trajectory.problem_id, trajectory.ids.tobytes())
        if reason is None and content in seen:
            reason = "repeated"
        if reason is not None:
            dropped[reason] += 1
            continue
        seen.add(content)
        (right if entry.verdict.correct else wrong).append(trajectory)
    pairs: list[Pair] = []
    correct: list[Trajectory] = []
    mixed = 0
    for problem_id in sorted(sides):
        right, wrong = (_shuffled(s, f"{seed}/{problem_id}") for s in sides[problem_id])
        mixed += bool(right and wrong)
        correct += right
        pairs += [Pair(*sides) for sides in choose(rules.choice, right, wrong, rules.per_problem)]
    return Selection(tuple(pairs), tuple(correct), dropped, len(sides), mixed)


def at_most(trajectories: Sequence[Trajectory], per_problem: int) -> list[Trajectory]:
    """The first `per_problem` of each problem, in order."""
    count: Counter[str] = Counter()
    kept = []
    for trajectory in trajectories:
        count[trajectory.problem_id] += 1
        if count[trajectory.problem_id] <= per_problem:
            kept.append(trajectory)
    return kept


def _shuffled(trajectories: list[Trajectory], seed: str) -> list[Trajectory]:
    ordered = sorted(trajectories, key=lambda t: (t.sample, t.policy))
    state = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    return [ordered[i] for i in np.random.default_rng(state).permutation(len(ordered))]
