"""PUCT and the bookkeeping of a tree, by hand."""

import math

import pytest

from mdpo_jax.rollout.tree import Node, Turn, add, priors, scores, select


def grown(*simulations):
    """A tree of (path of keys that it goes down, turns below, reward)."""
    root = Node()
    for sample, (down, turns, reward) in enumerate(simulations):
        path = [root]
        for key in down:
            path.append(path[-1].children[key])
        add(path, turns, reward, sample)
    return root


def turn(key, share, ended=False):
    return Turn(key, math.log(share), ended)


# Two turns of probability 0.3 and 0.1 from the root; A leads on and was right once of twice.
ROOT = grown(
    ((), [turn("A", 0.3), turn("end", 0.5, True)], 1.0),
    ((), [turn("B", 0.1), turn("end", 0.9, True)], 0.0),
    (("A",), [turn("C", 0.2), turn("end", 0.5, True)], 0.0),
)


def test_visits_and_values_count_all_the_way_up():
    a, b = ROOT.children["A"], ROOT.children["B"]
    assert (ROOT.visits, ROOT.total, ROOT.sampled) == (3, 1.0, 2)
    assert (a.visits, a.value, a.sampled, a.depth, a.sample) == (2, 0.5, 2, 1, 0)
    assert (b.visits, b.value, b.sample) == (1, 0.0, 1)
    c = a.children["C"]
    assert (c.depth, c.sample, c.visits, c.value) == (2, 2, 1, 0.0)
    assert (a.children["end"].value, a.children["end"].ended) == (1.0, True)


def test_puct_is_alphazeros():
    assert priors(ROOT) == pytest.approx({"A": 0.75, "B": 0.25})
    found = scores(ROOT, c_puct=2.0, width=4)
    assert found["A"] == pytest.approx(0.5 + 2 * 0.75 * math.sqrt(3) / 3)
    assert found["B"] == pytest.approx(0.0 + 2 * 0.25 * math.sqrt(3) / 2)
    # An end takes its share of the prior, but nothing can be sampled from it.
    assert priors(ROOT.children["A"]) == pytest.approx({"end": 5 / 7, "C": 2 / 7})
    assert scores(ROOT.children["A"], 1.0, 4).keys() == {"C"}


def test_a_node_is_widened_with_the_root_of_its_visits():
    # 3 visits allow 2 turns, which there are; A's 2 allow 2 as well, and C's 1 allows 2 of 1.
    path = select(ROOT, c_puct=2.0, width=4)
    assert [node.depth for node in path] == [0, 1, 2]
    assert path[1] is ROOT.children["A"]
    # The prior alone would go to A; the value takes over as c_puct falls.
    assert select(ROOT, c_puct=0.0, width=2)[1] is ROOT.children["A"]
    four = grown(*[((), [turn(i, 0.1), turn("end", 0.5, True)], 0.0) for i in range(4)])
    assert select(four, c_puct=1.0, width=4) != [four]  # 1 + sqrt(4) turns are 3, there are 4
    assert select(four, c_puct=1.0, width=4)[1] is four.children[0]  # ties: the first
    assert select(grown(), c_puct=1.0, width=1)[0].visits == 0


def test_what_leads_nowhere_is_left():
    # A's two turns have ended, which is its width: only B is left, and then the root alone.
    a, b = (grown(*[((), [turn(i, 0.2, True)], 1.0) for i in range(n)]) for n in (2, 1))
    root = Node(visits=3, sampled=2, children={"A": a, "B": b})
    assert scores(root, 1.0, 2).keys() == {"B"}
    assert select(root, c_puct=1.0, width=2) == [root, b]
    assert scores(root, 1.0, 3).keys() == {"A", "B"}
    add([root, b], [turn("end", 0.2, True)], 0.0, 3)
    assert select(root, c_puct=1.0, width=2) == [root]


def test_equal_turns_are_one_node():
    twice = grown(((), [turn("A", 0.3, True)], 1.0), ((), [turn("A", 0.3, True)], 1.0))
    assert len(twice.children) == 1
    assert (twice.sampled, twice.children["A"].visits, twice.children["A"].sample) == (2, 2, 0)
