"""Causal attention over packed rows and over a cache; softmax in float32.

Suffixes: B rows, T queries, S keys, H query heads, G key heads, M = H / G, K head_dim.
Query head h reads key head h // M.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 512  # queries whose scores exist at one time
MASKED = -1e30  # finite, so that a row without keys gives a mean and not NaN


def attend(
    q_BTHK: Float[Array, "rows length heads head_dim"],
    k_BSGK: Float[Array, "rows length kv_heads head_dim"],
    v_BSGK: Float[Array, "rows length kv_heads head_dim"],
    *,
    segments: Int[Array, "rows length"],
    scale: float,
    backend: str = "reference",
) -> Float[Array, "rows length heads head_dim"]:
    """Each token attends to those of its segment at or before its place in the row.

    Padding (segment 0) attends to padding: garbage that nothing reads, but finite.
    Raises ValueError for a backend that is not in `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; expected one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](q_BTHK, k_BSGK, v_BSGK, segments, scale)


def _reference(q_BTHK, k_BSGK, v_BSGK, segments_BT, scale):
    """Plain einsums, in blocks of queries that see only the keys before the block's end.

    block 0  |x      |      scores of one block are [B, G, M, BLOCK, S] and are computed
    block 1  |xxxx   |      again in the backward pass, so that no [T, T] array is kept
    block 2  |xxxxxxx|
    """
    length = q_BTHK.shape[1]

    def block(start: int, stop: int, q, k, v, segments):
        places = jnp.arange(stop)
        mask_BTS = segments[:, start:stop, None] == segments[:, None, :stop]
        mask_BTS &= places[start:, None] >= places[None, :]
        k_BGKS = k[:, :stop].transpose(0, 2, 3, 1)
        v_BGSK = v[:, :stop].transpose(0, 2, 1, 3)
        return _masked(q[:, start:stop], k_BGKS, v_BGSK, mask_BTS, scale)

    if length <= BLOCK:
        return block(0, length, q_BTHK, k_BSGK, v_BSGK, segments_BT)
    block = jax.checkpoint(block, static_argnums=(0, 1), prevent_cse=False)
    blocks = [block(a, b, q_BTHK, k_BSGK, v_BSGK, segments_BT) for a, b in _spans(length)]
    return jnp.concatenate(blocks, axis=1)


BACKENDS = {"reference": _reference}


def attend_cache(
    q_BTHK: Float[Array, "rows new heads head_dim"],
    k_BGKS: Float[Array, "rows kv_heads head_dim length"],
    v_BGSK: Float[Array, "rows kv_heads length head_dim"],
    positions_BT: Int[Array, "rows new"],
    *,
    scale: float,
) -> Float[Array, "rows new heads head_dim"]:
    """A query at position p attends to the cache's positions 0..p."""
    places_S = jnp.arange(v_BGSK.shape[2])
    blocks = [
        _masked(q_BTHK[:, a:b], k_BGKS, v_BGSK, places_S <= positions_BT[:, a:b, None], scale)
        for a, b in _spans(q_BTHK.shape[1])
    ]
    return jnp.concatenate(blocks, axis=1)


def _spans(length: int) -> list[tuple[int, int]]:
    """Blocks of queries."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _masked(q_BTHK, k_BGKS, v_BGSK, mask_BTS, scale):
    """Attention under a boolean mask; float32 scores and softmax, weights in the values' dtype."""
    b, t, h, k = q_BTHK.shape
    g = k_BGKS.shape[1]
    q_BGMTK = (q_BTHK * jnp.asarray(scale, q_BTHK.dtype)).reshape(b, t, g, h // g, k)
    q_BGMTK = q_BGMTK.transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bgmtk,bgks->bgmts", q_BGMTK, k_BGKS, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BGSK.dtype)
    out_BGMTK = jnp.einsum("bgmts,bgsk->bgmtk", weights, v_BGSK)
    return out_BGMTK.transpose(0, 3, 1, 2, 4).reshape(b, t, h, k).astype(q_BTHK.dtype)
