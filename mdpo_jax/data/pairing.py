"""Which right trajectory of a problem goes with which wrong one: disjoint pairs, the best first.

    random      as they are shuffled (the paper's)
    west        West-of-N (Pace et al. 2024): the best of all with the worst of all, in the order of
                (reward, mean log-prob of an action token).  A reward is 0 or 1 here, so that is the
                right one that the policy finds likeliest, and the wrong one that it finds least likely;
                further pairs are the second best with the second worst, and so on.
    siblings    those that part latest first: at the state after the most turns that both went through.
                Those that share the prompt alone come last.
    values      two children of one node of the tree: by the difference of the values of the turns in
                which they part, those that part later first where it is equal.  A value is the share
                of right trajectories below; without a positive difference there is no pair.

What is left equal stays in the shuffled order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mdpo_jax.exploration import Choice
from mdpo_jax.types import Pair, Role, Trajectory

Sides = tuple[Trajectory, Trajectory]


def choose(
    choice: Choice, right: Sequence[Trajectory], wrong: Sequence[Trajectory], most: int
) -> list[Sides]:
    """At most `most` pairs of one problem, (chosen, rejected), no trajectory in two."""
    if choice == "random":
        return list(zip(right, wrong, strict=False))[:most]
    if choice == "west":
        best = sorted(right, key=_mean_log_prob, reverse=True)
        worst = sorted(wrong, key=_mean_log_prob)
        return list(zip(best, worst, strict=False))[:most]
    rank = _latest if choice == "siblings" else _by_value(right, wrong)
    ranked = []
    for i, chosen in enumerate(right):
        for j, rejected in enumerate(wrong):
            order = rank(chosen, rejected)
            if order is not None:
                ranked.append((order, i + j, i, (chosen, rejected)))
    taken: set[int] = set()
    pairs = []
    for *_, sides in sorted(ranked, key=lambda entry: entry[:3]):
        if len(pairs) < most and taken.isdisjoint(map(id, sides)):
            taken.update(map(id, sides))
            pairs.append(sides)
    return pairs


def shared_turns(one: Trajectory, other: Trajectory) -> int:
    """How many turns, with their observations, both begin with; the turn after them differs."""
    length = min(len(one.ids), len(other.ids))
    apart = (one.ids[:length] != other.ids[:length]) | (one.roles[:length] != other.roles[:length])
    first = int(np.argmax(apart)) if apart.any() else length
    begun = (sum(span.start <= first for span in t.actions) for t in (one, other))
    return max(0, min(begun) - 1)


def siblings(pairs: Iterable[Pair]) -> int:
    """How many have sides that share at least their first turn and its observation."""
    return sum(shared_turns(pair.chosen, pair.rejected) > 0 for pair in pairs)


def _mean_log_prob(trajectory: Trajectory) -> float:
    """Of an action token, under the policy that sampled it."""
    return float(trajectory.log_probs[trajectory.roles == Role.ACTION].mean(dtype=np.float64))


def _latest(chosen: Trajectory, rejected: Trajectory) -> tuple[float, ...] | None:
    return (-shared_turns(chosen, rejected),)


def _by_value(
    right: Sequence[Trajectory], wrong: Sequence[Trajectory]
) -> Callable[[Trajectory, Trajectory], tuple[float, ...] | None]:
    through: dict[bytes, list[int]] = {}  # beginning -> how many right and wrong ones go through it
    for side, trajectories in enumerate((right, wrong)):
        for trajectory in trajectories:
            for turn in range(trajectory.turns):
                through.setdefault(_beginning(trajectory, turn), [0, 0])[side] += 1

    def value(trajectory: Trajectory, turn: int) -> float:
        good, bad = through[_beginning(trajectory, turn)]
        return good / (good + bad)

    def rank(chosen: Trajectory, rejected: Trajectory) -> tuple[float, ...] | None:
        shared = shared_turns(chosen, rejected)
        gain = value(chosen, shared) - value(rejected, shared)
        return (-gain, -shared) if gain > 0 else None

    return rank


def _beginning(trajectory: Trajectory, turn: int) -> bytes:
    """Everything up to the end of a turn's observation."""
    starts = [span.start for span in trajectory.actions[1:]]
    end = starts[turn] if turn < len(starts) else len(trajectory.ids)
    return trajectory.ids[:end].tobytes()
