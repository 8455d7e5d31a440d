import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.model import attention
from mdpo_jax.model.attention import attend, attend_cache


def _draw(length, heads=4, kv_heads=2, rows=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, h, 8) for h in (heads, kv_heads, kv_heads)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _by_hand(q, k, v, segments, scale):
    """float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    ratio = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
        scores = np.array([q[b, t, h] @ k[b, s, h // ratio] * scale for s in seen])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, seen, h // ratio]
    return out


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block", [512, 4])
def test_packed_segments_by_hand(kv_heads, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    q, k, v = _draw(11, kv_heads=kv_heads)
    run = functools.partial(attend, segments=jnp.asarray(SEGMENTS), scale=0.3)
    got = jax.jit(run)(q, k, v)
    np.testing.assert_allclose(got, _by_hand(q, k, v, SEGMENTS, 0.3), atol=2e-6)


def test_blocks_do_not_change_the_gradient(monkeypatch):
    q, k, v = _draw(11)

    def loss(*qkv):
        return jnp.sum(jnp.sin(attend(*qkv, segments=jnp.asarray(SEGMENTS), scale=0.3)))

    whole = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    monkeypatch.setattr(attention, "BLOCK", 4)
    blocks = jax.jit(jax.grad(lambda *qkv: loss(*qkv), (0, 1, 2)))(q, k, v)
    for a, b in zip(whole, blocks, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("block", [512, 4])
def test_a_cache_gives_what_a_row_gives(block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    q, k, v = _draw(11)
    run = functools.partial(attend, segments=jnp.ones((2, 11), jnp.int32), scale=0.3)
    whole = np.asarray(jax.jit(run)(q, k, v))
    # What lies in the cache beyond a query's position is never seen.
    junk = [(0, 0), (0, 5), (0, 0), (0, 0)]
    k, v = (np.pad(x, junk, constant_values=1e6) for x in (k, v))
    positions = np.arange(3, 11) * np.ones((2, 1), np.int32)
    run = jax.jit(functools.partial(attend_cache, scale=0.3))
    places = np.arange(16)[None]
    got = run(q[:, 3:], k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), positions, places)
    np.testing.assert_allclose(got, whole[:, 3:], atol=2e-6)


def test_an_unknown_backend_is_refused_by_name():
    q, k, v = _draw(11)
    with pytest.raises(
        ValueError, match="backend: 'flash'; expected one of auto, reference, skipping"
    ):
        attend(q, k, v, segments=jnp.asarray(SEGMENTS), scale=1.0, backend="flash")
