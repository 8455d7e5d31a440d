"""The loss against float64 numpy by hand, and its gradient against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.objectives import mdpo_loss, token_log_probs


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


def kind_by_hand(kind, chosen, rejected, eta, smoothing, margin, lengths):
    """TRL's definitions, a pair at a time."""
    total = 0.0
    for w, lose, m, n_w, n_l in zip(chosen, rejected, margin, *lengths, strict=True):
        z = eta * (w / n_w - lose / n_l) - m
        good, bad = -np.log1p(np.exp(-z)), -np.log1p(np.exp(z))
        total += {
            "sigmoid": -(1 - smoothing) * good - smoothing * bad,
            "robust": (-(1 - smoothing) * good + smoothing * bad) / (1 - 2 * smoothing),
            "hinge": max(0.0, 1 - z),
            "ipo": (w / n_w - lose / n_l - m / eta - 1 / (2 * eta)) ** 2,
        }[kind]
    return total / len(chosen)


KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.0), ("robust", 0.2), ("hinge", 0.0)]
KINDS += [("ipo", 0.0)]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("kind", "smoothing"), KINDS)
def test_every_kind_equals_its_formula_and_its_slopes(kind, smoothing, normalised):
    rng = np.random.default_rng(3)
    chosen, rejected = rng.normal(size=(2, 6)) * 4
    margin = rng.normal(size=6)
    lengths = rng.integers(1, 9, (2, 6)).astype(float) if normalised else np.ones((2, 6))
    options = {"eta": 0.3, "kind": kind, "label_smoothing": smoothing, "margin": margin}
    if normalised:
        options["lengths"] = tuple(lengths)
    reference = (kind, chosen, rejected, 0.3, smoothing, margin, lengths)
    with jax.enable_x64(True):
        value, slopes = jax.value_and_grad(lambda both: mdpo_loss(both[0], both[1], **options)[0])(
            jnp.stack([chosen, rejected])
        )
    assert value.dtype == np.float64
    assert float(value) == pytest.approx(kind_by_hand(*reference), rel=1e-12)
    for place in np.ndindex(2, 6):
        shifted = []
        for step in (1e-5, -1e-5):
            both = np.stack([chosen, rejected])
            both[place] += step
            shifted.append(kind_by_hand(kind, *both, *reference[3:]))
        assert slopes[place] == pytest.approx((shifted[0] - shifted[1]) / 2e-5, abs=1e-8)


def test_the_default_is_bit_equal_to_the_plain_expression():
    rng = np.random.default_rng(4)
    chosen, rejected = (rng.normal(size=(2, 33)) * 30).astype(np.float32)
    loss, _ = mdpo_loss(chosen, rejected, eta=0.1)
    z = 0.1 * jnp.asarray(chosen) - 0.1 * jnp.asarray(rejected) - 0.0
    plain = jnp.sum(
        jnp.full(33, 1 / 33) * (-(1 - 0.0) * jax.nn.log_sigmoid(z) - 0.0 * jax.nn.log_sigmoid(-z))
    )
    assert float(loss) == float(plain)
    # Compiled, only the order of the sum may differ.
    compiled = jax.jit(mdpo_loss, static_argnames=("eta", "kind"))(chosen, rejected, eta=0.1)[0]
    assert float(compiled) == pytest.approx(float(plain), rel=1e-6)


def test_metrics_are_those_of_sums_whatever_the_kind():
    chosen, rejected = np.array([4.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0])
    for kind in ("sigmoid", "ipo", "hinge", "robust"):
        _, metrics = mdpo_loss(
            chosen, rejected, eta=0.5, kind=kind, lengths=(np.full(3, 2), np.full(3, 4))
        )
        assert float(metrics["rewards/chosen"]) == pytest.approx(3.5 / 3)
        assert float(metrics["rewards/rejected"]) == pytest.approx(1.0)
        assert float(metrics["rewards/margins"]) == pytest.approx(0.5 / 3)
        assert float(metrics["rewards/accuracies"]) == pytest.approx(1 / 3)


def test_gradients_of_extreme_log_ratios_are_finite():
    far = np.array([1e4, -1e4], np.float32)
    for kind in ("sigmoid", "robust", "hinge", "ipo"):
        gradient = jax.grad(lambda c, kind=kind: mdpo_loss(c, -far, eta=1.0, kind=kind)[0])(far)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "slic"}, "kind: 'slic' is none of sigmoid, ipo, hinge, robust"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "label_smoothing: 0.1 given, but hinge"),
        ({"kind": "robust", "label_smoothing": 0.5}, "robust takes 0 <= e < 0.5"),
    ],
)
def test_refusals_name_the_field_and_what_is_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        mdpo_loss(np.zeros(2), np.zeros(2), eta=0.1, **options)


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


def test_no_chunk_keeps_a_table_for_the_backward_pass():
    vocab, width, tokens = 2048, 16, 512
    shapes = [(2, tokens, width), (vocab, width)]
    hidden, table = (jnp.zeros(shape) for shape in shapes)
    ids = jnp.zeros((2, tokens), jnp.int32)

    def temporary(chunk):
        def total(hidden, table, counted):
            return jnp.sum(token_log_probs(hidden, table, ids, chunk=chunk, counted=counted))

        program = jax.jit(jax.grad(total, (0, 1))).lower(hidden, table, ids > 0).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert (
        temporary(32) - temporary(128) < 4 * table.nbytes
    )  # and not 24, for 32 chunks in place of 8


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [4, 6, 64])  # 64 holds all tokens
def test_log_probs_that_do_not_count_are_zero_and_cost_no_head(chunk, softcap):
    rng = np.random.default_rng(3)
    hidden, table = rng.normal(size=(2, 9, 6)).astype("f"), rng.normal(size=(17, 6)).astype("f")
    targets, counted = rng.integers(0, 17, (2, 9)), np.zeros((2, 9), bool)
    counted[0, [3, 8]] = counted[1, 5] = True

    def total(hidden, table, counted, weights):
        values = token_log_probs(
            hidden, table, targets, chunk=chunk, softcap=softcap, counted=counted
        )
        return jnp.sum(values * weights), values

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, some), gradients = run(hidden, table, counted, np.ones((2, 9), "f"))
    (_, every), wanted = run(hidden, table, np.ones_like(counted), counted.astype("f"))
    np.testing.assert_allclose(some, np.where(counted, every, 0), atol=1e-6)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # What is not computed hands nothing on, not even what is not a number.
    hidden[:, [6, 7]] = np.nan
    _, (_, of_table) = run(hidden, table, counted, np.ones((2, 9), "f"))
    np.testing.assert_array_equal(of_table, gradients[1])
