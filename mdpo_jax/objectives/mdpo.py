"""Multi-turn direct preference optimisation (M-DPO), arXiv 2409.02392, equation 14."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Metrics = dict[str, Array]
Kind = Literal["sigmoid", "ipo", "hinge", "robust"]


def mdpo_loss(
    log_ratio_chosen: Float[Array, " pairs"],
    log_ratio_rejected: Float[Array, " pairs"],
    *,
    eta: float,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
    margin: Float[Array, " pairs"] | float = 0.0,
    weights: Float[Array, " pairs"] | None = None,
    lengths: tuple[Float[Array, " pairs"], Float[Array, " pairs"]] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """-log sigmoid(eta (r_w - r_l) - margin), with r = sum over action tokens of log pi / pi_ref.

    The sign is winner minus loser (the talk's slides print it reversed).  `margin` is *subtracted*
    inside the sigmoid, TRL's convention: the paper's term (C) enters as C(l) - C(w).  Single-turn
    DPO is the same function of log-ratios that count observations too.

    With z = eta (r_w - r_l) - margin and e = label_smoothing, the kinds are those of TRL 1.16:

        sigmoid   -(1 - e) log sigmoid(z) - e log sigmoid(-z)
        robust    [-(1 - e) log sigmoid(z) + e log sigmoid(-z)] / (1 - 2 e)
        hinge     max(0, 1 - z)
        ipo       ((z - 1/2) / eta)^2 = (r_w - r_l - margin / eta - 1 / (2 eta))^2

    Where we differ from TRL on purpose: its `sigmoid` ignores label_smoothing (ours is
    conservative DPO); it has no margin; its `ipo` always takes means over tokens, ours only with
    `lengths`; its IPO lengths count completion tokens, ours whatever the log-ratio counts, action
    tokens; it averages over each device's pairs, ours is one sum over all (`weights`).

    Args:
        log_ratio_chosen, log_ratio_rejected: log-ratios in nats, summed over a trajectory.
        eta: KL coefficient (`beta` of DPO).
        kind: see above.
        label_smoothing: probability that a preference is flipped, a Python number; `robust` needs
            less than 1/2, `hinge` and `ipo` take none.
        margin: see above, in logits.  It is data: pass what a gradient must not reach through
            `jax.lax.stop_gradient`.
        weights: weight of each pair in the sum; 1 / pairs by default, i.e. the mean.  A sharded or
            accumulated step passes mask / global pair count, so that sums add up over devices.
        lengths: action tokens of chosen and rejected.  Where given, z is of means over tokens:
            `ipo` is then TRL's, `sigmoid` its `sigmoid_norm`.  Metrics stay those of sums.

    Returns:
        The weighted sum of pair losses and the metrics, weighted likewise: `rewards/chosen`,
        `rewards/rejected`, `rewards/margins` (eta times log-ratio) and `rewards/accuracies`.

    Raises:
        ValueError: an unknown kind, or a label_smoothing that the kind does not take.
    """
    _check(kind, label_smoothing)
    log_ratio_chosen, log_ratio_rejected = map(jnp.asarray, (log_ratio_chosen, log_ratio_rejected))
    if weights is None:
        weights = jnp.full(log_ratio_chosen.shape, 1.0 / log_ratio_chosen.size)
    rewards_chosen, rewards_rejected = eta * log_ratio_chosen, eta * log_ratio_rejected
    scores_chosen, scores_rejected = rewards_chosen, rewards_rejected
    if lengths is not None:
        scores_chosen = rewards_chosen / jnp.maximum(jnp.asarray(lengths[0]), 1)
        scores_rejected = rewards_rejected / jnp.maximum(jnp.asarray(lengths[1]), 1)
    losses = _pair_losses(
        scores_chosen - scores_rejected - margin, kind, eta=eta, label_smoothing=label_smoothing
    )
    metrics = {
        "rewards/chosen": rewards_chosen,
        "rewards/rejected": rewards_rejected,
        "rewards/margins": rewards_chosen - rewards_rejected,
        "rewards/accuracies": (rewards_chosen > rewards_rejected).astype(jnp.float32),
    }
    return jnp.sum(weights * losses), {k: jnp.sum(weights * v) for k, v in metrics.items()}


def _check(kind: Kind, label_smoothing: float) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind: {kind!r} is none of {', '.join(get_args(Kind))}")
    if kind in ("hinge", "ipo") and label_smoothing != 0:
        raise ValueError(
            f"label_smoothing: {label_smoothing} given, but {kind} takes none; it must be 0"
        )
    if kind == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: {label_smoothing} given; robust takes 0 <= e < 0.5")


def _pair_losses(
    logits: Float[Array, " pairs"], kind: Kind, *, eta: float, label_smoothing: float
) -> Float[Array, " pairs"]:
    if kind == "hinge":
        return jax.nn.relu(1 - logits)
    if kind == "ipo":
        return ((logits - 0.5) / eta) ** 2
    kept = -(1 - label_smoothing) * jax.nn.log_sigmoid(logits)
    flipped = label_smoothing * jax.nn.log_sigmoid(-logits)
    if kind == "robust":
        return (kept + flipped) / (1 - 2 * label_smoothing)
    return kept - flipped
