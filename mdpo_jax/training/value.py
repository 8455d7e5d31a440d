"""Term (C) by a value head on the policy's trunk, trained beside the policy.

    prompt | action 1 | observation | action 2 |
          V          Q             V          Q       read-outs of one linear head

At the token before an action the head is V of the state, at an action's last token Q.  Both regress,
without gradient through the target, on the soft Bellman equation (Proposition 1) unrolled to the end:

    V_h ~ u - eta sum_{h' >= h} log-ratio_h'        Q_h ~ u - eta sum_{h' > h} log-ratio_h'

whose conditional means they are at the optimum.  The mean over observations stands outside the
logarithm because no logarithm is taken.  Only trajectories that no outcome has selected may be used:
among pairs, lucky observations go with right answers more often than they do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mdpo_jax.training.segments import Arrays, at_tokens, by_sequence
from mdpo_jax.types import Part


@dataclasses.dataclass(frozen=True)
class ValueTerm:
    """utility: of a right sequence, in logits.  weight: of the head's loss.  learning_rate_scale:
    of the head, times the policy's."""

    utility: float
    weight: float
    learning_rate_scale: float


class Joint(NamedTuple):
    """What a step with a value head trains."""

    policy: Any
    head: Any


def init_head(width: int) -> Arrays:
    """A head that says 0."""
    return {"kernel": jnp.zeros(width, jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def readouts(batch: Arrays) -> Array:
    """Bool mask of the places of V and of Q, of the sequences that are in no pair.

    batch: a micro-batch's arrays, or those of all micro-batches with their leading axis.
    """
    before, after = _places(batch)
    return (before | after) & _single(batch)


def _places(batch: Arrays) -> tuple[Array, Array]:
    parts, segments = batch["parts"], batch["segments"]
    acts = (parts >= Part.TEXT) & (parts <= Part.ANSWER)
    edge = [(0, 0)] * (acts.ndim - 1)
    ahead = jnp.pad(acts[..., 1:] & (segments[..., 1:] == segments[..., :-1]), [*edge, (0, 1)])
    return ~acts & ahead, acts & ~ahead


def _single(batch: Arrays) -> Array:
    """[... R L] whether a token's sequence is in no pair."""

    def of_micro(micro: Arrays) -> Array:
        mask = micro["sequence_mask"]
        for side in ("chosen", "rejected"):
            mask = mask.at[micro[side]].add(-micro["pair_mask"])
        return at_tokens(mask, micro) > 0

    names = ("sequence_mask", "chosen", "rejected", "pair_mask", "segments")
    used = {name: batch[name] for name in names}
    return jax.vmap(of_micro)(used) if batch["segments"].ndim == 3 else of_micro(used)


def term_c_and_loss(
    term: ValueTerm, head: Arrays, hidden: Float[Array, "rows length width"],
    rewards: Float[Array, "rows length"], micro: Arrays, totals: Arrays,
) -> tuple[Float[Array, " sequences"], Float[Array, ""], Arrays]:  # fmt: skip
    """(C) of every sequence, without gradient; this share of the head's loss, and its metrics.

    rewards: eta times the log-ratio of each token, without gradient.
    """
    found = jnp.einsum("rlw,w->rl", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]
    before, after = _places(micro)
    turns = micro["turns"]
    total, last = by_sequence(rewards, micro), by_sequence(turns, micro, jax.ops.segment_max)
    # What the actions up to a token have earned: the row's running sum less that before its
    # sequence began.
    running = jnp.cumsum(rewards, axis=1)
    segments = micro["segments"]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    earlier = by_sequence(jnp.where(begins, running - rewards, 0), micro)
    ahead = at_tokens(total + earlier, micro) - running
    utility = term.utility * at_tokens(micro["correct"], micro)
    target = jax.lax.stop_gradient(utility - ahead)
    used = readouts(micro)
    loss = jnp.sum(jnp.where(used, (found - target) ** 2, 0)) / totals["readouts"]
    fixed = jax.lax.stop_gradient(found)
    observed = jnp.where(before & (turns > 0), fixed, 0)
    expected = jnp.where(after & (turns < at_tokens(last, micro)), fixed, 0)
    c = by_sequence(observed - expected, micro)
    return c, loss, {"value/mean": jnp.sum(jnp.where(used, fixed, 0)) / totals["readouts"]}
