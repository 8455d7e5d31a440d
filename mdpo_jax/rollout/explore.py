"""Strategies of exploration: what a problem's next trajectories begin with.

    wave 1   p: prompt, prompt         q: prompt            all problems advance in one engine run
    wave 2   p: prompt                 q: state of #0       what is due follows from the problem alone
    wave 3   p: -                      q: state of #1

A strategy is asked by problem, and told of what came of it; it knows no file, no grader (a reward
comes in as a callback) and no policy but the one that the engine samples.  Randomness is keyed by
(problem, sample), so what a problem gets depends neither on its neighbours nor on the waves.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mdpo_jax.rollout import tree
from mdpo_jax.rollout.engine import Engine, Prefix, Request
from mdpo_jax.rollout.sampling import Sampling
from mdpo_jax.types import Problem, Trajectory

Decode = Callable[[Sequence[int]], str]
Reward = Callable[[Trajectory], float]


@dataclasses.dataclass
class Purse:
    """What one problem may still cost.

    tokens: another trajectory is due while fewer have been sampled; the last one may go beyond, by
    less than a trajectory.  0: `trajectories` are due, however long.  spent, count: so far.
    """

    tokens: int
    trajectories: int
    spent: int = 0
    count: int = 0

    def due(self, most: int, share: float = 1.0) -> int:
        """Trajectories of a share of it that are due whatever they cost, each `most` tokens at most.

        One after the other would give the same, one at a time.
        """
        if self.tokens:
            return max(0, -(-(max(1, round(share * self.tokens)) - self.spent) // most))
        return max(0, round(share * self.trajectories) - self.count)

    def pay(self, trajectory: Trajectory) -> None:
        """Only newly sampled tokens count: what a continuation takes over is free."""
        self.spent += trajectory.sampled_tokens
        self.count += 1


class Start(NamedTuple):
    """The prompt, or the state of `parent` after its first `turns` turns and their observations."""

    temperature: float
    parent: Trajectory | None = None
    turns: int = 0


class Strategy(Protocol):
    """Of one problem."""

    def next(self, purse: Purse, most: int) -> list[Start]:
        """What is sampled next, together; nothing once the purse is empty."""
        ...

    def tell(self, trajectory: Trajectory) -> None:
        """A trajectory that was asked for, in the order of its asking."""
        ...


class Independent:
    """Everything from the prompt; sample i at the i-th temperature of the ladder, round and round.

    With one temperature this is how `mixture`, `checkpoints` and `west` sample each policy.
    """

    def __init__(self, temperatures: Sequence[float]):
        self._ladder = tuple(temperatures)

    def next(self, purse: Purse, most: int) -> list[Start]:
        places = range(purse.count, purse.count + purse.due(most))
        return [Start(self._ladder[i % len(self._ladder)]) for i in places]

    def tell(self, trajectory: Trajectory) -> None:
        pass


class Branching:
    """A share `base` from the prompt; then once from each of their states, in an order of the seed's,
    and again from the first.

    Equal states are one.  Until a trajectory calls the tool, all begin at the prompt.
    """

    def __init__(self, base: float, temperature: float, room: int, seed: str):
        self._base, self._temperature, self._room, self._seed = base, temperature, room, seed
        self._states: dict[bytes, tuple[Trajectory, int]] = {}
        self._order: list[tuple[Trajectory | None, int]] = []
        self._next = 0

    def next(self, purse: Purse, most: int) -> list[Start]:
        fresh = purse.due(most, self._base)
        if fresh:
            return [Start(self._temperature)] * fresh
        if len(self._order) != len(self._states):
            found = list(self._states.values())
            random = np.random.default_rng(_integer(self._seed))
            self._order, self._next = [found[i] for i in random.permutation(len(found))], 0
        order, count = self._order or [(None, 0)], purse.due(most)
        self._next += count
        places = range(self._next - count, self._next)
        return [Start(self._temperature, *order[i % len(order)]) for i in places]

    def tell(self, trajectory: Trajectory) -> None:
        if trajectory.parent is None and not self._order:
            for turns, ids in states(trajectory, self._room):
                self._states.setdefault(ids.tobytes(), (trajectory, turns))


class Search:
    """PUCT over turns (rollout/tree.py), one simulation at a time.

    The prior is the sampling policy's, whose log-probs are there already: it must be the reference.
    reward: of a finished trajectory.
    """

    def __init__(self, c_puct: float, width: int, temperature: float, room: int, reward: Reward):
        self._c_puct, self._width, self._temperature = c_puct, width, temperature
        self._room, self._reward = room, reward
        self._root = tree.Node()
        self._path = [self._root]
        self._made: dict[int, Trajectory] = {}

    def next(self, purse: Purse, most: int) -> list[Start]:
        if not purse.due(most):
            return []
        self._path = tree.select(self._root, c_puct=self._c_puct, width=self._width)
        node = self._path[-1]
        parent = None if node.sample is None else self._made[node.sample]
        return [Start(self._temperature, parent, node.depth)]

    def tell(self, trajectory: Trajectory) -> None:
        self._made[trajectory.sample] = trajectory
        leads_on = {turns for turns, _ in states(trajectory, self._room)}
        actions = trajectory.actions
        ends = [*(a.start for a in actions[1:]), len(trajectory.ids)]
        turns = [
            tree.Turn(
                trajectory.ids[span.start : end].tobytes(),
                float(trajectory.log_probs[span].sum(dtype=np.float64)),
                number not in leads_on,
            )
            for number, (span, end) in enumerate(zip(actions, ends, strict=True), 1)
        ]
        below = turns[len(self._path) - 1 :]
        tree.add(self._path, below, self._reward(trajectory), trajectory.sample)


def states(trajectory: Trajectory, room: int) -> Iterator[tuple[int, np.ndarray]]:
    """(turns, ids) of each state that was gone on from and has at most `room` tokens."""
    for turns, span in enumerate(trajectory.actions[1:], 1):
        if span.start <= room:
            yield turns, trajectory.ids[: span.start]


def prefix(trajectory: Trajectory, turns: int, decode: Decode, session: str) -> Prefix:
    """The state after a trajectory's first `turns` turns; the tool gets there by running them again.

    session: of the tool, under whose key it says again what it said.
    """
    spans = trajectory.actions
    start = spans[turns].start
    texts = tuple(decode(trajectory.ids[span].tolist()) for span in spans[:turns])
    ids, roles = trajectory.ids[:start].tolist(), trajectory.roles[:start].tolist()
    return Prefix(tuple(ids), tuple(roles), texts, session)


def grafted(trajectory: Trajectory, start: Start) -> Trajectory:
    """With what it took over from its parent: log-probs and tool statuses of the first turns."""
    parent, turns = start.parent, start.turns
    if parent is None:
        return trajectory
    length = parent.actions[turns].start
    log_probs = np.concatenate([parent.log_probs[:length], trajectory.log_probs[length:]])
    return dataclasses.replace(
        trajectory, log_probs=log_probs, parent=parent.sample, branch=turns,
        tool_statuses=(*parent.tool_statuses[:turns], *trajectory.tool_statuses),
    )  # fmt: skip


def explore(
    engine: Engine, problems: Sequence[Problem], strategies: Mapping[str, Strategy],
    purses: Mapping[str, Purse], *, most: int, decode: Decode, stream: str, policy: str,
    sampling: Sampling, advance: Callable[[int], None] = lambda done: None,
) -> list[Trajectory]:  # fmt: skip
    """Trajectories by problem and then by sample, until every purse is empty.

    strategies, purses: by problem id; a purse's count is its first sample's number.  most: tokens
    that a trajectory can cost.  sampling: its temperature gives way to the strategy's.
    """
    found: dict[str, list[Trajectory]] = {p.id: [] for p in problems}
    roots: dict[tuple[str, int], int] = {}  # the sample from the prompt that each goes back to
    while wave := [
        (p, purses[p.id].count + i, start)
        for p in problems
        for i, start in enumerate(strategies[p.id].next(purses[p.id], most))
    ]:
        by_place: dict[int, Trajectory] = {}
        for temperature in sorted({start.temperature for _, _, start in wave}):
            places = [i for i, (_, _, s) in enumerate(wave) if s.temperature == temperature]
            requests = [_request(*wave[i], stream, decode, roots) for i in places]
            now = sampling._replace(temperature=temperature)
            done = engine.run(requests, policy=policy, sampling=now, advance=advance)
            by_place |= zip(places, done, strict=True)
        for place, (problem, _, start) in enumerate(wave):
            trajectory = grafted(by_place[place], start)
            found[problem.id].append(trajectory)
            purses[problem.id].pay(trajectory)
            strategies[problem.id].tell(trajectory)
    return [trajectory for problem in problems for trajectory in found[problem.id]]


def _request(
    problem: Problem, sample: int, start: Start, stream: str, decode: Decode,
    roots: dict[tuple[str, int], int],
) -> Request:  # fmt: skip
    if start.parent is None:
        roots[problem.id, sample] = sample
        return Request(problem, sample, stream)
    root = roots[problem.id, sample] = roots[problem.id, start.parent.sample]
    session = Request(problem, root, stream).key
    return Request(problem, sample, stream, prefix(start.parent, start.turns, decode, session))


def _integer(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
