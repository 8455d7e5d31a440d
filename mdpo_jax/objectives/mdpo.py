"""Multi-turn direct preference optimisation (M-DPO), arXiv 2409.02392, equation 14."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Metrics = dict[str, Array]


def mdpo_loss(
    log_ratio_chosen: Float[Array, " pairs"],
    log_ratio_rejected: Float[Array, " pairs"],
    *,
    eta: float,
    label_smoothing: float = 0.0,
    margin: Float[Array, " pairs"] | float = 0.0,
    weights: Float[Array, " pairs"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """-log sigmoid(eta (r_w - r_l) - margin), with r = sum over action tokens of log pi / pi_ref.

    The sign is winner minus loser (the talk's slides print it reversed).  `margin` is *subtracted*
    inside the sigmoid, TRL's convention: the paper's term (C) enters as C(l) - C(w).  Single-turn
    DPO is the same function of log-ratios that count observations too.

    Args:
        log_ratio_chosen, log_ratio_rejected: log-ratios in nats, summed over a trajectory.
        eta: KL coefficient (`beta` of DPO).
        label_smoothing: probability that a preference is flipped (conservative DPO).
        margin: see above, in logits.
        weights: weight of each pair in the sum; 1 / pairs by default, i.e. the mean.  A sharded or
            accumulated step passes mask / global pair count, so that sums add up over devices.

    Returns:
        The weighted sum of pair losses and the metrics, weighted likewise: `rewards/chosen`,
        `rewards/rejected`, `rewards/margins` (eta times log-ratio) and `rewards/accuracies`.
    """
    log_ratio_chosen, log_ratio_rejected = map(jnp.asarray, (log_ratio_chosen, log_ratio_rejected))
    if weights is None:
        weights = jnp.full(log_ratio_chosen.shape, 1.0 / log_ratio_chosen.size)
    rewards_chosen, rewards_rejected = eta * log_ratio_chosen, eta * log_ratio_rejected
    logits = rewards_chosen - rewards_rejected - margin
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(
        logits
    ) - label_smoothing * jax.nn.log_sigmoid(-logits)
    metrics = {
        "rewards/chosen": rewards_chosen,
        "rewards/rejected": rewards_rejected,
        "rewards/margins": rewards_chosen - rewards_rejected,
        "rewards/accuracies": (rewards_chosen > rewards_rejected).astype(jnp.float32),
    }
    return jnp.sum(weights * losses), {k: jnp.sum(weights * v) for k, v in metrics.items()}
