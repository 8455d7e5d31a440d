"""Figures of an evaluation: maj@k by enumeration, slices and comparisons by hand."""

import itertools
import typing

import numpy as np
import pytest

from mdpo_jax.environment.tool import Status
from mdpo_jax.reporting import scores
from mdpo_jax.reporting.metrics import share_interval, wilson_interval
from mdpo_jax.reporting.scores import Outcome, compared, majority, scored, tool_slices
from mdpo_jax.types import Problem


def outcome(problem, sample=0, right=False, vote="7", finish="answered", statuses=(), **more):
    fields = {"label": "correct" if right else "wrong", "rule": "numeric", "turns": 1} | more
    return Outcome(problem, sample, vote=vote, finish=finish, statuses=statuses, **fields)


def enumerated(votes, right, k):
    """maj@k by its definition: every choice of k samples, every tied answer as likely."""
    shares = {
        a: np.mean([r for v, r in zip(votes, right, strict=True) if v == a])
        for a in set(votes) - {None}
    }
    found = []
    for chosen in itertools.combinations(votes, k):
        counts = {a: chosen.count(a) for a in set(chosen) - {None}}
        winners = [a for a in counts if counts[a] == max(counts.values())]
        found.append(np.mean([shares[a] for a in winners]) if winners else 0.0)
    return np.mean(found)


def test_majority_is_the_mean_over_every_choice_of_samples():
    rng = np.random.default_rng(0)
    for _ in range(40):
        n = int(rng.integers(1, 9))
        votes = [[None, "a", "b", "c", "d"][i] for i in rng.integers(5, size=n)]
        right = [v == "a" or (v == "b" and rng.random() < 0.5) for v in votes]
        for k in range(1, n + 1):
            assert majority(votes, right, k) == pytest.approx(
                enumerated(votes, right, k), abs=1e-12
            )


@pytest.mark.parametrize(
    ("votes", "k", "expected"),
    [
        (["a", "a", "b"], 3, 1.0),  # a has the majority
        (["a", "b", "b"], 3, 0.0),
        (["a", "b"], 2, 0.5),  # a tie: each as likely
        (["a", "b", "c", None], 4, 1 / 3),
        ([None, None], 2, 0.0),  # nobody votes
        (["a", None, None], 3, 1.0),  # silent samples do not vote, whatever their number
        (["a", "a", "b"], 2, 2 / 3),  # {a a}: 1, {a b}: 1/2, twice
        (["a", "b", "b", "b"], 1, 0.25),  # k = 1 is pass@1
    ],
)
def test_majority_by_hand(votes, k, expected):
    assert majority(votes, [v == "a" for v in votes], k) == pytest.approx(expected, abs=1e-12)


def test_many_samples_do_not_lose_the_majority():
    votes = ["a"] * 200 + ["b"] * 150 + [None] * 162
    right = [v == "a" for v in votes]
    assert majority(votes, right, 1) == pytest.approx(200 / 512)
    assert 0.6 < majority(votes, right, 64) < 1
    with pytest.raises(ValueError, match="k: 3 of n = 2"):
        majority(["a", "b"], [True, False], 3)


def test_a_suites_figures():
    problems = [Problem(f"p{i}", "", "", tags={"level": 1 + i % 2}) for i in range(4)]
    greedy = [outcome(f"p{i}", right=i < 1) for i in range(4)]
    # p0: two of four right, p1: all, p2 and p3: none.
    right = {"p0": (1, 1, 0, 0), "p1": (1, 1, 1, 1), "p2": (0,) * 4, "p3": (0,) * 4}
    sampled = [
        outcome(p, i, right=bool(r), vote="right" if r else "other")
        for p, of in right.items()
        for i, r in enumerate(of)
    ]
    found = scored(problems, greedy, sampled, 0)
    assert found["greedy"]["value"] == 0.25
    assert found["greedy"]["low"] < 0.25 < found["greedy"]["high"]
    values = {k: of["value"] for k, of in found["pass_at_k"].items()}
    assert values == pytest.approx({"1": 6 / 16, "2": (5 / 6 + 1) / 4, "4": 0.5})
    votes = {k: of["value"] for k, of in found["maj_at_k"].items()}
    # Of p0's six pairs one is both right, four tie.
    assert votes == pytest.approx({"1": 6 / 16, "2": (0.5 + 1) / 4, "4": (0.5 + 1) / 4})
    levels = found["groups"]["level"]
    assert {name: of["n"] for name, of in levels.items()} == {"1": 2, "2": 2}
    assert [of["greedy"]["value"] for of in levels.values()] == [0.5, 0.0]
    assert [of["sampled"]["value"] for of in levels.values()] == [0.25, 0.5]
    assert [of["sampled"]["n"] for of in levels.values()] == [8, 8]
    with pytest.raises(ValueError, match="as many for each"):
        scored(problems, greedy, sampled[:-1], 0)


def test_slices_by_tool_use():
    outcomes = [
        outcome("a", right=True, statuses=("ok",), turns=2),
        outcome("b", statuses=("error", "ok"), turns=3),
        outcome("c", right=True, statuses=("error", "error"), turns=3, finish="turn_limit"),
        outcome("d", statuses=("timeout",), turns=2, finish="token_limit"),
        outcome("e", right=True),
        outcome("f", label="unknown", rule="timeout"),
        outcome("g", turns=0, finish="token_limit", rule=scores.TOO_LONG, vote=None),
    ]
    found = tool_slices(outcomes, 0)
    assert {t: (of["value"], of["n"]) for t, of in found["turns"].items()} == {
        "1": (0.5, 2), "2": (0.5, 2), "3": (0.5, 2),
    }  # fmt: skip
    assert {name: (of["value"], of["n"]) for name, of in found["calls"].items()} == {
        "no call": (0.5, 2), "without error": (0.5, 2), "with error": (0.5, 2),
        "without timeout": (2 / 3, 3), "with timeout": (0.0, 1),
    }  # fmt: skip
    assert found["calls_total"] == 6
    assert found["calls_per_trajectory"] == pytest.approx(6 / 7)
    shares = {name: of["value"] for name, of in found["status"].items() if of["n"]}
    assert shares == pytest.approx({"ok": 2 / 6, "error": 3 / 6, "timeout": 1 / 6})
    assert sum(of["value"] for of in found["finish"].values()) == pytest.approx(1)
    assert found["unfinished"]["value"] == pytest.approx(3 / 7)
    assert found["unknown"] == {"timeout": 1}
    assert found[scores.TOO_LONG] == 1


def test_every_status_of_the_tool_has_its_share():
    assert typing.get_args(Status) == scores.STATUSES
    assert set(scores.STATUSES) <= tool_slices([outcome("a")], 0)["status"].keys()


def test_a_comparison_is_paired_by_problem():
    problems = [Problem(f"p{i}", "", "") for i in range(20)]
    ours = [outcome(p.id, right=i % 2 == 0 or i == 1) for i, p in enumerate(problems)]
    theirs = [outcome(p.id, right=i % 2 == 0) for i, p in enumerate(problems)]
    [row] = compared(problems, (ours, []), (theirs, []), 0)
    assert (row["figure"], row["better"], row["worse"], row["n"]) == ("greedy accuracy", 1, 0, 20)
    assert row["difference"] == pytest.approx(0.05)
    # 0.55 and 0.5 of 20 apart from each other would be 0.2 wide.
    assert 0 <= row["low"] < row["difference"] < row["high"] <= 0.16
    four = [outcome(p.id, s, right=True) for p in problems for s in range(4)]
    two = [outcome(p.id, s, right=s > 0, vote=str(s)) for p in problems for s in range(2)]
    rows = {row["figure"]: row for row in compared(problems, (ours, four), (theirs, two), 0)}
    assert rows.keys() == {"greedy accuracy", "pass@1", "maj@2"}
    assert rows["pass@1"]["difference"] == rows["maj@2"]["difference"] == 0.5


def test_an_interval_of_a_share_draws_problems_with_all_their_samples():
    right, of = np.array([4.0, 0, 4, 0, 4, 0, 4, 0]), np.full(8, 4.0)
    low, high = share_interval(right, of, 0)
    alone = share_interval((np.arange(32) % 2).astype(float), np.ones(32), 0)
    assert high - low > 1.5 * (alone[1] - alone[0])  # four equal samples tell no more than one
    assert share_interval(np.zeros(8), of, 0) == wilson_interval(0, 8)
    assert share_interval(of, of, 0) == wilson_interval(8, 8)
    assert share_interval(np.zeros(3), np.zeros(3), 0) == (0.0, 1.0)
