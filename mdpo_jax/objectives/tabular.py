"""A tabular softmax policy on which the objectives are minimised with exact expectations as data.

The losses are the very functions that training uses; what the oracle (`gibbs`) replaces is the
language model and the sampling noise.  Runs in float64 whatever jax's global setting.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mdpo_jax.objectives import gibbs
from mdpo_jax.objectives.mdpo import mdpo_loss
from mdpo_jax.objectives.mkto import mkto_loss

Loss = Callable[[Float[Array, "contexts trajectories"], Any], Float[Array, ""]]


class Pairs(NamedTuple):
    """All ordered pairs of one prompt's trajectories, winner first; `weights` sum to 1."""

    weights: Float[np.ndarray, "contexts trajectories trajectories"]
    margin: Float[np.ndarray, "contexts trajectories trajectories"]
    eta: float


class Fit(NamedTuple):
    """A fitted policy, the (C) of its last round, and max |change of pi| of each round."""

    policy: gibbs.Tables
    term_c: gibbs.Table
    changes: tuple[float, ...]


class Judged(NamedTuple):
    """Each trajectory twice, judged correct and judged wrong; `weights` sum to 1."""

    weights: Float[np.ndarray, "two contexts trajectories"]
    kl: float
    eta: float


def bradley_terry(
    mdp: gibbs.MDP, *, sampler: gibbs.Tables | None = None, term_c: gibbs.Table | None = None
) -> Pairs:
    """2 P(x) mu(i|x) mu(j|x) sigmoid(u_i - u_j) of every ordered pair (i wins over j).

    Args:
        mdp: utilities are in logits of the preference model.
        sampler: mu's policy, the reference by default.
        term_c: (C) of each trajectory, exact or estimated; the margin is then C(j) - C(i), and 0
            by default (plain M-DPO).
    """
    contexts = len(mdp.context)
    joint = gibbs.occupancy(mdp, sampler or mdp.reference)[-1].reshape(contexts, -1)
    utility = mdp.utility.reshape(contexts, -1)
    wins = 1 / (1 + np.exp(utility[:, None, :] - utility[:, :, None]))
    # Of two draws either may win, hence the 2.
    weights = 2 * joint[:, :, None] * joint[:, None, :] / mdp.context[:, None, None] * wins
    c = np.zeros_like(utility) if term_c is None else term_c.reshape(contexts, -1)
    return Pairs(weights, c[:, None, :] - c[:, :, None], mdp.eta)


def judged(mdp: gibbs.MDP, *, kl: float = 0.0) -> Judged:
    """P(x) mu(tau|x) sigmoid(+-u) of every trajectory judged correct, and wrong."""
    joint = gibbs.occupancy(mdp, mdp.reference)[-1].reshape(len(mdp.context), -1)
    correct = 1 / (1 + np.exp(-mdp.utility.reshape(joint.shape)))
    return Judged(np.stack([joint * correct, joint * (1 - correct)]), kl, mdp.eta)


def pair_loss(log_ratio: Float[Array, "contexts trajectories"], data: Pairs) -> Float[Array, ""]:
    """`mdpo_loss` of all ordered pairs."""
    chosen = jnp.broadcast_to(log_ratio[:, :, None], data.weights.shape)
    rejected = jnp.broadcast_to(log_ratio[:, None, :], data.weights.shape)
    loss, _ = mdpo_loss(
        chosen.reshape(-1), rejected.reshape(-1), eta=data.eta,
        margin=jnp.ravel(data.margin), weights=jnp.ravel(data.weights),
    )  # fmt: skip
    return loss


def judged_loss(log_ratio: Float[Array, "contexts trajectories"], data: Judged) -> Float[Array, ""]:
    """`mkto_loss` of all trajectories under both verdicts."""
    both = jnp.broadcast_to(log_ratio, data.weights.shape).reshape(-1)
    correct = jnp.arange(2).repeat(log_ratio.size) == 0
    loss, _ = mkto_loss(both, correct, data.kl, eta=data.eta, weights=jnp.ravel(data.weights))
    return loss


def trajectory_log_ratio(
    logits: tuple[Float[Array, "states actions"], ...],
    reference: tuple[Float[Array, "states actions"], ...],
) -> Float[Array, "contexts trajectories"]:
    """sum_h log pi_h / pi_ref,h of every trajectory, pi = softmax of the logits."""
    total = jnp.zeros(logits[0].shape[0])
    for table, ref in zip(logits, reference, strict=True):
        # Every (s, a) has as many children as the next level is larger.
        total = jnp.repeat(total, table.shape[0] // total.shape[0])
        total = (total[:, None] + jax.nn.log_softmax(table) - jnp.log(ref)).reshape(-1)
    return total.reshape(logits[0].shape[0], -1)


def minimise(
    loss: Loss, mdp: gibbs.MDP, data: Any, *, start: gibbs.Tables | None = None,
    iterations: int = 200, tolerance: float = 1e-13,
) -> gibbs.Tables:  # fmt: skip
    """The tabular policy at which `loss(log_ratio, data)` is least.

    Saddle-free Newton on the softmax logits: steps by the Hessian's absolute eigenvalues, damped
    until the loss falls.  Directions without curvature (a constant added to a state's logits,
    states that no pair reaches) have no gradient and stay where they are.

    Args:
        loss: a module-level function (it is compiled once per function and shapes).
        data: pytree of arrays for `loss`.
        start: where the search begins, the reference by default.
        iterations: accepted or refused steps at most.
        tolerance: stops once no gradient entry is larger.

    Raises:
        ValueError: a reference or a start with a zero; logits are logarithms.
    """
    start = mdp.reference if start is None else start
    for name, tables in (("reference", mdp.reference), ("start", start)):
        if any(np.any(table <= 0) for table in tables):
            raise ValueError(f"{name}: has a zero; every action needs positive probability")
    shapes = tuple(table.shape for table in mdp.reference)
    with jax.enable_x64(True):
        reference = tuple(jnp.asarray(table, jnp.float64) for table in mdp.reference)
        evaluate = functools.partial(_derivatives, loss, shapes, reference, data)
        point = np.concatenate([np.log(table).reshape(-1) for table in start])
        value, gradient, hessian = map(np.asarray, evaluate(point))
        damping = 1e-3
        for _ in range(iterations):
            if np.abs(gradient).max() <= tolerance:
                break
            scales, basis = np.linalg.eigh(hessian)
            trial = point - basis @ (basis.T @ gradient / (np.abs(scales) + damping))
            found = [np.asarray(x) for x in evaluate(trial)]
            # Near the minimum the loss no longer resolves a step, but the gradient does.
            flat = abs(found[0] - value) <= 1e-15 * max(1, abs(value))
            if found[0] < value or (flat and np.linalg.norm(found[1]) < np.linalg.norm(gradient)):
                point, (value, gradient, hessian), damping = trial, found, damping / 8
            else:
                damping *= 4
    tables = _tables(point, shapes)
    return tuple(np.exp(t - np.logaddexp.reduce(t, -1, keepdims=True)) for t in tables)


def regressed_values(
    acted: gibbs.MDP, log_ratio: gibbs.Tables
) -> tuple[Float[np.ndarray, " states"], ...]:
    """What least squares over rollouts finds for V of a policy with these log-ratios.

    Q_H = u;  Q_h = E_{o_h} V_{h+1};  V_h(s) = E_{a ~ mu} [Q_h(s, a) - eta log_ratio_h(s, a)].

    Args:
        acted: its `reference` is mu, whoever acted in the rollouts; its tables are exact or the
            frequencies of draws (`gibbs.sampled`).
        log_ratio: log pi / pi_ref of each turn, nats, pi_ref the objective's own reference.
    """
    q, found = acted.utility, []
    for turn in reversed(range(acted.horizon)):
        found.append((acted.reference[turn] * (q - acted.eta * log_ratio[turn])).sum(-1))
        if turn:
            observation = acted.observation[turn - 1]
            q = (observation * found[-1].reshape(observation.shape)).sum(-1)
    return tuple(reversed(found))


def minimise_with_values(
    mdp: gibbs.MDP,
    *,
    sampler: gibbs.Tables | None = None,
    draw: Callable[[gibbs.MDP], gibbs.MDP] = lambda acted: acted,
    rounds: int = 100,
    tolerance: float = 1e-9,
) -> Fit:
    """M-DPO with a margin from regressed values, alternated: values of the policy, then its fit.

    C = sum_{h<H} V_{h+1}(s_{h+1}) - Q_h(s_h, a_h) is data in each fit, as if under a stop-gradient.

    Args:
        sampler: who acts in the pairs and in the rollouts that V is regressed on; by default each
            round's own policy, with which the rounds converge quadratically.
        draw: what the rollouts show of the MDP in which that sampler acts, the exact tables by
            default; called once a round.
        rounds: at most.
        tolerance: stops once no probability moves by more.
    """
    policy, term_c, changes = mdp.reference, np.zeros_like(mdp.utility), []
    while len(changes) < rounds and (not changes or changes[-1] > tolerance):
        acting = policy if sampler is None else sampler
        acted = draw(dataclasses.replace(mdp, reference=acting))
        ratio = gibbs.log_ratio(policy, mdp.reference)
        term_c = gibbs.term_c(acted, regressed_values(acted, ratio))
        data = bradley_terry(mdp, sampler=acting, term_c=term_c)
        fitted = minimise(pair_loss, mdp, data, start=policy)
        moved = (np.abs(new - old).max() for new, old in zip(fitted, policy, strict=True))
        changes.append(float(max(moved)))
        policy = fitted
    return Fit(policy, term_c, tuple(changes))


def _tables(point: Any, shapes: tuple[tuple[int, int], ...]) -> tuple[Any, ...]:
    cuts = np.cumsum([rows * columns for rows, columns in shapes])[:-1]
    parts = (jnp if isinstance(point, Array) else np).split(point, cuts)
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _derivatives(loss: Loss, shapes, reference, data, point):
    """Loss, gradient and Hessian in the flat logits."""

    def of(flat):
        return loss(trajectory_log_ratio(_tables(flat, shapes), reference), data)

    value, gradient = jax.value_and_grad(of)(point)
    # Column by column: all at once, [parameters, pairs] temporaries would leave the cache.
    column = functools.partial(jax.jvp, jax.grad(of), (point,))
    hessian = jax.lax.map(lambda unit: column((unit,))[1], jnp.eye(point.size))
    return value, gradient, hessian
