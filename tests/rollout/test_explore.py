"""Every strategy over the real engine, with a random model whose every turn asks for the tool."""

import functools
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chat, model_config, params

from mdpo_jax.environment.tool import Observation
from mdpo_jax.model import transformer
from mdpo_jax.rollout.engine import Engine, Limits
from mdpo_jax.rollout.explore import Branching, Independent, Purse, Search, explore, states
from mdpo_jax.rollout.sampler import Sampler
from mdpo_jax.rollout.sampling import Sampling
from mdpo_jax.rollout.shapes import Shapes
from mdpo_jax.types import Problem, Role

LIMITS = Limits(
    max_turns=3, turn_tokens=10, trajectory_tokens=24, observation_tokens=16, context=128
)
PROBLEMS = [Problem(f"p/{i}", f"Ana has {i} beads" + " and cards" * i, "1") for i in range(5)]
ROOM = LIMITS.context - 2


class Counted:
    """A tool that answers with the length of the action and keeps what each session ran."""

    def __init__(self):
        self.sessions = {}  # what was run in each session of a key

    def start(self, key):
        self.sessions.setdefault(key, []).append([])
        return Session(self.sessions[key][-1])

    def close(self):
        pass


class Session:
    def __init__(self, ran):
        self.ran = ran

    def run(self, action):
        self.ran.append(action)
        done = Future()
        done.set_result(Observation(str(len(action)), "ok", 0.0))
        return done

    def close(self):
        pass


@pytest.fixture(autouse=True)
def always_tool(monkeypatch):
    monkeypatch.setattr("mdpo_jax.rollout.engine.wants_tool", lambda text: True)


@functools.cache
def sampler():
    made = Sampler(model_config(), Shapes.make(4, LIMITS.context, 5), chat().stop_ids, "float32")
    made.load(params())
    return made


def parity(trajectory):
    return float(trajectory.ids.sum() % 2)


STRATEGIES = {
    "independent": lambda p: Independent([1.0]),
    "ladder": lambda p: Independent([0.05, 1.0]),
    "branch": lambda p: Branching(0.5, 1.0, ROOM, p.id),
    "mcts": lambda p: Search(1.0, 3, 1.0, ROOM, parity),
}


def explored(name, problems=PROBLEMS, tokens=0, trajectories=6, tool=None, **more):
    engine = Engine(sampler(), chat(), tool or Counted(), LIMITS)
    engine.expect(LIMITS.context)
    return explore(
        engine, problems, {p.id: STRATEGIES[name](p) for p in problems},
        {p.id: Purse(tokens, trajectories) for p in problems}, most=LIMITS.trajectory_tokens,
        decode=chat().decode, stream="0/test", policy="x", sampling=Sampling(), **more,
    )  # fmt: skip


@jax.jit
def _scores(tokens):
    places = jnp.arange(tokens.shape[1])[None]
    hidden = transformer.hidden_states(
        model_config(), params(), tokens, places, jnp.ones_like(tokens)
    )
    return jax.nn.log_softmax(transformer.logits(model_config(), params(), hidden)[0])


@functools.cache
def whole(name):
    """One exploration a strategy, for several tests."""
    return explored(name)


def test_nothing_compiles_once_the_first_wave_is_warm():
    sampler.cache_clear()
    after = []
    found = explored("mcts", PROBLEMS[4:], advance=lambda _: after.append(sampler().compilations()))
    assert len(after) == len(found) == 6
    assert len({*after}) == 1
    starts = [t.actions[t.branch].start for t in found]
    assert min(starts) <= 64 < max(starts)  # of a prompt, and of a state in another bucket


@pytest.mark.parametrize("name", STRATEGIES)
def test_log_probs_are_a_full_forwards_those_taken_over_included(name):
    for t in whole(name):
        table = np.asarray(_scores(jnp.asarray(np.pad(t.ids, (0, 256 - len(t.ids))))[None]))
        acted = np.flatnonzero(t.roles == Role.ACTION)
        np.testing.assert_allclose(t.log_probs[acted], table[acted - 1, t.ids[acted]], atol=1e-4)
        assert not t.log_probs[t.roles != Role.ACTION].any()
        assert len(t.tool_statuses) == t.turns - 1
        assert t.turns <= LIMITS.max_turns
        assert (t.roles == Role.ACTION).sum() <= LIMITS.trajectory_tokens


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_continuation_shares_its_parents_beginning_and_nothing_more(name):
    found = {t.key: t for t in whole(name)}
    branched = [t for t in found.values() if t.parent is not None]
    assert bool(branched) == (name in ("branch", "mcts"))
    parted = 0
    for t in branched:
        parent = found[f"{t.problem_id}#{t.parent}"]
        assert t.parent < t.sample
        start = parent.actions[t.branch].start
        for field in ("ids", "roles", "log_probs"):
            np.testing.assert_array_equal(getattr(t, field)[:start], getattr(parent, field)[:start])
        assert t.actions[t.branch].start == start
        parted += t.ids[start:].tolist() != parent.ids[start:].tolist()
        assert t.sampled_tokens == int((t.roles[start:] == Role.ACTION).sum())
    assert parted >= 0.9 * len(branched)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_problem_gets_another_trajectory_while_it_is_below_its_budget(name):
    for budget in (1, 60):
        by_problem = {p.id: [] for p in PROBLEMS}
        for t in explored(name, tokens=budget):
            by_problem[t.problem_id].append(t)
        for found in by_problem.values():
            cost = [t.sampled_tokens for t in found]
            assert sum(cost[:-1]) < budget <= sum(cost)
            assert [t.sample for t in found] == list(range(len(found)))
    assert [t.sample for t in whole(name)] == list(range(6)) * len(PROBLEMS)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_problem_gets_does_not_depend_on_its_neighbours(name):
    alone = explored(name, PROBLEMS[3:4])
    same = [t for t in whole(name) if t.problem_id == PROBLEMS[3].id]
    for a, b in zip(alone, same, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        assert (a.parent, a.branch) == (b.parent, b.branch)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


def test_a_ladder_goes_round_by_sample():
    greedy = Independent([0.05, 1.0]).next(Purse(0, 3), 9)
    assert [s.temperature for s in greedy] == [0.05, 1.0, 0.05]
    assert [s.temperature for s in Independent([1, 2]).next(Purse(0, 9, count=7), 9)] == [2, 1]
    # Samples at 1 are those of a run at 1; a log-prob is never tempered (tested above).
    for cold, t in zip(whole("ladder"), whole("independent"), strict=True):
        same = cold.ids.tolist() == t.ids.tolist()
        assert same or cold.sample % 2 == 0
    likelier = [
        np.mean(
            [t.log_probs.sum() / t.sampled_tokens for t in whole("ladder") if t.sample % 2 == i]
        )
        for i in range(2)
    ]
    assert likelier[0] > likelier[1] + 1


def test_what_is_due_is_what_one_after_the_other_would_give():
    for budget in (1, 24, 25, 100):
        rng = np.random.default_rng(budget)
        costs = rng.integers(1, 25, 200).tolist()
        spent, count = 0, 0
        while spent < budget:
            spent, count = spent + costs[count], count + 1
        purse = Purse(budget, 0)
        while now := purse.due(24):
            for cost in costs[purse.count : purse.count + now]:
                purse.spent, purse.count = purse.spent + cost, purse.count + 1
        assert (purse.spent, purse.count) == (spent, count)
    assert Purse(0, 5, count=2).due(24) == 3
    assert Purse(0, 8).due(24, 0.5) == 4


def test_branching_visits_every_state_before_any_again():
    by_problem = {p.id: [] for p in PROBLEMS}
    for t in explored("branch", trajectories=16):
        by_problem[t.problem_id].append(t)
    for found in by_problem.values():
        base, rest = found[:8], found[8:]
        assert all(t.parent is None for t in base)
        there = {ids.tobytes() for t in base for _, ids in states(t, ROOM)}
        assert len(there) > 8
        chosen = [t.ids[: t.actions[t.branch].start].tobytes() for t in rest]
        assert len({*chosen}) == len(rest)
        assert {*chosen} <= there


def test_branches_begin_at_the_prompt_where_no_turn_asked_for_the_tool(monkeypatch):
    monkeypatch.setattr("mdpo_jax.rollout.engine.wants_tool", lambda text: False)
    for name in ("branch", "mcts"):
        found = explored(name, PROBLEMS[:1])
        assert [(t.sample, t.parent, t.turns) for t in found] == [(i, None, 1) for i in range(6)]


def test_the_tool_runs_a_states_actions_once_and_only_if_it_is_asked_again():
    tool = Counted()
    found = {t.key: t for t in explored("mcts", tool=tool)}
    wanted = {}
    for t in found.values():
        root = t
        while root.parent is not None:
            root = found[f"{t.problem_id}#{root.parent}"]
        texts = [chat().decode(t.ids[span]) for span in t.actions]
        # The last turn runs nothing; a continuation that asks for nothing more replays nothing.
        ran = texts[:-1] if t.turns - 1 > t.branch else []
        # In a session of the root's key: a random tool says again what it said.
        wanted.setdefault(f"0/test/{root.key}", []).append(ran)
    assert max(map(len, wanted.values())) > 1
    assert {key: sorted(ran) for key, ran in tool.sessions.items()} == {
        key: sorted(ran) for key, ran in wanted.items()
    }


def test_a_rerun_repeats_every_bit():
    for a, b in zip(explored("mcts"), whole("mcts"), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.log_probs, b.log_probs)
