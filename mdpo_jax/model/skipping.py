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

Scores are [C R], keys before queries: every product of a block then has the form [m k] @ [k n], for
which XLA has a fast kernel on a CPU (lhs contracted over its rows takes half as long again), and what
is summed over keys is summed a vector of queries at a time.
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


class _Queries(NamedTuple):
    """The same of a block's queries, for each head that shares a key head, and their places in the
    row: [R] each.  Bounds apart: scores read them for each key, and XLA reads every other value of
    an array at half the speed."""

    segments: Any
    positions: Any
    begins: Any
    ends: Any
    places: Any


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
    """[B N G K R]: the heads of a group beside each other, so that a block is one product."""
    b, t, h, k = x_BTHK.shape
    x = x_BTHK.reshape(b, t // BLOCK, BLOCK, groups, h // groups, k)
    return x.transpose(0, 1, 3, 5, 4, 2).reshape(b, t // BLOCK, groups, k, -1)


def _unblocked(x_BNGKR: jax.Array, groups: int) -> jax.Array:
    b, n, g, k, r = x_BNGKR.shape
    x = x_BNGKR.reshape(b, n, g, k, r // BLOCK, BLOCK)
    return x.transpose(0, 1, 5, 2, 4, 3).reshape(b, n * BLOCK, -1, k)


def _turned(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _row_sums(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of a * b over the last axis; as matrices, which XLA sums ten times as fast on a CPU."""
    flat_a, flat_b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    return jnp.sum(flat_a * flat_b, axis=-1).reshape(a.shape[:-1])


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
def _attend(scores, q_BNGKR, k_BNGKC, v_BNGKC, packed):
    return _forward(scores, q_BNGKR, k_BNGKC, v_BNGKC, packed)[0]


def _forward(scores, q_BNGKR, k_BNGKC, v_BNGKC, packed):
    """The output, and the log-sum-exp of each query's scores [B N G R]."""

    def row(arrays):
        q_NGKR, k_NGCK, v_NGKC, packed = arrays

        def queries(block):
            i, runs, q_GKR = block
            seen_by = _queries(packed, i, q_GKR.shape[-1])

            def keys(n, carry):
                j = _key_block(runs, n)
                top_GR, sum_GR, out_GKR = carry
                scores_GCR, _ = _scores(scores, q_GKR, k_NGCK[j], packed, seen_by, j)
                new_GR = jnp.maximum(top_GR, jnp.max(scores_GCR, axis=1))
                weights_GCR = jnp.exp(scores_GCR - new_GR[:, None])
                faded_GR = jnp.exp(top_GR - new_GR)
                more_GKR = _product(v_NGKC[j], weights_GCR.astype(v_NGKC.dtype))
                sum_GR = sum_GR * faded_GR + jnp.sum(weights_GCR, axis=1)
                return new_GR, sum_GR, out_GKR * faded_GR[:, None] + more_GKR

            nothing = jnp.zeros((len(q_GKR), q_GKR.shape[-1]), jnp.float32)
            start = nothing + _MASKED, nothing, jnp.zeros(q_GKR.shape, jnp.float32)
            top_GR, sum_GR, out_GKR = jax.lax.fori_loop(0, _key_blocks(runs, i), keys, start)
            sum_GR = jnp.maximum(sum_GR, _LEAST)
            return (out_GKR / sum_GR[:, None]).astype(q_GKR.dtype), top_GR + jnp.log(sum_GR)

        runs = _runs(packed, scores.window)
        return jax.lax.map(queries, (jnp.arange(len(q_NGKR)), runs, q_NGKR))

    return jax.lax.map(row, (q_BNGKR, _turned(k_BNGKC), v_BNGKC, packed))


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


def _backward(scores, kept, given_BNGKR):
    q, k, v, packed, out, total = kept

    def row(arrays):
        (q_NGKR, q_NGRK), (k_NGKC, k_NGCK), v_NGCK, packed, *of_queries = arrays

        def queries(carry, block):
            i, runs, q_GKR, q_GRK, total_GR, delta_GR, given_GKR, given_GRK = block
            seen_by = _queries(packed, i, q_GKR.shape[-1])

            def keys(n, sums):
                j = _key_block(runs, n)
                dq_GKR, dk_NGCK, dv_NGCK = sums
                scores_GCR, slope = _scores(scores, q_GKR, k_NGCK[j], packed, seen_by, j)
                weights_GCR = jnp.exp(scores_GCR - total_GR[:, None])
                given_GCR = _product(v_NGCK[j], given_GKR)
                ds_GCR = weights_GCR * (given_GCR - delta_GR[:, None]) * slope
                ds_GCR = ds_GCR.astype(q_GKR.dtype)
                dv_GCK = _product(weights_GCR.astype(q_GKR.dtype), given_GRK)
                dk_GCK = _product(ds_GCR, q_GRK)
                dq_GKR += _product(k_NGKC[j], ds_GCR)
                return dq_GKR, dk_NGCK.at[j].add(dk_GCK), dv_NGCK.at[j].add(dv_GCK)

            nothing = jnp.zeros(q_GKR.shape, jnp.float32)
            start = (nothing, *carry)
            dq_GKR, *carry = jax.lax.fori_loop(0, _key_blocks(runs, i), keys, start)
            return tuple(carry), dq_GKR

        runs = _runs(packed, scores.window)
        blocks = (jnp.arange(len(q_NGKR)), runs, q_NGKR, q_NGRK, *of_queries)
        nothing = jnp.zeros(k_NGCK.shape, jnp.float32)
        (dk_NGCK, dv_NGCK), dq_NGKR = jax.lax.scan(queries, (nothing, nothing), blocks)
        return dq_NGKR * scores.scale, _turned(dk_NGCK) * scores.scale, _turned(dv_NGCK)

    turned = _turned(given_BNGKR)
    delta = _row_sums(_turned(out).astype(jnp.float32), turned.astype(jnp.float32))
    dq, dk, dv = jax.lax.map(row, (
        (q, _turned(q)), (k, _turned(k)), _turned(v), packed, total, delta, given_BNGKR, turned,
    ))  # fmt: skip
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward_kept, _backward)


def _scores(scores, q_GKR, k_GCK, packed: _Packed, queries: _Queries, j) -> tuple[jax.Array, Any]:
    """Scores of queries and key block j, masked; and what their gradient is multiplied by."""
    s_GCR = _product(k_GCK, q_GKR) * scores.scale
    slope: Any = 1.0
    if scores.softcap is not None:
        capped = jnp.tanh(s_GCR / scores.softcap)
        s_GCR, slope = scores.softcap * capped, 1 - capped * capped
    size = packed.segments.shape[1]
    segments_C1, keys_C1 = packed.segments[j][:, None], (j * size + jnp.arange(size))[:, None]
    mask_CR = queries.segments == segments_C1
    mask_CR |= (keys_C1 >= queries.begins) & (keys_C1 < queries.ends)
    mask_CR &= queries.places >= keys_C1
    if scores.window is not None:
        mask_CR &= queries.positions - packed.positions[j][:, None] < scores.window
    return jnp.where(mask_CR, s_GCR, _MASKED), slope


def _queries(packed: _Packed, i: jax.Array, count: int) -> _Queries:
    """Of block i, whose `count` queries are its tokens once for each head of a group."""
    size = packed.segments.shape[1]
    places = i * size + jnp.arange(size)
    begins, ends = packed.bounds[i].T
    of_block = _Queries(packed.segments[i], packed.positions[i], begins, ends, places)
    return jax.tree.map(lambda x: jnp.tile(x, count // size), of_block)


def _product(a_Gmk: jax.Array, b_Gkn: jax.Array) -> jax.Array:
    return jnp.matmul(a_Gmk, b_Gkn, preferred_element_type=jnp.float32)
