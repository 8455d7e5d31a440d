"""Log-probabilities of given tokens without materialising [tokens, vocab]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_log_probs(
    hidden: Float[Array, "tokens model"],
    table: Float[Array, "vocab model"],
    targets: Int[Array, " tokens"],
    *,
    chunk: int = 2048,
    softcap: float | None = None,
) -> Float[Array, " tokens"]:
    """log softmax(hidden @ table.T)[target] of each token, float32.

    Works through `chunk` tokens at a time and recomputes each chunk's logits in the backward pass,
    so the largest temporary is [chunk, vocab] whatever the number of tokens.  softcap: the final
    cap of Gemma-2, cap * tanh(logit / cap).
    """

    def score(arguments):
        hidden_CD, targets_C = arguments
        logits_CV = jnp.einsum(
            "CD,VD->CV", hidden_CD, table.astype(hidden_CD.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        if softcap is not None:
            logits_CV = softcap * jnp.tanh(logits_CV / softcap)
        chosen = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits_CV, axis=-1)

    tokens = targets.shape[0]
    if tokens <= chunk:
        return score((hidden, targets))
    pieces = -(-tokens // chunk)
    padding = pieces * chunk - tokens
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(pieces, chunk, -1)
    targets = jnp.pad(targets, (0, padding)).reshape(pieces, chunk)
    return jax.lax.map(jax.checkpoint(score), (hidden, targets)).reshape(-1)[:tokens]
