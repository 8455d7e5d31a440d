import itertools

import numpy as np
import pytest

from mdpo_jax.reporting.diversity import edit_distance, mean_distance
from mdpo_jax.types import Role, Trajectory


def table(one, other):
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, 1):
        new = [i]
        for j, y in enumerate(other, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def test_the_edit_distance_is_the_tables():
    rng = np.random.default_rng(0)
    for one, other in rng.integers(0, 90, (300, 2)):
        a, b = rng.integers(0, 5, one).tolist(), rng.integers(0, 5, other).tolist()
        assert edit_distance(a, b) == table(a, b)


def trajectory(sample, ids):
    roles = np.array([Role.PROMPT] + [Role.ACTION] * len(ids), np.uint8)
    return Trajectory("p", sample, "x", np.array([7, *ids]), roles, np.zeros(len(roles), "f"))


def test_the_mean_is_over_a_round():
    three = [trajectory(i, ids) for i, ids in enumerate(([1, 2, 3, 4], [1, 2, 3], [8]))]
    # Three in a round are all pairs: 1 of 4, 4 of 4 and 3 of 3.
    assert mean_distance(three, "s") == pytest.approx((0.25 + 1 + 1) / 3)
    assert mean_distance(three[:2], "s") == pytest.approx(0.25)
    assert mean_distance(three[:1], "s") is None
    assert mean_distance([three[0]] * 4, "s") == 0
    orders = {mean_distance([*three, trajectory(3, [1, 2])], str(i)) for i in range(20)}
    ids = ([1, 2, 3, 4], [1, 2, 3], [8], [1, 2])
    every = [table(a, b) / max(len(a), len(b)) for a, b in itertools.combinations(ids, 2)]
    assert np.mean(sorted(orders)) == pytest.approx(np.mean(every), abs=0.2)
