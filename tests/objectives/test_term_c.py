"""Term (C) and the soft value by hand."""

import jax
import numpy as np
import pytest

from mdpo_jax.objectives.term_c import soft_value, term_c


def test_term_c_counts_observed_turns_only():
    values = np.array([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
    expected = np.array([[0.5, 4.0, 1.0], [1.0, 1.0, 1.0]])
    observed = np.array([[True, True, False], [True, False, False]])
    assert term_c(values, expected, observed).tolist() == [-1.5, 2.0]


def test_soft_value_is_eta_log_mean_exp():
    utilities = np.random.default_rng(0).normal(size=(3, 50))
    expected = 0.5 * np.log(np.exp(utilities / 0.5).mean(-1))
    with jax.enable_x64(True):
        found = soft_value(utilities, eta=0.5, correct_bias=False)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(soft_value(utilities[:, :1], eta=0.5), utilities[:, 0], rtol=1e-6)


def test_large_utilities_do_not_overflow():
    assert float(soft_value(np.array([1e4, 1e4]), eta=0.1)) == pytest.approx(1e4)


def test_the_bias_correction_removes_most_of_the_bias():
    """u ~ Bernoulli(1/2), eta 1: V = log((1 + e) / 2); 16 samples, 20,000 repetitions."""
    utilities = np.random.default_rng(1).integers(0, 2, (20_000, 16)).astype(float)
    exact = np.log((1 + np.e) / 2)
    with jax.enable_x64(True):
        plain = float(soft_value(utilities, eta=1.0, correct_bias=False).mean()) - exact
        corrected = float(soft_value(utilities, eta=1.0).mean()) - exact
    # eta Var(e^u) / (2 n E(e^u)^2)
    predicted = -(((np.e - 1) / 2) ** 2) / (2 * 16 * ((1 + np.e) / 2) ** 2)
    assert plain == pytest.approx(predicted, rel=0.3)
    assert abs(corrected) < 0.3 * abs(plain)
