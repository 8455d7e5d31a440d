import dataclasses

import numpy as np
import pytest

from mdpo_jax.data import store
from mdpo_jax.data.pairs import Rules, at_most, select
from mdpo_jax.data.store import Graded
from mdpo_jax.types import Problem, Role, Trajectory, Verdict


def graded(sample, label, problem="p", statuses=("ok",), finish="answered", length=6):
    ids = np.arange(length, dtype=np.int32) + 10 * sample
    roles = np.array([Role.PROMPT] * 2 + [Role.ACTION] * (length - 2), np.uint8)
    trajectory = Trajectory(
        problem, sample, "x", ids, roles, np.linspace(-1, 0, length).astype("f"), statuses, finish
    )
    return Graded(trajectory, Verdict(label, "exact", "1"))


def test_pairs_join_a_right_and_a_wrong_side_of_one_problem():
    found = select(
        [graded(0, "correct"), graded(1, "wrong"), graded(2, "wrong"), graded(3, "correct", "q")],
        Rules(per_problem=4), "seed",
    )  # fmt: skip
    assert len(found.pairs) == 1
    assert (found.pairs[0].chosen.sample, found.problems, found.mixed) == (0, 2, 1)
    assert len(found.correct) == 2


def test_the_choice_does_not_depend_on_the_order():
    rows = [graded(i, "correct" if i % 2 else "wrong") for i in range(10)]
    a, b = (select(r, Rules(per_problem=2), "s").pairs for r in (rows, rows[::-1]))
    keys = [[(p.chosen.sample, p.rejected.sample) for p in side] for side in (a, b)]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 2


@pytest.mark.parametrize(
    ("row", "rules", "reason"),
    [
        (graded(0, "unknown"), Rules(), "unknown_verdict"),
        (graded(0, "wrong", length=9), Rules(max_tokens=8), "too_long"),
        (graded(0, "wrong", finish="turn_limit"), Rules(), "limit"),
        (graded(0, "wrong", statuses=()), Rules(), "no_tool_call"),
        (graded(0, "correct", statuses=("ok", "error")), Rules(), "error_before_answer"),
    ],
)
def test_filters_name_their_reason(row, rules, reason):
    assert select([row], rules, "s").dropped == {reason: 1}


def test_repeats_are_dropped():
    row = graded(0, "correct")
    again = row._replace(trajectory=dataclasses.replace(row.trajectory, sample=5))
    assert select([row, again], Rules(), "s").dropped == {"repeated": 1}


def test_at_most_keeps_the_first_of_each_problem():
    rows = [graded(i, "correct", problem).trajectory for i in range(3) for problem in "pq"]
    assert [t.sample for t in at_most(rows, 2)] == [0, 0, 1, 1]


def test_rows_come_back_as_they_were(tmp_path):
    rows = [graded(i, "wrong", statuses=("ok", "timeout")) for i in range(3)]
    path = tmp_path / "a" / "rows.jsonl.gz"
    store.write_lines(path, map(store.graded_row, rows))
    for before, row in zip(rows, store.read_lines(path), strict=True):
        after = store.graded_from(row)
        assert after.verdict == before.verdict
        for name in ("ids", "roles", "log_probs"):
            np.testing.assert_array_equal(
                getattr(after.trajectory, name), getattr(before.trajectory, name)
            )
        assert after.trajectory.tool_statuses == ("ok", "timeout")
    assert not list(tmp_path.rglob("*.partial"))


def test_where_a_trajectory_branched_off_is_written_if_it_did():
    plain = graded(0, "wrong").trajectory
    assert not store.trajectory_row(plain).keys() & {"parent", "branch"}
    assert store.trajectory_from(store.trajectory_row(plain)).parent is None
    branched = dataclasses.replace(plain, parent=0, branch=2)
    after = store.trajectory_from(store.trajectory_row(branched))
    assert (after.parent, after.branch) == (0, 2)


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in "ab":
        store.write_lines(tmp_path / name, [{"x": 1.5}])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pairs_keep_their_reference(tmp_path):
    pair = select([graded(0, "correct"), graded(1, "wrong")], Rules(), "s").pairs[0]
    scored = dataclasses.replace(
        pair, chosen_reference=np.full(6, -0.1, "f"), rejected_reference=np.zeros(6, "f")
    )
    after = store.pair_from(store.pair_row(scored))
    np.testing.assert_array_equal(after.chosen_reference, scored.chosen_reference)
    assert store.pair_from(store.pair_row(pair)).chosen_reference is None


def test_problems_come_back():
    problem = Problem("a/1", "q?", "5", "gsm8k", {"level": 3})
    assert store.problem_from(store.problem_row(problem)) == problem


@pytest.mark.parametrize("cut", [10, 30])
def test_a_torn_file_is_named(tmp_path, cut):
    path = tmp_path / "rows.gz"
    store.write_lines(path, [{"x": i} for i in range(100)])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(store.StoreError, match=r"rows\.gz"):
        list(store.read_lines(path))
