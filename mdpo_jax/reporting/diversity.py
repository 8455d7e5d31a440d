"""How unlike the trajectories of one problem are."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np

from mdpo_jax.types import Role, Trajectory


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Levenshtein's: the fewest insertions, deletions and substitutions that make one the other.

    A column of the table is two integers, of the places where it rises and falls (Myers 1999; Hyyro
    2003), so a token of `other` costs a few operations on as many bits as `one` is long.
    """
    if not one or not other:
        return max(len(one), len(other))
    places: dict[Hashable, int] = {}
    for i, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << i
    every, last = (1 << len(one)) - 1, 1 << len(one) - 1
    rises, falls, distance = every, 0, len(one)
    for token in other:
        equal = places.get(token, 0)
        diagonal = ((equal & rises) + rises ^ rises) | equal | falls
        up = falls | ~(diagonal | rises) & every
        down = rises & diagonal
        distance += bool(up & last) - bool(down & last)
        up = (up << 1 | 1) & every
        rises = (down << 1 | ~((equal | falls) | up)) & every
        falls = up & (equal | falls)
    return distance


def mean_distance(trajectories: Sequence[Trajectory], seed: str) -> float | None:
    """Mean edit distance between action tokens, over the longer length: 0 equal, 1 nothing alike.

    Of each trajectory and the next in a random round, an unbiased estimate of the mean over all pairs;
    None of fewer than two.
    """
    count = len(trajectories)
    if count < 2:
        return None
    actions = [t.ids[t.roles == Role.ACTION].tolist() for t in trajectories]
    state = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    order = np.random.default_rng(state).permutation(count).tolist()
    pairs = [(order[i], order[(i + 1) % count]) for i in range(count if count > 2 else 1)]
    shares = [
        edit_distance(actions[i], actions[j]) / max(len(actions[i]), len(actions[j]))
        for i, j in pairs
    ]
    return float(np.mean(shares))
