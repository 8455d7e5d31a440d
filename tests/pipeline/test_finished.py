"""The stage that grades tells the grader whether the policy ended its trajectory itself."""

from types import SimpleNamespace

import numpy as np
import pytest

from mdpo_jax.grading.verdict import Grader
from mdpo_jax.pipeline.evaluation import verdict
from mdpo_jax.types import Role, Trajectory


@pytest.mark.parametrize(
    ("finish", "rule"),
    [
        ("answered", "exact"),
        ("no_code", "exact"),
        ("turn_limit", "unfinished"),
        ("token_limit", "unfinished"),
    ],
)
def test_a_trajectory_that_a_limit_cut_is_not_correct(finish, rule):
    ids, roles = np.array([1, 2], np.int32), np.array([Role.PROMPT, Role.ACTION], np.uint8)
    trajectory = Trajectory("p", 0, "x", ids, roles, np.zeros(2, np.float32), finish=finish)
    with Grader() as grader:
        chat = SimpleNamespace(decode=lambda ids: r"\boxed{5}")
        context = SimpleNamespace(grader=grader, chat=chat)
        assert verdict(context, "5", trajectory).rule == rule
