import itertools

import numpy as np
import pytest

from mdpo_jax.rollout.admission import Queue
from mdpo_jax.rollout.shapes import Shapes


def queue(*lengths, remembered=100):
    return Queue([(name, length) for name, length in lengths], remembered)


def test_the_longest_begin_first_and_equal_ones_together():
    q = queue(("a", 3), ("b", 9), ("c", 3), ("a", 3), ("b", 9))
    assert [q.next() for _ in range(5)] == [1, 4, 0, 3, 2]
    assert not q


def test_a_beginning_is_read_once():
    q = queue(("a", 5), ("a", 5), ("a", 5), ("b", 4), ("a", 5))
    assert q.begin({0: 0, 1: 1, 2: 3}) == ([], [0, 2], [(0, 1)])
    q.wrote(0, 60)
    assert q.begin({2: 2}) == ([(0, 2)], [], [])
    # From a slot that begins anew itself, as long as it holds what it held.
    assert q.begin({0: 4, 1: 3}) == ([(0, 0)], [1], [])


def test_what_a_ring_has_overwritten_is_read_again():
    q = queue(("a", 5), ("a", 5), ("a", 5), remembered=8)
    q.begin({0: 0})
    q.wrote(0, 9)
    q.wrote(0, 7)  # a stop string took it back
    assert q.begin({1: 1}) == ([], [1], [])
    assert q.begin({0: 2}) == ([(1, 0)], [], [])


def cost(shapes, groups, lengths, overhead):
    return sum(
        shapes.rows(len(g)) * shapes.width(max(lengths[i] for i in g)) + overhead for g in groups
    )


@pytest.mark.parametrize("overhead", [0, 16, 256])
def test_groups_hold_every_row_once_at_the_least_cost(overhead):
    shapes, rng = Shapes.make(16, 1024, 16), np.random.default_rng(overhead)
    for count in (1, 2, 5, 7):
        lengths = rng.integers(1, 700, count).tolist()
        found = shapes.groups(lengths, overhead)
        assert sorted(itertools.chain(*found)) == list(range(count))
        order = sorted(range(count), key=lambda i: -lengths[i])
        ways = [
            [order[a:b] for a, b in itertools.pairwise((0, *cuts, count))]
            for n in range(count)
            for cuts in itertools.combinations(range(1, count), n)
        ]
        best = min(cost(shapes, way, lengths, overhead) for way in ways)
        assert cost(shapes, found, lengths, overhead) == best
    assert shapes.groups([], overhead) == []


def test_buckets():
    shapes = Shapes.make(6, 1000, 16)
    assert shapes.row_buckets == (4, 6)
    assert shapes.width_buckets == (32, 64, 128, 256, 512, 1000)
    fine = Shapes.make(6, 100, 16, fine=True)
    assert fine.width_buckets == (32, 48, 64, 96, 100)
    assert shapes.reaches == (256, 384, 512, 1000)
    assert [shapes.reach(n) for n in (0, 256, 257, 999, 1001)] == [256, 256, 384, 1000, 1000]
