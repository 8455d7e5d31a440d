"""The rollout of an iteration by the configured strategy: files, policies, grades and figures.

What a strategy samples is rollout/explore.py's.  A file is one policy's share of a chunk of problems;
the next policy goes on with what the files before it have left of each problem's budget, so a chunk
that is on disk is not sampled again and a rerun gives the same.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mdpo_jax import hosts
from mdpo_jax.config import Config
from mdpo_jax.data import store
from mdpo_jax.data.store import Graded
from mdpo_jax.exploration import TREES
from mdpo_jax.grading.normalise import answer_key
from mdpo_jax.pipeline import evaluation, kept, rollouts, stages
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.evaluation import Advance
from mdpo_jax.pipeline.rollouts import Chunk
from mdpo_jax.reporting.diversity import mean_distance
from mdpo_jax.rollout.explore import (
    Branching,
    Independent,
    Purse,
    Search,
    Strategy,
    explore,
)
from mdpo_jax.types import Problem, Trajectory, Verdict

_COMPARED = 200  # problems whose trajectories are compared token by token


class Source(NamedTuple):
    """A policy that takes part, and the trajectories that are due once it has had its turn."""

    path: Path
    upto: int


def sources(config: Config, policies: Sequence[Path]) -> list[Source]:
    """Of all policies so far, the current one last: those that sample, in their order."""
    r, current = config.rollout, policies[-1]
    both = r.samples + r.previous_samples
    if config.explore.strategy == "mixture":
        found = [Source(current, r.samples), Source(policies[-2], both)]
        return [s for s, before in zip(found, (0, r.samples), strict=True) if s.upto > before]
    if config.explore.strategy == "checkpoints":
        shares = config.explore.checkpoints
        return [
            Source(kept.path(current.parent, share), round(both * i / len(shares)))
            for i, share in enumerate(shares, 1)
        ]
    return [Source(current, both)]


def plain(config: Config) -> bool:
    """Whether the rollout is the mixture of a fixed number of trajectories."""
    return config.explore.strategy == "mixture" and not config.explore.budget_tokens


def expected(config: Config, problems: int) -> int | None:
    """Trajectories of a rollout, where that is known before."""
    r = config.rollout
    return None if config.explore.budget_tokens else problems * (r.samples + r.previous_samples)


def rollout(
    context: Context, folder: Path, iteration: int, policies: Sequence[Path], advance: Advance
) -> dict[str, Any]:  # fmt: skip
    """Sample each problem of an iteration; `policies` are all so far, the current one last."""
    r = context.config.rollout
    if plain(context.config):
        mixed = [(policies[-1], r.samples), (policies[-2], r.previous_samples)]
        done = rollouts.rollout(context, folder, iteration, mixed, advance)
    else:
        done = _sampled(context, folder, iteration, sources(context.config, policies), advance)
    if not hosts.first():
        return done
    prefilled = done["activity"]["tokens_prefilled"]
    return {**done, "exploration": summary(context.config, folder, prefilled)}


def _sampled(
    context: Context, folder: Path, iteration: int, order: Sequence[Source], advance: Advance
) -> dict[str, Any]:  # fmt: skip
    problems = stages.read_problems(context, f"iteration-{iteration}")
    chunks = [rollouts.cut(context, folder, problems, place) for place in range(len(order))]

    def work(place: int, chunk: Chunk, tell: Callable[[int], None]) -> list[Graded]:
        name = chunk.file.name.split("-", 1)[1]
        earlier = [folder / f"{i:03d}-{name}" for i in range(place)]
        purses = _purses(context.config, chunk.problems, order, place, earlier)
        return _explored(context, chunk.problems, order[place].path, purses, iteration, tell)

    return rollouts.dealt(context, [source.path for source in order], chunks, work, advance)


def _purses(
    config: Config, problems: Sequence[Problem], order: Sequence[Source], place: int,
    earlier: Sequence[Path],
) -> dict[str, Purse]:  # fmt: skip
    """What the policies up to `place` may spend together, less what those before it have spent."""
    upto = order[place].upto
    tokens = -(-config.explore.budget_tokens * upto // order[-1].upto)
    purses = {p.id: Purse(tokens, upto) for p in problems}
    for row in itertools.chain.from_iterable(map(store.read_lines, earlier)):
        trajectory = store.trajectory_from(row)
        purses[trajectory.problem_id].pay(trajectory)
    return purses


def _explored(
    context: Context, problems: Sequence[Problem], policy: Path, purses: Mapping[str, Purse],
    iteration: int, tell: Callable[[int], None],
) -> list[Graded]:  # fmt: skip
    config, stream = context.config, f"{context.config.seed}/iteration-{iteration}"
    golds = {p.id: p.answer for p in problems}
    verdicts: dict[str, Verdict] = {}

    def verdict(trajectory: Trajectory) -> Verdict:
        if trajectory.key not in verdicts:
            gold = golds[trajectory.problem_id]
            verdicts[trajectory.key] = evaluation.verdict(context, gold, trajectory)
        return verdicts[trajectory.key]

    def right(trajectory: Trajectory) -> float:
        return float(verdict(trajectory).correct)

    def of(problem: Problem) -> Strategy:
        e, temperature = config.explore, config.rollout.temperature
        room = config.rollout.context - 2  # a state must leave as much for a turn
        if e.strategy == "branch":
            return Branching(e.base, temperature, room, f"{stream}/branch/{problem.id}")
        if e.strategy == "mcts":
            return Search(e.c_puct, e.width, temperature, room, right)
        ladder = e.temperatures if e.strategy == "temperatures" else (temperature,)
        return Independent(ladder)

    if config.explore.strategy in TREES:
        context.engine.expect(config.rollout.context)
    found = explore(
        context.engine, problems, {p.id: of(p) for p in problems}, purses,
        most=config.rollout.trajectory_tokens, decode=context.chat.decode, stream=stream,
        policy=str(policy.relative_to(context.directory)),
        sampling=context.sampling(config.rollout.temperature), advance=tell,
    )  # fmt: skip
    return [Graded(t, verdict(t)) for t in found]


def summary(config: Config, folder: Path, prefilled: int) -> dict[str, Any]:
    """Figures of a rollout's files.

    tokens_sampled: of actions, those that were taken over left out.  tokens_prefilled: read by the
    model, in the processes that ended the rollout (a resumed one tells of its last part).
    coverage: share of problems with a right and a wrong trajectory.
    distinct: share of trajectories that are no copy of an earlier one of their problem.
    answers: mean number of different final answers of a problem.  distance: mean edit distance
    between two trajectories of a problem, of the first 200 problems (reporting/diversity.py).
    branched: share that began at another's state.
    """
    tokens = branched = 0
    labels: dict[str, set[str]] = {}
    contents: dict[str, Counter[bytes]] = {}
    answers: dict[str, set[str]] = {}
    compared: dict[str, list[Trajectory]] = {}
    for trajectory, verdict in map(store.graded_from, store.read_folder(folder)):
        name = trajectory.problem_id
        tokens += trajectory.sampled_tokens
        branched += trajectory.parent is not None
        labels.setdefault(name, set()).add(verdict.label)
        contents.setdefault(name, Counter())[trajectory.ids.tobytes()] += 1
        if verdict.answer is not None:
            answers.setdefault(name, set()).add(answer_key(verdict.answer))
        if name in compared or len(compared) < _COMPARED:
            compared.setdefault(name, []).append(trajectory)
    count, problems = sum(c.total() for c in contents.values()), max(1, len(labels))
    distances = [
        d for name, some in compared.items()
        if (d := mean_distance(some, f"{config.seed}/{name}")) is not None
    ]  # fmt: skip
    return {
        "strategy": config.explore.strategy,
        "budget_tokens": config.explore.budget_tokens,
        "tokens_sampled": tokens,
        "tokens_prefilled": prefilled,
        "coverage": sum({"correct", "wrong"} <= found for found in labels.values()) / problems,
        "distinct": sum(map(len, contents.values())) / max(1, count),
        "answers": sum(map(len, answers.values())) / problems,
        "distance": float(np.mean(distances)) if distances else 0.0,
        "branched": branched / max(1, count),
    }
