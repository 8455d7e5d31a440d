"""Drawing tokens on the device: temperature, top-k, top-p, greedy, all of them traced.

Suffixes: R slots, V vocabulary, N blocks of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK = 128  # entries of the vocabulary that are first drawn as one
_ONE = 0x3F800000  # the bits of 1.0


class Sampling(NamedTuple):
    """What tokens are drawn from: softmax(logits / temperature), cut by top-k and then by top-p.

    temperature: 0 is greedy, whatever the rest.  top_k: the k most probable tokens, 0 for all.
    top_p: of those the fewest, most probable first, that hold a share top_p of their mass.  Tokens
    as probable as the last one kept are kept.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def of_the_policy(self) -> bool:
        """Whether samples are drawn from the policy itself."""
        return self[:] == (1.0, 0, 1.0)


GREEDY = Sampling(0.0)


def draw(
    logits: Float[Array, "slots vocab"], keys: Array, sampling: Sampling
) -> tuple[Int[Array, " slots"], Float[Array, " slots"]]:
    """One token a slot and its log-prob under the policy.

    That is log softmax(logits), neither tempered nor cut: what a trainer computes, and what a ratio
    to the reference needs.  A sampler that trains by importance weights would want the other one;
    nothing here does, and it can be had from logits alone.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    token = jax.lax.cond(
        sampling.temperature > 0,
        lambda: _drawn(logits, keys, sampling),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )
    return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]


def masses(logits: Float[Array, "slots vocab"], sampling: Sampling) -> Float[Array, "slots vocab"]:
    """What tokens are drawn in proportion to; 0 for those that are cut."""
    mass_RV = jax.nn.softmax(logits / jnp.maximum(sampling.temperature, 1e-6), axis=-1)
    cut = (sampling.top_k > 0) | (sampling.top_p < 1)
    return jax.lax.cond(cut, lambda: _cut(mass_RV, sampling), lambda: mass_RV)


def _drawn(logits_RV, keys, sampling):
    """Inverse-CDF sampling: one uniform a slot, where the Gumbel trick draws one an entry.

    Two levels, a block of the vocabulary and an entry in it, so that no sum runs over 256,000.
    """
    mass_RV = masses(logits_RV, sampling)
    uniform_R = jax.vmap(lambda key: jax.random.uniform(key))(keys)
    rows, size = mass_RV.shape
    blocks_RNB = jnp.pad(mass_RV, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    block_RN = jnp.sum(blocks_RNB, axis=-1)
    upto_RN = jnp.cumsum(block_RN, axis=-1)
    target_R = uniform_R * upto_RN[:, -1]
    block_R = _first_above(upto_RN, block_RN, target_R)
    before_R = jnp.take_along_axis(jnp.pad(upto_RN, ((0, 0), (1, 0))), block_R[:, None], 1)[:, 0]
    entry_RB = jnp.take_along_axis(blocks_RNB, block_R[:, None, None], axis=1)[:, 0]
    within_R = _first_above(jnp.cumsum(entry_RB, axis=-1), entry_RB, target_R - before_R)
    return (block_R * _BLOCK + within_R).astype(jnp.int32)


def _first_above(upto_RN, mass_RN, target_R):
    """The first index whose running sum exceeds the target; rounding never leads to mass 0."""
    index_R = jnp.sum(upto_RN <= target_R[:, None], axis=-1)
    last_R = jnp.max(jnp.where(mass_RN > 0, jnp.arange(mass_RN.shape[1]), 0), axis=-1)
    return jnp.minimum(index_R, last_R)


def _cut(mass_RV, sampling):
    """top-k, then top-p of what that leaves."""
    size = mass_RV.shape[-1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, size), size)
    mass_RV = _at_least(mass_RV, lambda kept: jnp.sum(kept, axis=-1) >= k)
    # At top_p = 1 nothing is ever enough, lest rounding in a sum cut the least probable ones.
    share = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)
    wanted_R = share * jnp.sum(mass_RV, axis=-1)
    return _at_least(
        mass_RV, lambda kept: jnp.sum(jnp.where(kept, mass_RV, 0), axis=-1) >= wanted_R
    )


def _at_least(mass_RV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The masses above the highest threshold that keeps enough; no sort.

    Bits of floats that are not negative are ordered as they are, so 30 halvings find the threshold
    to the bit; each is one pass over the vocabulary.
    """
    bits_RV = jax.lax.bitcast_convert_type(mass_RV, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # low keeps enough, high does not
        middle = (low + high) // 2
        right = enough(bits_RV >= middle[:, None])
        return jnp.where(right, middle, low), jnp.where(right, high, middle)

    zero = jnp.zeros(len(mass_RV), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (zero, zero + _ONE + 1))
    return jnp.where(bits_RV >= low[:, None], mass_RV, 0)
