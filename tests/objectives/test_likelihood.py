"""Likelihood terms and per-sequence sums by hand."""

import numpy as np
import pytest

from mdpo_jax.objectives import length_normalised, nll_loss, turn_discount_weights


def test_nll_is_the_mean_of_token_means():
    assert float(nll_loss(np.array([-4.0, -9.0]), np.array([2.0, 3.0]))) == pytest.approx(2.5)


def test_length_normalised_is_a_mean_and_keeps_0_of_empty_sequences():
    found = length_normalised(np.array([-6.0, 0.0]), np.array([3, 0]))
    assert found.tolist() == [-2.0, 0.0]


@pytest.mark.parametrize("gamma", [0.3, 0.9, 0.9999, 1.0])
def test_turn_weights_are_the_discounted_sum_of_partial_sums(gamma):
    per_turn = np.random.default_rng(0).normal(size=5)
    discounts = gamma ** np.arange(5)
    expected = (discounts * np.cumsum(per_turn)).sum() / discounts.sum()
    weights = np.asarray(turn_discount_weights(np.arange(5), 5, gamma=gamma))
    assert weights[0] == pytest.approx(1)
    assert np.all(np.diff(weights) < 0)
    assert (weights * per_turn).sum() == pytest.approx(expected, abs=2e-6)


def test_a_single_turn_weighs_1_and_trajectories_may_be_ragged():
    weights = turn_discount_weights(np.array([0, 0, 1]), np.array([1, 2, 2]), gamma=0.5)
    np.testing.assert_allclose(weights, [1, 1, 0.5 * 0.5 / 0.75], rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.5, -1.0])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match=r"0 < gamma <= 1"):
        turn_discount_weights(np.arange(2), 2, gamma=gamma)
