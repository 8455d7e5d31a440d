"""Packed causal attention that computes only the blocks in which some query sees some key.

    row      | seq 1 seq 1 seq 1 seq 1 | seq 3 seq 3 |        of 10 blocks under the triangle
    block 0  |x    |                                          6 hold a key that is seen
    block 1  |x    |x    |
    block 2  |     |     |x    |        block 2 begins in seq 3: its keys begin there
    block 3  |     |     |x    |x    |

A segment that goes on from another one (kernels.Prefix) sees two runs of blocks: that one's, its own.

Which blocks those are is data, so the loops over them have traced bounds: nothing compiles anew, and
the gradient is written by hand (softmax over blocks as they come, Milakov & Gimelshein 2018; its
gradient from the row's log-sum-exp, Dao et al. 2022).  In plain jax, for processors that run a loop's
body as fast alone as in a batch; accelerators have kernels (kernels.py).

Suffixes: B rows, T queries, S keys, H query heads, G key heads, M = H / G, K head_dim, N blocks of a
row, C tokens of a block, R = M * C queries that share a key head.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mdpo_jax.model.kernels import Prefix, check, on_mesh

BLOCK = 64  # as fast as 128 for long segments, faster for short ones
_MASKED = -1e30  # finite, so that what no query sees gives 0 and not NaN
_LEAST = 1e-30


class _Packed(NamedTuple):
    """A row's blocks: segments and positions [N C], bounds of prefixes [N C 2]."""

    segments: Any
    positions: Any
    bounds: Any


class _Scores(NamedTuple):
    """What scores are made by: q . k * scale, capped, within a window of keys."""

    scale: float
    window: int | None
    softcap: float | None


def skipping(
    q_BTHK: Float[Array, "rows length heads head_dim"],
    k_BSGK: Float[Array, "rows length kv_heads head_dim"],
    v_BSGK: Float[Array, "rows length kv_heads head_dim"],
    segments_BT: Int[Array, "rows length"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    prefix: Prefix | None = None,
) -> Float[Array, "rows length heads head_dim"]:
    """Attention over packed rows, each segment in one piece; float32 scores, softmax and sums.

    Blocks of padding (segment 0) alone give 0.  Raises ValueError for a window below 1.
    """
    check("skipping", q_BTHK, k_BSGK, window)
    local = functools.partial(_rows, scores=_Scores(scale, window, softcap))
    if prefix is None:  # places serve as positions: only their differences count
        places = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
        prefix = Prefix(jnp.zeros((*segments_BT.shape, 2), jnp.int32), places)
    packed = _Packed(segments_BT, prefix.positions, prefix.bounds)
    return on_mesh(local, q_BTHK, k_BSGK, v_BSGK, packed)


def _rows(q_BTHK, k_BSGK, v_BSGK, packed: _Packed, scores: _Scores) -> jax.Array:
    length = q_BTHK.shape[1]

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, -length % BLOCK), *[(0, 0)] * (x.ndim - 2)))

    groups = k_BSGK.shape[2]
    q, k, v = (_blocked(padded(x), groups) for x in (q_BTHK, k_BSGK, v_BSGK))
    packed = jax.tree.map(padded, packed)
    blocks = jax.tree.map(lambda x: x.reshape(len(x), -1, BLOCK, *x.shape[2:]), packed)
    out: Any = _attend(scores, q, k, v, blocks)
    return _unblocked(out, groups)[:, :length]


def _blocked(x_BTHK: jax.Array, groups: int) -> jax.Array:
    """[B N G R K]: the heads of a group beside each other, so that a block is one product."""
    b, t, h, k = x_BTHK.shape
    x = x_BTHK.reshape(b, t // BLOCK, BLOCK, groups, h // groups, k)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(b, t // BLOCK, groups, -1, k)


def _unblocked(x_BNGRK: jax.Array, groups: int) -> jax.Array:
    b, n, g, r, k = x_BNGRK.shape
    x = x_BNGRK.reshape(b, n, g, r // BLOCK, BLOCK, k)
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(b, n * BLOCK, -1, k)


def _runs(packed: _Packed, window: int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[N] each: for every block of queries the first block of keys of its own segments, N for one of
    padding alone, and where the run of blocks of their prefixes begins and how many it has.

    A block's prefixes but one lie within the block or its own run: of the segments that begin in
    it, all stand before these.
    """
    size = packed.segments.shape[1]
    own_N = _first(packed.segments, window)
    begin_NC, end_NC = packed.bounds[..., 0], packed.bounds[..., 1]
    before_NC = (end_NC > begin_NC) & (begin_NC < own_N[:, None] * size)
    far = packed.segments.size
    begin_N = jnp.min(jnp.where(before_NC, begin_NC, far), axis=1) // size
    end_N = -(-jnp.max(jnp.where(before_NC, end_NC, 0), axis=1) // size)
    count_N = jnp.maximum(jnp.minimum(end_N, own_N) - begin_N, 0)
    return own_N, begin_N, count_N


def _first(segments_NC: jax.Array, window: int | None) -> jax.Array:
    """[N] of `_runs`, by segments and window alone."""
    count, size = segments_NC.shape
    flat_T = segments_NC.reshape(-1)
    places_T = jnp.arange(count * size)
    begins_T = jnp.concatenate([jnp.ones(1, bool), flat_T[1:] != flat_T[:-1]])
    start_T = jax.lax.cummax(jnp.where(begins_T, places_T, 0))
    start_N = start_T[::size]
    if window is not None:
        start_N = jnp.maximum(start_N, places_T[::size] - window + 1)
    return jnp.where(jnp.any(segments_NC > 0, axis=1), start_N // size, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scores, q_BNGRK, k_BNGCK, v_BNGCK, packed):
    return _forward(scores, q_BNGRK, k_BNGCK, v_BNGCK, packed)[0]


def _forward(scores, q_BNGRK, k_BNGCK, v_BNGCK, packed):
    """The output, and the log-sum-exp of each query's scores [B N G R]."""

    def row(arrays):
        q_NGRK, k_NGCK, v_NGCK, packed = arrays

        def queries(block):
            i, runs, q_GRK = block

            def keys(n, carry):
                j = _key_block(runs, n)
                top_GR, sum_GR, out_GRK = carry
                scores_GRC, _ = _scores(scores, q_GRK, k_NGCK[j], packed, i, j)
                new_GR = jnp.maximum(top_GR, jnp.max(scores_GRC, axis=-1))
                weights_GRC = jnp.exp(scores_GRC - new_GR[..., None])
                faded_GR = jnp.exp(top_GR - new_GR)
                more_GRK = _product("grc,gck->grk", weights_GRC.astype(v_NGCK.dtype), v_NGCK[j])
                sum_GR = sum_GR * faded_GR + jnp.sum(weights_GRC, axis=-1)
                return new_GR, sum_GR, out_GRK * faded_GR[..., None] + more_GRK

            nothing = jnp.zeros(q_GRK.shape[:2], jnp.float32)
            start = nothing + _MASKED, nothing, jnp.zeros(q_GRK.shape, jnp.float32)
            top_GR, sum_GR, out_GRK = jax.lax.fori_loop(0, _key_blocks(runs, i), keys, start)
            sum_GR = jnp.maximum(sum_GR, _LEAST)
            return (out_GRK / sum_GR[..., None]).astype(q_GRK.dtype), top_GR + jnp.log(sum_GR)

        runs = _runs(packed, scores.window)
        return jax.lax.map(queries, (jnp.arange(len(q_NGRK)), runs, q_NGRK))

    return jax.lax.map(row, (q_BNGRK, k_BNGCK, v_BNGCK, packed))


def _key_block(runs, n):
    """The n-th block of keys of a block of queries: its prefixes' first, then its own."""
    own, begin, count = runs
    return jnp.where(n < count, begin + n, own + n - count)


def _key_blocks(runs, i):
    """How many blocks of keys block i of queries has."""
    own, _, count = runs
    return count + jnp.maximum(i + 1 - own, 0)


def _forward_kept(scores, *arrays):
    out, total = _forward(scores, *arrays)
    return out, (*arrays, out, total)


def _backward(scores, kept, given_BNGRK):
    q, k, v, packed, out, total = kept

    def row(arrays):
        q_NGRK, k_NGCK, v_NGCK, packed, total_NGR, delta_NGR, given_NGRK = arrays

        def queries(carry, block):
            i, runs, q_GRK, total_GR, delta_GR, given_GRK = block

            def keys(n, sums):
                j = _key_block(runs, n)
                dq_GRK, dk_NGCK, dv_NGCK = sums
                scores_GRC, slope = _scores(scores, q_GRK, k_NGCK[j], packed, i, j)
                weights_GRC = jnp.exp(scores_GRC - total_GR[..., None])
                given_GRC = _product("grk,gck->grc", given_GRK, v_NGCK[j])
                ds_GRC = weights_GRC * (given_GRC - delta_GR[..., None]) * slope
                ds_GRC = ds_GRC.astype(q_GRK.dtype)
                dv_GCK = _product("grc,grk->gck", weights_GRC.astype(q_GRK.dtype), given_GRK)
                dk_GCK = _product("grc,grk->gck", ds_GRC, q_GRK)
                dq_GRK += _product("grc,gck->grk", ds_GRC, k_NGCK[j])
                return dq_GRK, dk_NGCK.at[j].add(dk_GCK), dv_NGCK.at[j].add(dv_GCK)

            nothing = jnp.zeros(q_GRK.shape, jnp.float32)
            start = (nothing, *carry)
            dq_GRK, *carry = jax.lax.fori_loop(0, _key_blocks(runs, i), keys, start)
            return tuple(carry), dq_GRK

        blocks = (
            jnp.arange(len(q_NGRK)), _runs(packed, scores.window), q_NGRK, total_NGR, delta_NGR,
            given_NGRK,
        )  # fmt: skip
        nothing = jnp.zeros(k_NGCK.shape, jnp.float32)
        (dk_NGCK, dv_NGCK), dq_NGRK = jax.lax.scan(queries, (nothing, nothing), blocks)
        return dq_NGRK * scores.scale, dk_NGCK * scores.scale, dv_NGCK

    delta = jnp.sum(out.astype(jnp.float32) * given_BNGRK.astype(jnp.float32), axis=-1)
    dq, dk, dv = jax.lax.map(row, (q, k, v, packed, total, delta, given_BNGRK))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward_kept, _backward)


def _scores(scores: _Scores, q_GRK, k_GCK, packed: _Packed, i, j) -> tuple[jax.Array, Any]:
    """Scores of query block i and key block j, masked; and what their gradient is multiplied by."""
    s_GRC = _product("grk,gck->grc", q_GRK, k_GCK) * scores.scale
    slope: Any = 1.0
    if scores.softcap is not None:
        capped = jnp.tanh(s_GRC / scores.softcap)
        s_GRC, slope = scores.softcap * capped, 1 - capped * capped
    size = packed.segments.shape[1]
    queries, keys = (i * size + jnp.arange(size))[:, None], j * size + jnp.arange(size)
    mask_CC = packed.segments[i][:, None] == packed.segments[j]
    mask_CC |= (keys >= packed.bounds[i][:, :1]) & (keys < packed.bounds[i][:, 1:])
    mask_CC &= queries >= keys
    if scores.window is not None:
        mask_CC &= packed.positions[i][:, None] - packed.positions[j] < scores.window
    mask_RC = jnp.tile(mask_CC, (q_GRK.shape[1] // size, 1))
    return jnp.where(mask_RC, s_GRC, _MASKED), slope


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
