"""The tabular oracle: its own identities, and the objectives' minimisers against it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.objectives import gibbs, mdpo_loss, tabular

HORIZONS = [1, 2, 3, 4]


def mdp(seed, horizon, deterministic=False, **options):
    rng = np.random.default_rng(seed)
    options = {"contexts": 1 if horizon == 4 else 2} | options
    return gibbs.random_mdp(
        rng, horizon=horizon, eta=rng.uniform(0.5, 2), deterministic=deterministic, **options
    )


def random_policy(seed, m):
    rng = np.random.default_rng(seed)
    return tuple(rng.dirichlet(np.ones(t.shape[1]), len(t)) for t in m.reference)


def distance(m, policy, other):
    """max |delta pi| over states that the reference reaches."""
    reached = (occupied.sum(-1) > 0 for occupied in gibbs.occupancy(m, m.reference))
    turns = zip(policy, other, reached, strict=True)
    return max(np.abs(p - o)[states].max() for p, o, states in turns)


# The recursion itself


@pytest.mark.parametrize("horizon", HORIZONS)
def test_proposition_1_value_is_the_objective_and_no_policy_has_more(horizon):
    m = mdp(0, horizon, actions=3 if horizon < 4 else 2)
    solution = gibbs.solve(m)
    assert gibbs.objective(m, solution.policy) == pytest.approx(solution.value, abs=1e-12)
    for seed in range(20):
        other = random_policy(seed, m)
        lost = solution.value - gibbs.objective(m, other)
        # By Proposition 2 with Q_hat = Q, the loss is eta times the KL from the optimum.
        assert lost == pytest.approx(m.eta * gibbs.kl(m, other, solution.policy), abs=1e-12)
        assert lost > 0


def test_the_recursion_equals_a_loop_over_histories():
    """Two turns, written out: V_2, Q_1, V_1 and the policies of every history."""
    m = mdp(3, 2)
    solution = gibbs.solve(m)
    for x in range(2):
        q1 = []
        for a in range(2):
            after = 0.0
            for o in range(2):
                s2 = (x * 2 + a) * 2 + o
                z = sum(m.reference[1][s2, b] * np.exp(m.utility[s2, b] / m.eta) for b in range(2))
                after += m.observation[0][x, a, o] * m.eta * np.log(z)
                assert solution.v[1][s2] == pytest.approx(m.eta * np.log(z))
                for b in range(2):
                    share = m.reference[1][s2, b] * np.exp(m.utility[s2, b] / m.eta) / z
                    assert solution.policy[1][s2, b] == pytest.approx(share)
            q1.append(after)
        odds = m.reference[0][x] * np.exp(np.array(q1) / m.eta)
        np.testing.assert_allclose(solution.q[0][x], q1)
        np.testing.assert_allclose(solution.policy[0][x], odds / odds.sum())
        assert solution.v[0][x] == pytest.approx(m.eta * np.log(odds.sum()))


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_equation_13_splits_the_utility(horizon, deterministic):
    m = mdp(1, horizon, deterministic)
    terms = gibbs.decompose(m, gibbs.solve(m))
    np.testing.assert_allclose(terms.a + terms.b + terms.c, m.utility, atol=1e-12)
    reached = gibbs.occupancy(m, m.reference)[-1] > 0
    certain = horizon == 1 or deterministic
    assert (np.abs(terms.c[reached]).max() < 1e-12) == certain
    per_prompt = terms.b.reshape(len(m.context), -1)
    assert np.all(per_prompt == per_prompt[:, :1])


@pytest.mark.parametrize("horizon", [2, 3, 4])
def test_term_c_is_within_its_bound(horizon):
    """E C^2 = E sum sigma^2 exactly; |C| <= 4 sigma with probability 0.9, in both readings."""
    for seed in range(10):
        m = mdp(seed, horizon)
        solution = gibbs.solve(m)
        c = gibbs.decompose(m, solution).c
        variance = gibbs.observation_variance(m, solution)
        for policy in (m.reference, solution.policy, random_policy(seed, m)):
            joint = gibbs.occupancy(m, policy)[-1]
            assert (joint * c).sum() == pytest.approx(0, abs=1e-12)
            expected = (joint * variance).sum()
            assert (joint * c**2).sum() == pytest.approx(expected, rel=1e-9)
            assert joint[np.abs(c) <= 4 * np.sqrt(expected)].sum() >= 15 / 16
            assert joint[np.abs(c) <= 4 * np.sqrt(variance)].sum() >= 0.9


@pytest.mark.parametrize("horizon", HORIZONS)
def test_proposition_2_holds_for_any_policy_and_any_q_hat(horizon):
    for seed in range(5):
        m = mdp(seed, horizon)
        q_hat = tuple(np.random.default_rng(seed).normal(size=t.shape) for t in m.reference)
        left, right = gibbs.value_gap(m, random_policy(seed + 50, m), q_hat)
        assert left == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": 0.0}, "eta: 0.0 given"),
        ({"observation": ()}, "observation: 0 tables, want horizon - 1"),
        ({"context": np.ones(3) / 3}, r"reference\[0\]: 2 states, want 3"),
        ({"context": np.ones(2)}, r"context\[0\]: rows must be distributions"),
        ({"utility": np.zeros((8, 3))}, r"utility: \(8, 3\), want \(8, 2\)"),
    ],
)
def test_a_malformed_mdp_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(mdp(0, 2), **change)


# Minimisers of the training losses


@pytest.mark.parametrize(("horizon", "seeds"), [(1, 4), (2, 7), (3, 6), (4, 3)])
def test_deterministic_observations_m_dpo_finds_the_gibbs_policy(horizon, seeds):
    """20 MDPs; the unreached branches of the tree carry no data and do not matter."""
    worst = 0.0
    for seed in range(seeds):
        m = mdp(seed, horizon, deterministic=True)
        fitted = tabular.minimise(tabular.pair_loss, m, tabular.bradley_terry(m))
        worst = max(worst, distance(m, fitted, gibbs.solve(m).policy))
    print(f"\nH={horizon}: max |delta pi| = {worst:.1e}")
    assert worst <= 1e-4


@pytest.mark.parametrize(("horizon", "seeds"), [(2, 5), (3, 4), (4, 1)])
def test_stochastic_observations_need_term_c(horizon, seeds):
    """Plain M-DPO is off by a lot, the exact margin repairs it."""
    found = []
    for seed in range(seeds):
        m = mdp(seed, horizon)
        solution = gibbs.solve(m)
        c = gibbs.decompose(m, solution).c
        plain, exact = (
            tabular.minimise(tabular.pair_loss, m, tabular.bradley_terry(m, term_c=term))
            for term in (None, c)
        )
        gain = solution.value - gibbs.objective(m, m.reference)
        lost = (solution.value - gibbs.objective(m, plain)) / gain
        off, back = distance(m, plain, solution.policy), distance(m, exact, solution.policy)
        print(f"\nH={horizon} seed {seed}: |delta pi| {off:.3f} plain, {back:.0e} with C", end="")
        print(f"; plain loses {lost:.1%} of the gain", end="")
        assert off > 0.03
        assert lost > 0
        assert back <= 1e-4
        found.append(off)
    assert np.mean(found) > 0.1


def test_the_exact_margin_works_off_policy_and_plain_m_dpo_depends_on_the_data():
    m = mdp(0, 2)
    solution = gibbs.solve(m)
    c = gibbs.decompose(m, solution).c
    found = []
    for sampler in (random_policy(1, m), random_policy(2, m)):
        data = tabular.bradley_terry(m, sampler=sampler, term_c=c)
        exact = tabular.minimise(tabular.pair_loss, m, data)
        assert distance(m, exact, solution.policy) <= 1e-4
        plain = tabular.bradley_terry(m, sampler=sampler)
        found.append(tabular.minimise(tabular.pair_loss, m, plain))
    assert distance(m, *found) > 1e-2


def test_monte_carlo_c_converges_and_whole_continuations_do_not():
    """Three turns, so that V_2 has a random observation ahead of it."""
    m = mdp(0, 3)
    solution = gibbs.solve(m)
    rng = np.random.default_rng(0)

    def error(c):
        data = tabular.bradley_terry(m, term_c=c)
        return distance(m, tabular.minimise(tabular.pair_loss, m, data), solution.policy)

    plain = error(None)
    few, many = (
        np.mean([error(gibbs.term_c(s, gibbs.solve(s).v)) for s in (gibbs.sampled(m, n, rng),) * 1])
        for n in (16, 100_000)
    )
    flat = error(gibbs.term_c(m, gibbs.continuation_values(m)))
    print(f"\nplain {plain:.3f}, 16 samples {few:.3f}, 100,000 {many:.4f}, flat limit {flat:.3f}")
    assert many < 0.02 < few
    assert many < flat < plain


def test_whole_continuations_are_too_optimistic_but_right_in_the_last_turn():
    m = mdp(1, 3)
    flat, exact = gibbs.continuation_values(m), gibbs.solve(m).v
    np.testing.assert_allclose(flat[2], exact[2], atol=1e-12)
    assert all(np.all(f > e) for f, e in zip(flat[:2], exact[:2], strict=True))
    drawn = gibbs.continuation_values(m, 200_000, np.random.default_rng(0))
    for f, d in zip(flat, drawn, strict=True):
        np.testing.assert_allclose(d, f, atol=0.05)
    certain = mdp(1, 3, deterministic=True)
    reached = gibbs.occupancy(certain, certain.reference)
    pairs = zip(gibbs.continuation_values(certain), gibbs.solve(certain).v, reached, strict=True)
    for f, e, joint in pairs:
        states = joint.sum(-1) > 0
        np.testing.assert_allclose(f[states], e[states], atol=1e-12)


# Values regressed on the policy's own log-ratios


def random_rollouts(m):
    """The MDP in which another random policy acts, and the log-ratios of a random policy."""
    policy, acting = random_policy(11, m), random_policy(12, m)
    acted = dataclasses.replace(m, reference=acting)
    return acted, gibbs.log_ratio(policy, m.reference)


def test_regressed_values_are_means_of_the_rest_of_the_rollout():
    """V_h(s) = E_mu[u - eta sum_{h' >= h} log_ratio_h' | s]: the recursion unrolled to the end."""
    m = mdp(0, 3)
    acted, ratio = random_rollouts(m)
    joint = gibbs.occupancy(acted, acted.reference)[-1]
    states = [len(table) for table in m.reference]
    for turn, found in enumerate(tabular.regressed_values(acted, ratio)):
        rest = tuple(r if h >= turn else 0 * r for h, r in enumerate(ratio))
        target = m.utility - m.eta * gibbs.along(m, rest)
        odds, target = joint.reshape(states[turn], -1), target.reshape(states[turn], -1)
        np.testing.assert_allclose(found, (odds * target).sum(-1) / odds.sum(-1), atol=1e-12)


def test_at_the_gibbs_policy_regressed_values_are_the_soft_ones_whoever_acts():
    m = mdp(0, 3)
    solution = gibbs.solve(m)
    acted, _ = random_rollouts(m)
    found = tabular.regressed_values(acted, gibbs.log_ratio(solution.policy, m.reference))
    for value, exact in zip(found, solution.v, strict=True):
        np.testing.assert_allclose(value, exact, atol=1e-12)


@pytest.mark.parametrize(("horizon", "seeds"), [(2, 5), (3, 4), (4, 1)])
def test_values_of_its_own_bring_m_dpo_to_the_gibbs_policy(horizon, seeds):
    """Where plain is off: in as many steps as Newton's method, without the oracle's C."""
    for seed in range(seeds):
        m = mdp(seed, horizon, contexts=2 if horizon == 2 else 1)
        solution = gibbs.solve(m)
        fit = tabular.minimise_with_values(m, rounds=4)
        off = distance(m, fit.policy, solution.policy)
        plain = tabular.minimise(tabular.pair_loss, m, tabular.bradley_terry(m))
        print(f"\nH={horizon} seed {seed}: |delta pi| {off:.0e}", end="; rounds")
        print("".join(f" {change:.0e}" for change in fit.changes), end="")
        assert off <= 1e-4
        assert distance(m, plain, solution.policy) > 0.03
        exact = gibbs.decompose(m, solution).c
        np.testing.assert_allclose(fit.term_c, exact, atol=1e-3)


def test_a_fixed_sampler_gives_the_same_policy_in_more_rounds():
    m = mdp(0, 2)
    best = gibbs.solve(m).policy
    rounds = []
    for sampler in (None, m.reference, random_policy(1, m), random_policy(2, m)):
        fit = tabular.minimise_with_values(m, sampler=sampler)
        assert distance(m, fit.policy, best) <= 1e-6
        rounds.append(len(fit.changes))
    print(f"\nrounds: {rounds}")
    assert rounds[0] <= 6
    assert all(10 <= others < 100 for others in rounds[1:])


def test_new_samples_alone_do_not_replace_term_c():
    """Plain M-DPO on fresh pairs of each round's policy, with the rounds that suffice with C."""
    m = mdp(0, 2)
    policy = m.reference
    for _ in range(6):
        data = tabular.bradley_terry(m, sampler=policy)
        policy = tabular.minimise(tabular.pair_loss, m, data, start=policy)
    assert distance(m, policy, gibbs.solve(m).policy) > 0.1


def test_values_from_samples_converge():
    m = mdp(0, 3, contexts=1)
    best = gibbs.solve(m).policy
    rng = np.random.default_rng(0)

    def error(samples):
        draw = functools.partial(gibbs.sampled, samples=samples, rng=rng)
        return distance(m, tabular.minimise_with_values(m, draw=draw, rounds=4).policy, best)

    few, more, many = map(error, (16, 1_000, 100_000))
    print(f"\n16 samples {few:.3f}, 1,000 {more:.4f}, 100,000 {many:.5f}")
    assert many < 0.3 * more < 0.1 * few
    assert many < 0.005


@pytest.mark.parametrize("seed", range(5))
def test_rollouts_selected_by_their_outcome_give_biased_values(seed):
    """As many right as wrong rollouts of each prompt, as pairs have them, at the Gibbs policy."""
    m = mdp(seed, 2)
    solution = gibbs.solve(m)
    joint = gibbs.occupancy(m, m.reference)[-1].reshape(2, -1)
    right = m.utility.reshape(2, -1) > 0
    share = (joint * right).sum(-1, keepdims=True) / joint.sum(-1, keepdims=True)
    target = m.utility - m.eta * gibbs.log_ratio(solution.policy, m.reference)[1]

    def regressed_q(rollouts):
        weights = rollouts.reshape(*solution.q[0].shape, -1)
        return (weights * target.reshape(weights.shape)).sum(-1) / weights.sum(-1)

    np.testing.assert_allclose(regressed_q(joint), solution.q[0], atol=1e-12)
    off = regressed_q(joint / np.where(right, share, 1 - share)) - solution.q[0]
    print(f"\nQ is off by {np.abs(off).max():.2f}", end="")
    assert np.abs(off).max() > 0.02


def test_a_start_with_a_zero_is_refused():
    m = mdp(0, 1)
    data = tabular.bradley_terry(m)
    with pytest.raises(ValueError, match="start: has a zero"):
        tabular.minimise(tabular.pair_loss, m, data, start=(np.eye(2),))


def test_one_turn_is_dpo():
    """H = 1: the minimiser is pi_ref exp(u / eta) / Z, whatever the number of actions."""
    m = mdp(4, 1, contexts=3, actions=5)
    odds = m.reference[0] * np.exp(m.utility / m.eta)
    closed = odds / odds.sum(-1, keepdims=True)
    np.testing.assert_allclose(gibbs.solve(m).policy[0], closed, atol=1e-12)
    fitted = tabular.minimise(tabular.pair_loss, m, tabular.bradley_terry(m))
    assert np.abs(fitted[0] - closed).max() <= 1e-4


def test_the_tabular_loss_is_the_expectation_of_bradley_terry():
    """By hand over all ordered pairs, at a random policy and with the margin."""
    m = mdp(2, 2)
    c = gibbs.decompose(m, gibbs.solve(m)).c
    policy = random_policy(7, m)
    data = tabular.bradley_terry(m, term_c=c)
    ratio = gibbs.along(m, gibbs.log_ratio(policy, m.reference)).reshape(2, -1)
    u, c = m.utility.reshape(2, -1), c.reshape(2, -1)
    joint = gibbs.occupancy(m, m.reference)[-1].reshape(2, -1)
    total = 0.0
    for x in range(2):
        for i in range(ratio.shape[1]):
            for j in range(ratio.shape[1]):
                wins = 1 / (1 + np.exp(u[x, j] - u[x, i]))
                odds = 2 * joint[x, i] * joint[x, j] / m.context[x] * wins
                z = m.eta * (ratio[x, i] - ratio[x, j]) + c[x, i] - c[x, j]
                total += odds * np.log1p(np.exp(-z))
    with jax.enable_x64(True):
        logits = tuple(jnp.log(table) for table in policy)
        found = tabular.trajectory_log_ratio(logits, m.reference)
        np.testing.assert_allclose(found, ratio, atol=1e-12)
        assert float(tabular.pair_loss(found, data)) == pytest.approx(total, rel=1e-12)
        nothing = float(tabular.pair_loss(0 * found, tabular.bradley_terry(m)))
    assert data.weights.sum() == pytest.approx(1)
    assert nothing == pytest.approx(np.log(2), rel=1e-12)


def test_counting_observations_is_single_turn_dpo():
    """Equation 10: log-ratios of whole trajectories are those of actions if both models give an
    observation the same probability, and others if the policy has its own idea of the tool."""
    m = mdp(5, 3)
    policy = random_policy(6, m)
    actions = gibbs.along(m, gibbs.log_ratio(policy, m.reference)).reshape(-1)
    prior = gibbs.occupancy(m, m.reference)[-1]
    whole = np.log(gibbs.occupancy(m, policy)[-1] / prior).reshape(-1)
    imagined = dataclasses.replace(m, observation=mdp(7, 3).observation)
    counted = np.log(gibbs.occupancy(imagined, policy)[-1] / prior).reshape(-1)
    half = len(actions) // 2
    masked, same, other = (
        float(mdpo_loss(r[:half], r[half:], eta=0.5)[0]) for r in (actions, whole, counted)
    )
    assert same == pytest.approx(masked, rel=1e-5)
    assert abs(other - masked) > 1e-2


def test_m_kto_drives_what_is_mostly_wrong_to_zero():
    """Its loss is monotone in each log-ratio, so it has no minimiser with finite logits and does
    not find the Gibbs policy, which keeps pi_ref exp(u / eta) of everything."""
    m = mdp(1, 1, contexts=1, actions=5)
    assert 0 < (m.utility < 0).sum() < 5
    data = tabular.judged(m, kl=0.1)
    few, many = (tabular.minimise(tabular.judged_loss, m, data, iterations=n) for n in (2, 300))
    before = gibbs.expected_utility(m, m.reference)
    assert before < gibbs.expected_utility(m, few) < gibbs.expected_utility(m, many)
    wrong = m.utility < 0
    assert many[0][wrong].sum() < 0.01 < gibbs.solve(m).policy[0][wrong].sum()


def test_m_kto_improves_several_turns():
    m = mdp(0, 3)
    fitted = tabular.minimise(tabular.judged_loss, m, tabular.judged(m), iterations=5)
    assert gibbs.expected_utility(m, fitted) > gibbs.expected_utility(m, m.reference)


def test_x64_is_left_as_it_was():
    m = mdp(0, 1)
    tabular.minimise(tabular.pair_loss, m, tabular.bradley_terry(m))
    assert jnp.zeros(1).dtype == jnp.float32


def test_a_reference_with_a_zero_is_refused():
    m = mdp(0, 1)
    zero = dataclasses.replace(m, reference=(np.eye(2),))
    with pytest.raises(ValueError, match="reference: has a zero"):
        tabular.minimise(tabular.pair_loss, zero, tabular.bradley_terry(m))
