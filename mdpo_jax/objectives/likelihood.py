"""Likelihood terms: SFT, RAFT and the NLL term on the chosen side."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def nll_loss(
    log_probs: Float[Array, " sequences"],
    tokens: Float[Array, " sequences"],
    *,
    weights: Float[Array, " sequences"] | None = None,
) -> Float[Array, ""]:
    """Mean over sequences of the token-mean negative log-likelihood.

    The NLL term of arXiv 2409.02392, Table 5 (its code takes the token mean of each sequence's
    unmasked labels).

    Args:
        log_probs: summed log-probability of each sequence's scored tokens, nats.
        tokens: number (or summed weight) of scored tokens; a sequence without any counts 0.
        weights: weight of each sequence, 1 / sequences by default.
    """
    log_probs, tokens = map(jnp.asarray, (log_probs, tokens))
    if weights is None:
        weights = jnp.full(log_probs.shape, 1.0 / log_probs.size)
    return jnp.sum(-weights * log_probs / jnp.maximum(tokens, 1e-6))
