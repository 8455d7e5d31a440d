"""Between the tokens of packed rows and the sequences they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

Arrays = dict[str, Any]


def by_sequence(
    per_token: Shaped[Array, "rows length"], micro: Arrays,
    reduce: Callable[..., Array] = jax.ops.segment_sum,
) -> Shaped[Array, " sequences"]:  # fmt: skip
    """Sums (or what else `reduce` makes) over each sequence's tokens; padding and shared prompts,
    whose segments are beyond the slots, are left out."""
    slots = micro["sequence_mask"].shape[0]
    flat = reduce(per_token.reshape(-1), micro["segments"].reshape(-1), num_segments=slots + 1)
    return flat[1:]  # segment 0 is padding


def at_tokens(
    per_sequence: Shaped[Array, " sequences"], micro: Arrays
) -> Shaped[Array, "rows length"]:
    """Each token's sequence's value; 0 at padding and in shared prompts."""
    padded = jnp.pad(per_sequence, (1, 0))
    return padded.at[micro["segments"]].get(mode="fill", fill_value=0)
