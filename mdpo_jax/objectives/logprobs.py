"""Log-probabilities of given tokens without materialising [tokens, vocab]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_log_probs(
    hidden: Float[Array, "*rows tokens model"],
    table: Float[Array, "vocab model"],
    targets: Int[Array, "*rows tokens"],
    *,
    chunk: int = 2048,
    softcap: float | None = None,
    counted: Bool[Array, "*rows tokens"] | None = None,
) -> Float[Array, "*rows tokens"]:
    """log softmax(hidden @ table.T)[target] of each token, float32.

    Works through about `chunk` tokens at a time, some of every row, and recomputes each chunk's
    logits in the backward pass, so the largest temporary is [chunk, vocab] whatever the number of
    tokens.  softcap: the final cap of Gemma-2, cap * tanh(logit / cap).
    counted: whose log-probs are asked for; the others are 0, and chunks without any cost nothing:

        row 0 | . . x x . x |  ->  | x x x | . . . |      counted tokens come first
        row 1 | . x . . . . |      | x . . | . . . |      the second chunk is left out
    """
    if targets.ndim == 1:
        one = None if counted is None else counted[None]
        return token_log_probs(
            hidden[None], table, targets[None], chunk=chunk, softcap=softcap, counted=one
        )[0]
    rows, tokens = targets.shape
    order = None
    if counted is not None:
        order = jnp.argsort(~counted, axis=1, stable=True)
        hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
        targets, counted = (jnp.take_along_axis(x, order, axis=1) for x in (targets, counted))
    wide = min(tokens, max(1, chunk // rows))
    pieces = -(-tokens // wide)

    def cut(x: Array) -> Array:
        """[pieces, rows, wide, ...]"""
        padding = ((0, 0), (0, pieces * wide - tokens), *[(0, 0)] * (x.ndim - 2))
        return jnp.pad(x, padding).reshape(rows, pieces, wide, *x.shape[2:]).swapaxes(0, 1)

    def score(hidden_RCD: Array, targets_RC: Array) -> Array:
        logits_RCV = jnp.einsum(
            "RCD,VD->RCV", hidden_RCD, table.astype(hidden_RCD.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        if softcap is not None:
            logits_RCV = softcap * jnp.tanh(logits_RCV / softcap)
        chosen = jnp.take_along_axis(logits_RCV, targets_RC[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits_RCV, axis=-1)

    score = jax.checkpoint(score) if pieces > 1 else score
    if counted is None:
        values = jax.lax.map(lambda piece: score(*piece), (cut(hidden), cut(targets)))
    else:
        values = jax.lax.map(
            lambda piece: jax.lax.cond(
                jnp.any(piece[2]), score, lambda _, ids: jnp.zeros(ids.shape), *piece[:2]
            ),
            (cut(hidden), cut(targets), cut(counted)),
        )
    values = values.swapaxes(0, 1).reshape(rows, -1)[:, :tokens]
    if order is None:
        return values
    back = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(jnp.where(counted, values, 0), back, axis=1)
