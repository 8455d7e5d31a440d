"""The tabular oracle: the KL-regularised multi-turn MDP of arXiv 2409.02392 solved exactly.

A state is a whole history s_h = (x, a_1, o_1, ..., a_{h-1}, o_{h-1}), so the tables are a tree laid
out level by level:

    context      [S_1]                S_1 contexts x
    reference    [S_h, A_h]           pi_ref of turn h, h = 1..H
    observation  [S_h, A_h, O_h]      P of turn h, h = 1..H-1
    utility      [S_H, A_H]           u of a whole trajectory (s_H, a_H)

with S_{h+1} = S_h A_h O_h, and the child of (s, a, o) at index (s A_h + a) O_h + o.  All is float64
numpy: this is what the jax objectives are judged by, so it shares no code with them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Table = Float[np.ndarray, "states actions"]
# Of each turn; its length is the horizon.
Tables = tuple[Table, ...]


@dataclasses.dataclass(frozen=True)
class MDP:
    """A finite multi-turn MDP; shapes in the module's docstring, utilities and eta in logits.

    Raises:
        ValueError: tables whose shapes do not chain or whose rows do not sum to 1; eta <= 0.
    """

    context: Float[np.ndarray, " contexts"]
    reference: Tables
    observation: tuple[Float[np.ndarray, "states actions observations"], ...]
    utility: Table
    eta: float

    def __post_init__(self):
        if not self.eta > 0:
            raise ValueError(f"eta: {self.eta} given; a positive number is accepted")
        if len(self.observation) != self.horizon - 1:
            raise ValueError(f"observation: {len(self.observation)} tables, want horizon - 1")
        states = len(self.context)
        for turn, table in enumerate(self.reference):
            if len(table) != states:
                raise ValueError(f"reference[{turn}]: {len(table)} states, want {states}")
            if turn < self.horizon - 1:
                if self.observation[turn].shape[:2] != table.shape:
                    raise ValueError(f"observation[{turn}]: want {table.shape} states and actions")
                states = self.observation[turn].size
        if self.utility.shape != self.reference[-1].shape:
            raise ValueError(f"utility: {self.utility.shape}, want {self.reference[-1].shape}")
        for name in ("context", "reference", "observation"):
            tables = self.context[None] if name == "context" else getattr(self, name)
            for turn, table in enumerate(tables):
                if not np.allclose(table.sum(-1), 1) or np.any(table < 0):
                    raise ValueError(f"{name}[{turn}]: rows must be distributions")

    @property
    def horizon(self) -> int:
        """H, the number of turns."""
        return len(self.reference)


class Solution(NamedTuple):
    """The Q-Gibbs policy with its tables: `policy`, `q` [S_h, A_h], `v` [S_h], `value` = J."""

    policy: Tables
    q: Tables
    v: tuple[Float[np.ndarray, " states"], ...]
    value: float


class Terms(NamedTuple):
    """u = a + b + c of every trajectory, each [S_H, A_H] (equation 13)."""

    a: Table
    b: Table
    c: Table


def random_mdp(
    rng: np.random.Generator,
    *,
    horizon: int,
    contexts: int = 2,
    actions: int = 2,
    observations: int = 2,
    eta: float = 1.0,
    deterministic: bool = False,
) -> MDP:
    """An MDP of Dirichlet(2) tables and standard normal utilities.

    deterministic: each (s, a) has one observation that it always gives; the others' subtrees exist
    and are never reached.
    """
    context = rng.dirichlet(np.full(contexts, 2.0))
    reference, observation = [], []
    states = contexts
    for turn in range(horizon):
        reference.append(rng.dirichlet(np.full(actions, 2.0), states))
        if turn < horizon - 1:
            table = rng.dirichlet(np.full(observations, 2.0), (states, actions))
            if deterministic:
                table = np.eye(observations)[rng.integers(observations, size=(states, actions))]
            observation.append(table)
            states *= actions * observations
    utility = rng.normal(size=(states, actions))
    return MDP(context, tuple(reference), tuple(observation), utility, eta)


def soft_value(q: Table, reference: Table, eta: float) -> Float[np.ndarray, " states"]:
    """V = eta log E_{a ~ pi_ref} exp(Q / eta): the maximum of E Q - eta KL (Lemma 3)."""
    # Actions that the reference never takes must not set the scale.
    top = np.where(reference > 0, q, -np.inf).max(-1)
    return top + eta * np.log((reference * np.exp(np.minimum(q - top[:, None], 0) / eta)).sum(-1))


def gibbs_policy(q: Table, reference: Table, eta: float) -> Table:
    """pi = pi_ref exp((Q - V) / eta) (Proposition 1)."""
    exponent = (q - soft_value(q, reference, eta)[:, None]) / eta
    return reference * np.exp(np.where(reference > 0, exponent, 0))


def expected_next(mdp: MDP, v: tuple[Float[np.ndarray, " states"], ...], turn: int) -> Table:
    """E_{o_h} V_{h+1}, [S_h, A_h], of the turn with this index (from 0), not the last."""
    observation = mdp.observation[turn]
    return (observation * v[turn + 1].reshape(observation.shape)).sum(-1)


def solve(mdp: MDP) -> Solution:
    """Exact backward recursion (Proposition 1).

    Q_H = u; Q_h = E_{o_h} V_{h+1}; V_h = eta log E_{pi_ref} exp(Q_h / eta);
    pi_h = pi_ref,h exp(Q_h / eta) / Z_h; the value is E_x V_1.
    """
    q = [mdp.utility] * mdp.horizon
    v = [soft_value(mdp.utility, mdp.reference[-1], mdp.eta)] * mdp.horizon
    for turn in reversed(range(mdp.horizon - 1)):
        q[turn] = expected_next(mdp, tuple(v), turn)
        v[turn] = soft_value(q[turn], mdp.reference[turn], mdp.eta)
    policy = tuple(
        gibbs_policy(table, reference, mdp.eta)
        for table, reference in zip(q, mdp.reference, strict=True)
    )
    return Solution(policy, tuple(q), tuple(v), float(mdp.context @ v[0]))


def occupancy(mdp: MDP, policy: Tables) -> Tables:
    """Probability of reaching s_h and acting a_h, [S_h, A_h] for each turn; each sums to 1."""
    states, found = mdp.context, []
    for turn, table in enumerate(policy):
        found.append(states[:, None] * table)
        if turn < mdp.horizon - 1:
            states = (found[-1][..., None] * mdp.observation[turn]).reshape(-1)
    return tuple(found)


def along(mdp: MDP, values: Tables) -> Table:
    """[S_H, A_H]: the sum of per-turn values [S_h, A_h] (or [S_h, 1]) along every trajectory."""
    total = values[0]
    for turn in range(1, mdp.horizon):
        wide = np.broadcast_to(total, mdp.reference[turn - 1].shape).reshape(-1)
        total = np.repeat(wide, mdp.observation[turn - 1].shape[-1])[:, None] + values[turn]
    return np.broadcast_to(total, mdp.utility.shape)


def log_ratio(policy: Tables, reference: Tables) -> Tables:
    """log pi / pi_ref of each turn, nats; 0 where pi is 0."""
    return tuple(
        np.log(np.where(p > 0, p, 1) / np.where(p > 0, r, 1))
        for p, r in zip(policy, reference, strict=True)
    )


def objective(mdp: MDP, policy: Tables) -> float:
    """J(pi) = E_pi[u - eta sum_h KL(pi_h || pi_ref,h)], exactly (equation 5)."""
    return expected_utility(mdp, policy) - mdp.eta * kl(mdp, policy, mdp.reference)


def expected_utility(mdp: MDP, policy: Tables) -> float:
    """E_pi[u]."""
    return float((occupancy(mdp, policy)[-1] * mdp.utility).sum())


def kl(mdp: MDP, policy: Tables, other: Tables) -> float:
    """sum_h E_pi KL(pi_h || other_h), nats: the KL of the trajectory distributions."""
    turns = zip(occupancy(mdp, policy), log_ratio(policy, other), strict=True)
    return float(sum((d * r).sum() for d, r in turns))


def decompose(mdp: MDP, solution: Solution) -> Terms:
    """The three terms of equation 13, with the Q-Gibbs policy in (A).

    A = eta sum_h log pi_h / pi_ref,h;  B = V_1(s_1);  C = sum_{h<H} V_{h+1}(s_{h+1}) - E_o V_{h+1}.
    B is the same for two trajectories of one prompt; C is 0 for H = 1 and for deterministic
    observations.  Valid for any table of V (an estimate, too) that `solution` carries.
    """
    a = mdp.eta * along(mdp, log_ratio(solution.policy, mdp.reference))
    zero = tuple(np.zeros((len(table), 1)) for table in mdp.reference)
    b = along(mdp, (solution.v[0][:, None], *zero[1:]))
    return Terms(a, b, term_c(mdp, solution.v))


def term_c(mdp: MDP, v: tuple[Float[np.ndarray, " states"], ...]) -> Table:
    """sum_{h<H} V_{h+1}(s_{h+1}) - E_{o_h} V_{h+1} of every trajectory, for any table of V."""
    surprise = [np.zeros((len(mdp.context), 1))]
    for turn, observation in enumerate(mdp.observation):
        values = v[turn + 1].reshape(observation.shape)
        expected = (observation * values).sum(-1, keepdims=True)
        surprise.append((values - expected).reshape(-1, 1))
    return along(mdp, tuple(surprise))


def observation_variance(mdp: MDP, solution: Solution) -> Table:
    """sum_{h<H} sigma_h^2 of every trajectory, sigma_h^2 = Var_{o_h} V_{h+1} given (s_h, a_h).

    The paper: |C| <= 4 (sum sigma_h^2)^{1/2} with probability at least 0.9.  C is a martingale, so
    E C^2 = E sum sigma_h^2, and Chebyshev gives 15/16 for the *expected* sum under any policy.
    """
    parts = [np.zeros_like(table) for table in mdp.reference]
    for turn, observation in enumerate(mdp.observation):
        values = solution.v[turn + 1].reshape(observation.shape)
        mean = (observation * values).sum(-1, keepdims=True)
        parts[turn] = (observation * (values - mean) ** 2).sum(-1)
    return along(mdp, tuple(parts))


def value_gap(mdp: MDP, policy: Tables, q_hat: Tables) -> tuple[float, float]:
    """Both sides of Proposition 2, for any policy pi and the policy pi_hat that any Q_hat induces.

    J(pi) - J(pi_hat) = E_pi[u] - E_pi_hat[u] + sum_h (E_pi - E_pi_hat)[V_hat_{h+1} - Q_hat_h]
                        - eta sum_h E_pi KL(pi_h || pi_hat_h),  with V_hat_{H+1} = 0.
    """
    v_hat = tuple(soft_value(q, r, mdp.eta) for q, r in zip(q_hat, mdp.reference, strict=True))
    hat = tuple(gibbs_policy(q, r, mdp.eta) for q, r in zip(q_hat, mdp.reference, strict=True))

    def bellman(of: Tables) -> float:
        after = [expected_next(mdp, v_hat, turn) for turn in range(mdp.horizon - 1)]
        after.append(np.zeros_like(mdp.utility))
        turns = zip(occupancy(mdp, of), after, q_hat, strict=True)
        return float(sum((d * (v - q)).sum() for d, v, q in turns))

    gain = expected_utility(mdp, policy) - expected_utility(mdp, hat)
    right = gain + bellman(policy) - bellman(hat) - mdp.eta * kl(mdp, policy, hat)
    return objective(mdp, policy) - objective(mdp, hat), right


def sampled(mdp: MDP, samples: int, rng: np.random.Generator) -> MDP:
    """The MDP with the frequencies of `samples` draws at each state for its probabilities.

    Solving it is nested Monte Carlo: `samples` reference actions at every state, and as many runs
    of the tool at every action, feed the recursion in place of the exact expectations.
    """

    def frequencies(table):
        return rng.multinomial(samples, table) / samples

    return dataclasses.replace(
        mdp,
        reference=tuple(map(frequencies, mdp.reference)),
        observation=tuple(map(frequencies, mdp.observation)),
    )


def continuation_values(
    mdp: MDP, samples: int | None = None, rng: np.random.Generator | None = None
) -> tuple[Float[np.ndarray, " states"], ...]:
    """eta log E exp(u / eta) over whole continuations of each state, [S_h] of each turn.

    Equals V_h only if every later observation is certain; else it is too large, for the mean over
    observations stands inside the logarithm.  samples: the mean of that many continuations drawn
    by `rng`, the exact expectation by default.
    """
    reach, found = mdp.reference[-1], []
    for turn in reversed(range(mdp.horizon)):
        reach = reach.reshape(len(mdp.reference[turn]), -1)
        odds = (
            reach if samples is None or rng is None else rng.multinomial(samples, reach) / samples
        )
        utility = mdp.utility.reshape(odds.shape)
        found.append(soft_value(utility, odds, mdp.eta))
        if turn:
            before = mdp.reference[turn - 1][..., None] * mdp.observation[turn - 1]
            reach = before.reshape(-1, 1) * reach
    return tuple(reversed(found))
