"""M-KTO against float64 numpy by hand: loss, slopes, metrics, shares and one-sided batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.objectives import kl_estimate, mismatched_rows, mkto_loss


def by_hand(ratio, correct, kl, eta, good=1.0, bad=1.0):
    """A row at a time, in the words of equation 15 (with eta once)."""
    kl = max(kl, 0.0)
    total = 0.0
    for r, right in zip(ratio, correct, strict=True):
        value = 1 / (1 + np.exp(-eta * (r - kl if right else kl - r)))
        total += (good if right else bad) * (1 - value)
    return total / len(ratio)


def rows(count=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=count) * 5, rng.random(count) < 0.6


@pytest.mark.parametrize("kl", [-2.0, 0.0, 1.7])
@pytest.mark.parametrize("lambdas", [(1.0, 1.0), (1.3, 0.6)])
def test_loss_and_slopes_equal_the_formula(kl, lambdas):
    ratio, correct = rows()
    good, bad = lambdas
    with jax.enable_x64(True):
        value, slopes = jax.value_and_grad(
            lambda r: mkto_loss(r, correct, kl, eta=0.4, lambda_correct=good, lambda_wrong=bad)[0]
        )(jnp.asarray(ratio))
    assert float(value) == pytest.approx(by_hand(ratio, correct, kl, 0.4, good, bad), rel=1e-12)
    for i in range(len(ratio)):
        step = np.eye(len(ratio))[i] * 1e-5
        rise = by_hand(ratio + step, correct, kl, 0.4, good, bad)
        fall = by_hand(ratio - step, correct, kl, 0.4, good, bad)
        assert slopes[i] == pytest.approx((rise - fall) / 2e-5, abs=1e-9)


def test_step_zero_is_one_half():
    loss, metrics = mkto_loss(np.zeros(3), np.array([True, False, True]), 0.0, eta=0.1)
    assert float(loss) == 0.5
    assert float(metrics["rewards/margins"]) == 0.0


def test_correct_is_pushed_up_and_wrong_down():
    slopes = jax.grad(lambda r: mkto_loss(r, np.array([1, 0]), 0.3, eta=0.1)[0])(jnp.zeros(2))
    assert slopes[0] < 0 < slopes[1]


def test_no_gradient_goes_through_the_reference_point():
    ratio, correct = rows()

    def loss(shift):
        mismatched = jnp.asarray(ratio) + shift
        return mkto_loss(ratio, correct, kl_estimate(mismatched), eta=0.4)[0]

    assert float(jax.grad(loss)(5.0)) == 0.0
    assert float(jax.grad(lambda kl: mkto_loss(ratio, correct, kl, eta=0.4)[0])(1.0)) == 0.0
    assert float(loss(5.0)) != float(loss(0.0))


def test_metrics_are_means_over_each_class():
    ratio, correct = rows(count=9, seed=1)
    _, metrics = jax.jit(mkto_loss)(ratio, correct, 0.7, eta=0.4)
    assert float(metrics["rewards/chosen"]) == pytest.approx(0.4 * ratio[correct].mean(), rel=1e-5)
    assert float(metrics["rewards/rejected"]) == pytest.approx(
        0.4 * ratio[~correct].mean(), rel=1e-5
    )
    assert float(metrics["rewards/margins"]) == pytest.approx(
        0.4 * (ratio[correct].mean() - ratio[~correct].mean()), rel=1e-5
    )
    assert float(metrics["kl"]) == pytest.approx(0.7)
    assert metrics["count/chosen"] == correct.sum()
    assert metrics["count/rejected"] == (~correct).sum()


def test_a_clamped_reference_point_is_reported_as_0():
    _, metrics = mkto_loss(*rows(), -3.0, eta=0.4)
    assert float(metrics["kl"]) == 0.0


@pytest.mark.parametrize("side", [True, False])
def test_a_one_sided_batch_has_a_loss_and_no_mean_of_the_other_side(side):
    ratio, correct = rows()[0], np.full(7, side)
    loss, slopes = jax.value_and_grad(lambda r: mkto_loss(r, correct, 0.2, eta=0.4)[0])(
        jnp.asarray(ratio)
    )
    assert float(loss) == pytest.approx(by_hand(ratio, correct, 0.2, 0.4), rel=1e-5)
    assert np.all(np.isfinite(slopes))
    _, metrics = mkto_loss(ratio, correct, 0.2, eta=0.4)
    present, empty = ("chosen", "rejected") if side else ("rejected", "chosen")
    assert np.isfinite(metrics[f"rewards/{present}"])
    assert np.isnan(metrics[f"rewards/{empty}"])
    assert metrics[f"count/{empty}"] == 0


def test_padding_of_weight_0_changes_nothing():
    ratio, correct = rows()
    whole, expected = mkto_loss(ratio, correct, 0.2, eta=0.4)
    padded, metrics = mkto_loss(
        np.append(ratio, [9.0, 0.0]), np.append(correct, [True, False]), 0.2, eta=0.4,
        weights=np.append(np.full(7, 1 / 7), [0.0, 0.0]),
    )  # fmt: skip
    assert float(padded) == pytest.approx(float(whole), rel=1e-6)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), name


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_ragged_shares_add_up_to_the_batch(cut):
    ratio, correct = rows()
    correct[cut:] = False  # one share may lack a class that the batch has
    correct[0] = True
    whole, expected = mkto_loss(ratio, correct, 0.2, eta=0.4)
    totals = (correct.sum() / 7, (~correct).sum() / 7)
    parts = [
        mkto_loss(
            ratio[s], correct[s], 0.2, eta=0.4, weights=np.full(len(ratio[s]), 1 / 7), totals=totals
        )
        for s in (slice(0, cut), slice(cut, None))
    ]
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole), rel=1e-6)
    for name, value in expected.items():
        total = sum(float(metrics[name]) for _, metrics in parts)
        assert total == pytest.approx(float(value), rel=1e-5), name


def test_a_vector_of_reference_points_is_refused():
    with pytest.raises(ValueError, match=r"kl: shape \(7,\) given; one number"):
        mkto_loss(*rows(), np.zeros(7), eta=0.1)


def test_kl_estimates():
    ratio = np.array([1.0, -4.0, 2.0, 9.0])
    weights = np.array([1 / 3, 1 / 3, 1 / 3, 0])
    for convention in ("mismatched", "batch_mean"):
        assert float(kl_estimate(ratio, convention=convention)) == pytest.approx(2.0)
        # Not clamped yet: another share may raise the sum above 0.
        assert float(kl_estimate(ratio, weights, convention=convention)) == pytest.approx(-1 / 3)
    assert float(kl_estimate(ratio, convention="zero")) == 0.0
    with pytest.raises(ValueError, match="'mean' is none of mismatched, batch_mean, zero"):
        kl_estimate(ratio, convention="mean")


@pytest.mark.parametrize(
    "problems",
    [[1, 2], [1, 1, 2, 2], [1, 1, 2, 2, 3], ["b", "a", "b", "c", "a", "a"], [5, 4, 3, 2, 1]],
)
def test_every_completion_goes_to_another_problem_once(problems):
    borrowed = mismatched_rows(problems)
    assert sorted(borrowed) == list(range(len(problems)))
    assert all(problems[i] != problems[j] for i, j in enumerate(borrowed))


def test_a_problem_with_most_rows_shares_some_with_itself():
    assert sorted(mismatched_rows([1, 1, 1, 2])) == [0, 1, 2, 3]
    assert mismatched_rows([1]).tolist() == [0]
    assert mismatched_rows([]).tolist() == []
