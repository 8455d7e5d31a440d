"""Which right trajectory goes with which wrong one, on small trees by hand."""

import numpy as np

from mdpo_jax.data import pairing
from mdpo_jax.data.pairing import choose, shared_turns, siblings
from mdpo_jax.types import Pair, Role, Trajectory


def trajectory(sample, *turns, log_prob=-1.0):
    """Turns of one token each, with an observation between them: prompt 1 | a | 9 9 | b | ..."""
    ids, roles = [1, 1], [Role.PROMPT] * 2
    for i, turn in enumerate(turns):
        if i:
            ids, roles = [*ids, 9, 9], [*roles, Role.OBSERVATION, Role.OBSERVATION]
        ids, roles = [*ids, *turn], [*roles, *[Role.ACTION] * len(turn)]
    log_probs = np.where(np.array(roles) == Role.ACTION, log_prob, 0).astype(np.float32)
    ids, roles = np.array(ids, np.int32), np.array(roles, np.uint8)
    return Trajectory("p", sample, "x", ids, roles, log_probs)


def samples(pairs):
    return [(chosen.sample, rejected.sample) for chosen, rejected in pairs]


def test_shared_turns_end_where_the_next_turn_differs():
    one = trajectory(0, [5], [6, 7], [8])
    assert shared_turns(one, trajectory(1, [5], [6, 7], [3])) == 2
    assert shared_turns(one, trajectory(1, [5], [6, 4], [8])) == 1  # in the midst of a turn
    assert shared_turns(one, trajectory(1, [5], [6])) == 1  # one goes on where the other ends
    assert shared_turns(one, trajectory(1, [5])) == 0  # no observation is shared
    assert shared_turns(one, trajectory(1, [4])) == 0


def test_west_takes_the_two_ends():
    right = [trajectory(i, [5], log_prob=p) for i, p in enumerate((-2.0, -0.5, -1.0))]
    # The sum of 3 is lower, its mean is not.
    wrong = [trajectory(3, [5, 5, 5, 5], log_prob=-1.0), trajectory(4, [5], log_prob=-3.0)]
    assert samples(choose("west", right, wrong, 1)) == [(1, 4)]
    assert samples(choose("west", right, wrong, 4)) == [(1, 4), (2, 3)]


def test_siblings_part_as_late_as_can_be():
    right = [trajectory(0, [5], [6], [7]), trajectory(1, [4], [6])]
    wrong = [trajectory(2, [3]), trajectory(3, [5], [8]), trajectory(4, [5], [6], [8])]
    pairs = choose("siblings", right, wrong, 4)
    assert samples(pairs) == [(0, 4), (1, 2)]  # the second shares the prompt alone
    assert siblings(Pair(*sides) for sides in pairs) == 1
    assert samples(choose("siblings", right, wrong, 1)) == [(0, 4)]


def test_values_set_the_best_turn_against_the_worst():
    # From the prompt: turn 5 has 2 right of 3, turn 4 has 1 of 3, turn 3 has 0 of 1.
    right = [trajectory(0, [5], [6]), trajectory(1, [5], [7]), trajectory(2, [4], [6])]
    wrong = [trajectory(3, [5], [8]), trajectory(4, [4], [7]), trajectory(5, [4], [8])]
    wrong += [trajectory(6, [3])]
    pairs = samples(choose("values", right, wrong, 9))
    # Difference 1 below one node each, in the shuffled order; then 2/3 against 0 from the prompt.
    assert pairs == [(0, 3), (2, 4), (1, 6)]
    # A right one below turn 4, of value 1/3, and a wrong one below turn 5, of value 2/3.
    rank = pairing._by_value(right, wrong)
    assert rank(right[2], wrong[0]) is None
    assert rank(right[0], wrong[1]) == (-1 / 3, 0)


def test_random_zips_what_was_shuffled():
    right, wrong = [trajectory(i, [i]) for i in (4, 2)], [trajectory(i, [i]) for i in (7, 5, 6)]
    assert samples(choose("random", right, wrong, 4)) == [(4, 7), (2, 5)]
    assert samples(choose("random", right, wrong, 1)) == [(4, 7)]
