import numpy as np
import pytest

from mdpo_jax.types import EmptyActionError, Pair, Role, Trajectory, loss_mask

P, A, OBS, T = Role.PROMPT, Role.ACTION, Role.OBSERVATION, Role.TEMPLATE
ROLES = np.array([P, P, A, A, T, OBS, OBS, T, T, A, A], np.uint8)


def trajectory(roles, problem="p", ids=None):
    ids = np.arange(len(roles)) if ids is None else ids
    return Trajectory(
        problem, 0, "x", np.asarray(ids, np.int32), np.asarray(roles, np.uint8),
        np.zeros(len(roles), np.float32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sampled", [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1]),
        ("template", [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]),
        ("paper", [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_masks_follow_the_roles(name, expected):
    np.testing.assert_array_equal(loss_mask(ROLES, name), np.array(expected, bool))


def test_observations_count_everything_after_the_prompt():
    np.testing.assert_array_equal(loss_mask(ROLES, "sampled", observations=True), ROLES != P)


def test_an_unknown_mask_is_named():
    with pytest.raises(ValueError, match="'tool' is not a mask; expected one of sampled"):
        loss_mask(ROLES, "tool")


def test_turns_are_runs_of_action_tokens():
    t = trajectory(ROLES)
    assert t.turns == 2
    assert t.actions == [slice(2, 4), slice(9, 11)]
    assert [role for role, _ in t.segments] == [P, A, T, OBS, T, A]


def test_a_trajectory_without_action_is_refused():
    with pytest.raises(EmptyActionError, match="no action token among 3"):
        trajectory([P, OBS, T])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 ids, 3 roles and 3 log_probs"):
        trajectory([P, A, A], ids=[1, 2])


def test_a_pair_is_of_one_problem():
    with pytest.raises(ValueError, match="both must answer one problem"):
        Pair(trajectory([P, A], "p"), trajectory([P, A], "q"))
