"""The loss against float64 numpy by hand, and its gradient against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.objectives import mdpo_loss, nll_loss, token_log_probs


def by_hand(chosen, rejected, eta, smoothing=0.0, margin=0.0):
    logits = eta * (np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)) - margin
    return np.mean(
        (1 - smoothing) * np.log1p(np.exp(-logits)) + smoothing * np.log1p(np.exp(logits))
    )


@pytest.mark.parametrize(("smoothing", "margin"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.7)])
def test_loss_equals_the_formula(smoothing, margin):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, 5)) * 4
    loss, _ = mdpo_loss(chosen, rejected, eta=0.3, label_smoothing=smoothing, margin=margin)
    assert float(loss) == pytest.approx(by_hand(chosen, rejected, 0.3, smoothing, margin), rel=1e-5)


def test_step_zero_is_ln_2():
    loss, metrics = mdpo_loss(np.zeros(4), np.zeros(4), eta=0.1)
    assert float(loss) == pytest.approx(np.log(2), abs=1e-7)
    assert float(metrics["rewards/accuracies"]) == 0.0


def test_the_sign_is_winner_minus_loser():
    good, _ = mdpo_loss(np.array([2.0]), np.array([-2.0]), eta=1.0)
    bad, _ = mdpo_loss(np.array([-2.0]), np.array([2.0]), eta=1.0)
    assert good < np.log(2) < bad


def test_weights_make_shares_add_up():
    rng = np.random.default_rng(1)
    chosen, rejected = rng.normal(size=(2, 6))
    whole, metrics = mdpo_loss(chosen, rejected, eta=0.5)
    parts = [
        mdpo_loss(chosen[s], rejected[s], eta=0.5, weights=np.full(3, 1 / 6))
        for s in (slice(0, 3), slice(3, 6))
    ]
    assert float(parts[0][0] + parts[1][0]) == pytest.approx(float(whole), rel=1e-6)
    margin = sum(float(m["rewards/margins"]) for _, m in parts)
    assert margin == pytest.approx(float(metrics["rewards/margins"]), rel=1e-5)


def test_gradient_equals_finite_differences():
    chosen, rejected = np.array([1.0, -2.0]), np.array([0.5, 1.0])
    gradient = jax.grad(lambda c: mdpo_loss(c, rejected, eta=0.7)[0])(jnp.asarray(chosen))
    for i in range(2):
        step = np.zeros(2)
        step[i] = 1e-5
        slope = by_hand(chosen + step, rejected, 0.7) - by_hand(chosen - step, rejected, 0.7)
        assert float(gradient[i]) == pytest.approx(slope / 2e-5, rel=1e-4)


def test_nll_is_the_mean_of_token_means():
    assert float(nll_loss(np.array([-4.0, -9.0]), np.array([2.0, 3.0]))) == pytest.approx(2.5)


@pytest.mark.parametrize("chunk", [3, 4, 64])
def test_chunked_log_probs_equal_a_whole_softmax(chunk):
    rng = np.random.default_rng(2)
    hidden, table = rng.normal(size=(10, 6)).astype("f"), rng.normal(size=(17, 6)).astype("f")
    targets = rng.integers(0, 17, 10)
    logits = hidden.astype(np.float64) @ table.T
    expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(10), targets]

    def total(hidden, table):
        return jnp.sum(token_log_probs(hidden, table, targets, chunk=chunk))

    np.testing.assert_allclose(
        token_log_probs(hidden, table, targets, chunk=chunk), expected, atol=1e-5
    )
    whole = jax.grad(lambda h, t: jnp.sum(token_log_probs(h, t, targets, chunk=64)), (0, 1))
    for a, b in zip(jax.grad(total, (0, 1))(hidden, table), whole(hidden, table), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
