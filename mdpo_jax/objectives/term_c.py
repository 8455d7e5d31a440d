"""Term (C) of arXiv 2409.02392, equation 13: what stochastic observations add to the logit.

u(w) - u(l) = eta (r_w - r_l) + C(w) - C(l), so M-DPO is exact with margin = C(l) - C(w).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def term_c(
    values: Float[Array, "sequences turns"],
    expected: Float[Array, "sequences turns"],
    observed: Bool[Array, "sequences turns"],
) -> Float[Array, " sequences"]:
    """C = sum_{h<H} V_{h+1}(s_{h+1}) - E_{o_h} V_{h+1}, in units of the utility.

    Args:
        values: V of the state after the observation that came.
        expected: mean of V over observations that the same action could have got.
        observed: which turns ended in an observation; the last turn did not.
    """
    return jnp.sum(jnp.where(observed, values - expected, 0), axis=-1)


def soft_value(
    utilities: Float[Array, "*states samples"], *, eta: float, correct_bias: bool = True
) -> Float[Array, "*states"]:
    """V = eta log E exp(u / eta) from utilities of the reference's continuations of each state.

    Exact in the limit only if no *later* observation is random: Proposition 1 takes the mean over
    observations outside the logarithm, a flat sample of whole continuations takes it inside and
    by Jensen's inequality lands above V.  With random observations ahead, pass `samples` values of
    Q, each the mean over observations of the next turn's V (nested sampling).

    The logarithm of a mean of n samples lies below by eta Var(e) / (2 n E(e)^2) + O(1 / n^2), e =
    exp(u / eta); correct_bias adds the sample's estimate of that (nothing for one sample).
    """
    scaled = jnp.asarray(utilities) / eta
    samples = scaled.shape[-1]
    log_mean = jax.nn.logsumexp(scaled, axis=-1) - jnp.log(samples)
    if not correct_bias or samples == 1:
        return eta * log_mean
    relative = jnp.exp(scaled - log_mean[..., None])  # of mean 1
    return eta * (log_mean + jnp.var(relative, axis=-1, ddof=1) / (2 * samples))
