"""Likelihood terms (SFT, RAFT, NLL on the chosen side), and how a sequence's tokens are summed."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


def length_normalised(
    log_ratio: Float[Array, " sequences"], tokens: Float[Array, " sequences"]
) -> Float[Array, " sequences"]:
    """Means over tokens of summed log-ratios, nats a token; a sequence without tokens keeps 0.

    `mdpo_loss(lengths=...)` does this for both sides and leaves the metrics those of sums.
    """
    return jnp.asarray(log_ratio) / jnp.maximum(jnp.asarray(tokens), 1)


def turn_discount_weights(
    turns: Int[Array, "*shape"], total: Int[Array, "*shape"] | int, *, gamma: float
) -> Float[Array, "*shape"]:
    """gamma^t (1 - gamma^(T - t)) / (1 - gamma^T): DMPO's weight of turn t of T.

    arXiv 2406.14868: the discounted sum over turns of the log-ratios *up to* each turn, divided by
    sum_t gamma^t, so that long and short trajectories compare.  1 in the first turn and falling;
    (T - t) / T for gamma = 1.  To be multiplied into the loss mask before tokens are summed; plain
    M-DPO, with its guarantee, has 1 everywhere.

    Args:
        turns: turn of each token, from 0.
        total: number of turns of the token's trajectory, at least turn + 1.
        gamma: discount, a Python number in (0, 1].

    Raises:
        ValueError: gamma outside (0, 1].
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma: {gamma} given; 0 < gamma <= 1 accepted")
    turns, total = map(jnp.asarray, (turns, total))
    if gamma == 1:
        return (total - turns) / total
    log = math.log(gamma)  # expm1: 1 - gamma^n loses its digits for gamma near 1
    return jnp.exp(turns * log) * jnp.expm1((total - turns) * log) / jnp.expm1(total * log)
