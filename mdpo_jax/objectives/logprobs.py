"""Log-probabilities of given tokens without materialising [tokens, vocab]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mdpo_jax.products import product


def _same(x: Array) -> Array:
    return x


class Spread(NamedTuple):
    """What pins a chunk to the devices of a sharded table: its hidden states and targets, and its
    logits.  Without a mesh all stay as they are.  needed: whether a chunk with such flags is to be
    computed, which all devices must agree on."""

    tokens: Callable[[Array], Array] = _same
    logits: Callable[[Array], Array] = _same
    needed: Callable[[Array], Array] = jnp.any


UNSPREAD = Spread()


def token_log_probs(
    hidden: Float[Array, "*rows tokens model"],
    table: Float[Array, "vocab model"],
    targets: Int[Array, "*rows tokens"],
    *,
    chunk: int = 2048,
    softcap: float | None = None,
    counted: Bool[Array, "*rows tokens"] | None = None,
    spread: Spread = UNSPREAD,
) -> Float[Array, "*rows tokens"]:
    """log softmax(hidden @ table.T)[target] of each token, float32.

    Works through about `chunk` tokens at a time, some of every row, and recomputes each chunk's
    logits in the backward pass, so the largest temporary is [chunk, vocab] whatever the number of
    tokens.  softcap: the final cap of Gemma-2, cap * tanh(logit / cap).
    counted: whose log-probs are asked for; the others are 0, and chunks without any cost nothing:

        row 0 | . . x x . x |  ->  | x x x | . . . |      counted tokens come first
        row 1 | . x . . . . |      | x . . | . . . |      the second chunk is left out

    spread: of a table that is sharded by vocabulary.
    """
    if targets.ndim == 1:
        one = None if counted is None else counted[None]
        return token_log_probs(
            hidden[None], table, targets[None], chunk=chunk, softcap=softcap, counted=one,
            spread=spread,
        )[0]  # fmt: skip
    score = functools.partial(_scores, table, softcap, spread)
    rows, tokens = targets.shape
    wide = min(tokens, max(1, chunk // rows))
    pieces = -(-tokens // wide)
    if pieces == 1:
        values = score(hidden, targets)
        return values if counted is None else jnp.where(counted, values, 0)

    def cut(x: Array) -> Array:
        """[pieces, rows, wide, ...]"""
        padding = ((0, 0), (0, pieces * wide - tokens), *[(0, 0)] * (x.ndim - 2))
        return jnp.pad(x, padding).reshape(rows, pieces, wide, *x.shape[2:]).swapaxes(0, 1)

    def joined(values_PRC: Array) -> Array:
        return values_PRC.swapaxes(0, 1).reshape(rows, -1)[:, :tokens]

    if counted is None:
        again = jax.checkpoint(score)
        return joined(jax.lax.map(lambda piece: again(*piece), (cut(hidden), cut(targets))))

    # The cond is inside of what is computed again: outside, its branch would keep the table for the
    # backward pass, a copy of it for each chunk.
    @jax.checkpoint
    def some(hidden_RCD: Array, targets_RC: Array, counted_RC: Array) -> Array:
        nothing = functools.partial(jnp.zeros, targets_RC.shape)
        return jax.lax.cond(
            spread.needed(counted_RC), lambda: score(hidden_RCD, targets_RC), nothing
        )

    order = jnp.argsort(~counted, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets, first = (jnp.take_along_axis(x, order, axis=1) for x in (targets, counted))
    pieces_of = cut(hidden), cut(targets), cut(first)
    values = joined(jax.lax.map(lambda piece: some(*piece), pieces_of))
    back = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(jnp.where(first, values, 0), back, axis=1)


def _scores(
    table: Array, softcap: float | None, spread: Spread, hidden_RCD: Array, targets_RC: Array
) -> Array:
    hidden_RCD, targets_RC = spread.tokens(hidden_RCD), spread.tokens(targets_RC)
    logits_RCV: Any = product(hidden_RCD, table.astype(hidden_RCD.dtype).T, 1, jnp.float32)
    # Pinned, and their gradient with them: what is below would send it all to the rows' devices.
    logits_RCV = spread.logits(logits_RCV)
    if softcap is not None:
        logits_RCV = softcap * jnp.tanh(logits_RCV / softcap)
    if spread.logits is _same:
        chosen = jnp.take_along_axis(logits_RCV, targets_RC[..., None], axis=-1)[..., 0]
    else:  # each device finds it among its words, or not: the compiler would exchange logits for it
        mine = jnp.arange(logits_RCV.shape[-1]) == targets_RC[..., None]
        chosen = jnp.sum(jnp.where(mine, logits_RCV, 0), axis=-1)
    return chosen - jax.nn.logsumexp(logits_RCV, axis=-1)
