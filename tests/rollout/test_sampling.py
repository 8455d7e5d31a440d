"""Draws against probabilities that float64 numpy computes by sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.rollout.sampling import GREEDY, Sampling, draw, masses

_DRAWS = 20_000
_draw = jax.jit(draw)
_masses = jax.jit(masses)


def traced(*values):
    return Sampling(*(kind(v) for kind, v in zip((np.float32, np.int32, np.float32), values)))  # noqa: B905


def expected(logits, temperature, top_k, top_p):
    """By the definition: sort, keep k, keep the fewest that hold the share."""
    logits = np.float64(logits) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        count = np.searchsorted(np.cumsum(p[order]), top_p) + 1
        p[order[count:]] = 0
    return p / p.sum()


CASES = [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 5, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.6), (1.0, 0, 1e-6),
    (1.3, 7, 0.8), (1.0, 10_000, 1.0), (0.05, 0, 0.999),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [9, 300])
def test_what_is_drawn_from(case, vocab):
    logits = np.random.default_rng(vocab).normal(size=(4, vocab)).astype(np.float32) * 2
    found = np.float64(_masses(logits, traced(*case)))
    for row, of in zip(found, logits, strict=True):
        np.testing.assert_allclose(row / row.sum(), expected(of, *case), atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_frequencies(case):
    """Chi-square over 300 tokens, that is three blocks of the vocabulary."""
    logits = np.random.default_rng(1).normal(size=300).astype(np.float32) * 2
    keys = jax.random.split(jax.random.key(5), _DRAWS)
    tokens, log_probs = _draw(jnp.tile(logits, (_DRAWS, 1)), keys, traced(*case))
    p = expected(logits, *case)
    counts = np.bincount(tokens, minlength=300)
    assert not counts[p == 0].any()
    often = p * _DRAWS >= 5
    chi = ((counts - p * _DRAWS) ** 2)[often] / (p * _DRAWS)[often]
    freedom = max(1, often.sum() - 1)
    assert chi.sum() < freedom + 5 * np.sqrt(2 * freedom) + 5
    # The log-prob kept is the policy's, whatever was drawn from.
    policy = np.log(expected(logits, 1.0, 0, 1.0))
    np.testing.assert_allclose(log_probs, policy[np.asarray(tokens)], atol=1e-5)


def test_ties_with_the_last_one_are_kept():
    logits = np.log(np.array([[0.1, 0.3, 0.2, 0.2, 0.2]], np.float32))
    for case in ((1.0, 2, 1.0), (1.0, 0, 0.45)):
        assert (np.asarray(_masses(logits, traced(*case)))[0] > 0).tolist() == [False] + [True] * 4


def test_nothing_of_mass_zero_is_drawn_at_the_ends():
    """All mass in one entry, first, last or at a block's edge: whatever the uniform."""
    for place in (0, 127, 128, 255, 256, 299):
        logits = np.full((512, 300), -1e4, np.float32)
        logits[:, place] = 0
        tokens, log_probs = _draw(logits, jax.random.split(jax.random.key(0), 512), traced(1, 0, 1))
        assert set(np.asarray(tokens).tolist()) == {place}
        assert not np.asarray(log_probs).any()


def test_greedy_takes_the_first_of_the_most_probable_whatever_else_is_asked():
    logits = np.array([[1.0, 3.0, 3.0, 2.0]], np.float32)
    for case in (GREEDY, (0.0, 3, 0.5)):
        assert _draw(logits, jax.random.split(jax.random.key(0), 1), traced(*case))[0] == 1


def test_no_setting_compiles_anew():
    logits, keys = jnp.zeros((2, 40)), jax.random.split(jax.random.key(0), 2)
    _draw(logits, keys, traced(1.0, 0, 1.0))
    before = _draw._cache_size()
    for case in CASES:
        _draw(logits, keys, traced(*case))
    assert _draw._cache_size() == before


def test_the_policy_itself():
    assert Sampling().of_the_policy
    for other in (GREEDY, Sampling(0.5), Sampling(top_k=3), Sampling(top_p=0.9)):
        assert not other.of_the_policy
