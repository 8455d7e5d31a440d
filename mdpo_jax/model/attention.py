"""Causal attention over packed rows and over a cache; softmax in float32.

Suffixes: B rows, T queries, S keys, H query heads, G key heads, M = H / G, K head_dim.
Query head h reads key head h // M.  A window of W lets a token see itself and the W - 1 before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdpo_jax.model.kernels import KERNELS, Prefix, choose, visible
from mdpo_jax.model.skipping import skipping

BLOCK = 512  # queries whose scores exist at one time
MASKED = -1e30  # finite, so that a row without keys gives a mean and not NaN


def attend(
    q_BTHK: Float[Array, "rows length heads head_dim"],
    k_BSGK: Float[Array, "rows length kv_heads head_dim"],
    v_BSGK: Float[Array, "rows length kv_heads head_dim"],
    *,
    segments: Int[Array, "rows length"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    prefix: Prefix | None = None,
    backend: str = "auto",
) -> Float[Array, "rows length heads head_dim"]:
    """Each token attends to those of its segment and of its prefix at or before its place in the row.

    softcap: cap * tanh(score / cap), before the mask.  Padding (segment 0) attends to padding, or
    gives 0: garbage that nothing reads, but finite.  backend: `auto` takes what kernels.py has for the
    platform.  Raises ValueError for a backend that is not known or cannot compute this.
    """
    if backend == "auto":
        backend = choose(
            jax.default_backend(), window=window, softcap=softcap, head_dim=q_BTHK.shape[-1],
            length=q_BTHK.shape[1], dtype=q_BTHK.dtype,
        )  # fmt: skip
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; expected one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](
        q_BTHK, k_BSGK, v_BSGK, segments, scale=scale, window=window, softcap=softcap, prefix=prefix
    )


def _reference(q_BTHK, k_BSGK, v_BSGK, segments_BT, *, scale, window, softcap, prefix):
    """Plain einsums, in blocks of queries that see only the keys that they can reach.

    block 0  |x      |      scores of one block are [B, G, M, BLOCK, S] and are computed
    block 1  |xxxx   |      again in the backward pass, so that no [T, T] array is kept;
    block 2  |  xxxxx|      a window leaves out what lies before it
    """
    length = q_BTHK.shape[1]

    def block(start: int, stop: int, q, k, v, segments, prefix):
        first = 0 if window is None or prefix is not None else max(0, start - window + 1)
        mask_BTS = visible(segments, prefix, first, start, stop, window)
        k_BGKS = k[:, first:stop].transpose(0, 2, 3, 1)
        v_BGSK = v[:, first:stop].transpose(0, 2, 1, 3)
        return _masked(q[:, start:stop], k_BGKS, v_BGSK, mask_BTS, scale, softcap)

    if length <= BLOCK:
        return block(0, length, q_BTHK, k_BSGK, v_BSGK, segments_BT, prefix)
    block = jax.checkpoint(block, static_argnums=(0, 1), prevent_cse=False)
    blocks = [block(a, b, q_BTHK, k_BSGK, v_BSGK, segments_BT, prefix) for a, b in _spans(length)]
    return jnp.concatenate(blocks, axis=1)


BACKENDS = {"reference": _reference, "skipping": skipping, **KERNELS}


def attend_cache(
    q_BTHK: Float[Array, "rows new heads head_dim"],
    k_BGKS: Float[Array, "rows kv_heads head_dim length"],
    v_BGSK: Float[Array, "rows kv_heads length head_dim"],
    positions_BT: Int[Array, "rows new"],
    places_BS: Int[Array, "rows_or_1 length"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "rows new heads head_dim"]:
    """A query at position p attends to the keys whose place is in 0..p, and in its window.

    places: the position of the token that each entry of the cache holds, negative for none.
    """
    places = places_BS[:, None, :]
    blocks = []
    for a, b in _spans(q_BTHK.shape[1]):
        mask_BTS = (places >= 0) & _causal(positions_BT[:, a:b, None], places, window)
        blocks.append(_masked(q_BTHK[:, a:b], k_BGKS, v_BGSK, mask_BTS, scale, softcap))
    return jnp.concatenate(blocks, axis=1)


def _causal(queries, keys, window):
    """Which keys a query may see, by their places."""
    mask = queries >= keys
    return mask if window is None else mask & (queries - keys < window)


def _spans(length: int) -> list[tuple[int, int]]:
    """Blocks of queries."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _masked(q_BTHK, k_BGKS, v_BGSK, mask_BTS, scale, softcap):
    """Attention under a boolean mask; float32 scores and softmax, weights in the values' dtype."""
    b, t, h, k = q_BTHK.shape
    g = k_BGKS.shape[1]
    q_BGMTK = (q_BTHK * jnp.asarray(scale, q_BTHK.dtype)).reshape(b, t, g, h // g, k)
    q_BGMTK = q_BGMTK.transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bgmtk,bgks->bgmts", q_BGMTK, k_BGKS, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BGSK.dtype)
    out_BGMTK = jnp.einsum("bgmts,bgsk->bgmtk", weights, v_BGSK)
    return out_BGMTK.transpose(0, 3, 1, 2, 4).reshape(b, t, h, k).astype(q_BTHK.dtype)
