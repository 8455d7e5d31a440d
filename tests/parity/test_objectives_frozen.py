"""Losses and metrics against TRL's, frozen by make_objective_fixtures.py; needs no torch, no trl."""

from pathlib import Path

import numpy as np
import objective_cases
import pytest

FIXTURES = sorted((Path(__file__).parent / "fixtures_objectives").glob("*.npz"))


@pytest.fixture(params=FIXTURES, ids=lambda path: path.stem)
def case(request):
    return dict(np.load(request.param))


def test_loss_metrics_and_gradient_equal(case):
    metrics, compared = objective_cases.compare(case)
    one_sided = "label" in case and len(set(case["label"])) == 1
    expected = {"rewards/chosen", "rewards/rejected", "rewards/margins"}
    if "label" not in case:
        expected |= {"rewards/accuracies", "logps/chosen", "logps/rejected"}
    elif one_sided:  # TRL leaves out the means of an empty class, ours are NaN
        empty = "rejected" if case["label"].all() else "chosen"
        assert np.isnan(metrics[f"rewards/{empty}"])
        assert np.isnan(metrics["rewards/margins"])
        expected -= {f"rewards/{empty}", "rewards/margins"}
    assert set(compared) >= expected
    assert ("kl" in compared) == ("label" in case)


def test_gradient_is_zero_off_the_mask(case):
    assert not np.any(case["gradient"][case["mask"][:, 1:] == 0])
    assert np.any(case["gradient"])


def test_the_cases_cover_every_kind():
    names = {path.stem for path in FIXTURES}
    assert {"sigmoid", "ipo", "hinge", "robust", "kto", "kto_clamped", "kto_only_wrong"} <= names
