"""Multi-turn Kahneman-Tversky optimisation (M-KTO), arXiv 2409.02392, equation 15."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mdpo_jax.objectives.mdpo import Metrics

KLConvention = Literal["mismatched", "batch_mean", "zero"]


def mkto_loss(
    log_ratio: Float[Array, " sequences"],
    is_correct: Bool[Array, " sequences"],
    kl: Float[Array, ""] | float,
    *,
    eta: float,
    lambda_correct: float = 1.0,
    lambda_wrong: float = 1.0,
    weights: Float[Array, " sequences"] | None = None,
    totals: tuple[Float[Array, ""], Float[Array, ""]] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """lambda (1 - sigmoid(+-eta (r - max(kl, 0)))), + for correct sequences and - for wrong ones.

    r = sum over action tokens of log pi / pi_ref.  Equation 15 as printed has eta twice (inside
    the implicit reward and outside it); the authors' code and TRL have it once, and so do we.
    Single-turn KTO is the same function of log-ratios that count observations too.  With policy =
    reference the loss is 1/2 when both lambdas are 1.

    Where we differ from TRL 1.16 on purpose: one sum over all sequences where TRL averages each
    device's mean (the same on equal devices); log-ratios count action tokens, TRL's every token
    behind the prompt; the class means of a one-sided batch are NaN where TRL leaves them out.

    Args:
        log_ratio: log-ratios in nats, summed over a trajectory.
        is_correct: booleans, or 1 and 0.
        kl: the reference point in nats (`kl_estimate`), one number for the whole batch; clamped at
            0 here, and no gradient goes through it.
        eta: KL coefficient (`beta` of KTO).
        lambda_correct, lambda_wrong: weights of the two classes; they do not renormalise the mean.
        weights: weight of each sequence in the sum, 0 for padding; 1 / sequences by default.  A
            sharded or accumulated step passes mask / global sequence count.
        totals: summed weights of the correct and of the wrong sequences over all shares of the
            batch, for a step that adds shares up.  By default this call sees the whole batch.

    Returns:
        The weighted sum of losses, and metrics: `rewards/chosen` and `rewards/rejected` (means of
        eta r over the correct and over the wrong, NaN where there are none), `rewards/margins`
        (their difference), `kl` (clamped), `count/chosen`, `count/rejected` (sequences of weight
        above 0).  With `totals` all are shares that add up to those of the batch.

    Raises:
        ValueError: kl is not one number.
    """
    if jnp.shape(kl) != ():
        raise ValueError(f"kl: shape {jnp.shape(kl)} given; one number for the batch is accepted")
    log_ratio = jnp.asarray(log_ratio)
    correct = jnp.asarray(is_correct).astype(bool)
    if weights is None:
        weights = jnp.full(log_ratio.shape, 1.0 / log_ratio.size)
    weights = jnp.asarray(weights)
    kl = jax.lax.stop_gradient(jnp.maximum(jnp.asarray(kl, log_ratio.dtype), 0))
    sign = jnp.where(correct, 1.0, -1.0)
    # sigmoid(-z) is 1 - sigmoid(z) without the cancellation.
    losses = jnp.where(correct, lambda_correct, lambda_wrong) * jax.nn.sigmoid(
        -sign * eta * (log_ratio - kl)
    )
    metrics = _class_metrics(eta * log_ratio, correct, weights, totals)
    metrics["kl"] = kl if totals is None else kl * jnp.sum(weights)
    return jnp.sum(weights * losses), metrics


def _class_metrics(
    rewards: Float[Array, " sequences"],
    correct: Bool[Array, " sequences"],
    weights: Float[Array, " sequences"],
    totals: tuple[Float[Array, ""], Float[Array, ""]] | None,
) -> Metrics:
    metrics = {}
    for index, (side, member) in enumerate((("chosen", correct), ("rejected", ~correct))):
        own = jnp.where(member, weights, 0)
        total = jnp.asarray(jnp.sum(own) if totals is None else totals[index])
        mean = jnp.sum(own * rewards) / jnp.where(total > 0, total, 1)
        metrics[f"rewards/{side}"] = jnp.where(total > 0, mean, jnp.nan)
        metrics[f"count/{side}"] = jnp.sum(own > 0).astype(jnp.float32)
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def kl_estimate(
    log_ratio_mismatched: Float[Array, " sequences"],
    weights: Float[Array, " sequences"] | None = None,
    *,
    convention: KLConvention = "mismatched",
) -> Float[Array, ""]:
    """The reference point z_0 of equation 15: a weighted mean of log-ratios, without gradient.

    The paper's z_0 is the expected KL of the policy from the reference on its own samples.  Three
    stand-ins, which differ in the log-ratios that the caller passes:

        mismatched   those of (prompt i, completion of another prompt j), TRL's and the authors'
                     choice; observations of the borrowed trajectory are masked like any other
        batch_mean   those of the batch itself: no second forward pass, biased upwards once the
                     correct ones have risen
        zero         none; the value is 0 and eta r alone is judged

    Not clamped: shares of a batch must be added up before `mkto_loss` clamps their sum at 0.

    Args:
        log_ratio_mismatched: log-ratios in nats, summed over action tokens; see above.
        weights: weight of each, 0 for padding; 1 / sequences by default, or mask / global count.
        convention: see above.

    Raises:
        ValueError: an unknown convention.
    """
    if convention not in get_args(KLConvention):
        accepted = ", ".join(get_args(KLConvention))
        raise ValueError(f"convention: {convention!r} is none of {accepted}")
    log_ratio = jnp.asarray(log_ratio_mismatched)
    if convention == "zero":
        return jnp.zeros((), log_ratio.dtype)
    if weights is None:
        weights = jnp.full(log_ratio.shape, 1.0 / log_ratio.size)
    return jax.lax.stop_gradient(jnp.sum(weights * log_ratio))


def mismatched_rows(problems: Sequence[int] | Sequence[str]) -> Int[np.ndarray, " sequences"]:
    """[i] -> the row whose completion is scored under prompt i for the `mismatched` estimate.

    Every completion is borrowed once, and by another problem's prompt whenever no problem holds
    more than half of the rows.  TRL shifts by one, which in a batch of pairs hands a prompt its
    own problem's other side; the TRL of the paper reversed the batch, which in one of odd size
    leaves the middle row matched with itself.

    Args:
        problems: the id of each row's problem.
    """
    _, group, counts = np.unique(np.asarray(problems), return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    borrowed = np.empty(len(order), np.int64)
    # Rows of a problem are neighbours in `order`; a shift by the largest group leaves any group.
    borrowed[order] = np.roll(order, -int(counts.max(initial=0)))
    return borrowed
