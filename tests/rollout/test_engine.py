"""Trajectories against a naive loop that computes everything anew for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import chat, model_config, params

from mdpo_jax.environment.tool import Observation
from mdpo_jax.model import transformer
from mdpo_jax.rollout.engine import Engine, Limits, Prefix, Request
from mdpo_jax.rollout.sampler import Sampler
from mdpo_jax.rollout.sampling import GREEDY, Sampling
from mdpo_jax.rollout.shapes import Shapes
from mdpo_jax.types import Problem, Role

LIMITS = Limits(
    max_turns=3, turn_tokens=12, trajectory_tokens=30, observation_tokens=16, context=160
)
PROBLEMS = [Problem(f"p/{i}", f"Ana has {i} beads" + " and cards" * (i % 5), "1") for i in range(7)]


class EchoTool:
    """Answers every action with a number; what it saw is kept."""

    def __init__(self):
        self.seen = []

    def start(self, key):
        return EchoSession(self, key)

    def close(self):
        pass


class EchoSession:
    def __init__(self, tool, key):
        self.tool, self.key = tool, key

    def run(self, action):
        from concurrent.futures import Future

        self.tool.seen.append((self.key, action))
        done = Future()
        done.set_result(Observation(str(len(action)), "ok", 0.0))
        return done

    def close(self):
        pass


@pytest.fixture
def always_tool(monkeypatch):
    """A random model writes no code: let every turn ask for the tool."""
    monkeypatch.setattr("mdpo_jax.rollout.engine.wants_tool", lambda text: True)


@functools.cache
def shared_sampler(slots, block, stop_ids):
    """One a shape for all tests; every engine has slots of its own."""
    sampler = Sampler(
        model_config(), Shapes.make(slots, LIMITS.context, block), stop_ids, "float32"
    )
    sampler.load(params())
    return sampler


def engine(slots=4, block=5, tool=None, **options):
    sampler = shared_sampler(slots, block, tuple(chat().stop_ids))
    return Engine(sampler, chat(), tool or EchoTool(), LIMITS, **options), sampler


def requests(samples=2):
    return [Request(p, s, "0/test") for p in PROBLEMS for s in range(samples)]


@jax.jit
def _scores(p, tokens):
    places = jnp.arange(tokens.shape[1])[None]
    hidden = transformer.hidden_states(model_config(), p, tokens, places, jnp.ones_like(tokens))
    return jax.nn.log_softmax(transformer.logits(model_config(), p, hidden)[0])


def next_log_probs(ids):
    """[length V] by one full forward; the padding behind saves compilations."""
    return np.asarray(_scores(params(), jnp.asarray(np.pad(ids, (0, 256 - len(ids))))[None]))


def test_greedy_trajectories_equal_full_recomputation(always_tool):
    found = engine()[0].run(requests(1), policy="x", sampling=GREEDY)
    for t in found:
        assert t.turns > 1
        scores = next_log_probs(t.ids)
        for i in np.flatnonzero(t.roles == Role.ACTION):
            assert t.ids[i] == scores[i - 1].argmax()
            assert t.log_probs[i] == pytest.approx(scores[i - 1, t.ids[i]], abs=1e-4)
        assert not t.log_probs[t.roles != Role.ACTION].any()


def test_a_trajectory_goes_on_from_a_prefix_as_it_did(always_tool):
    tool = EchoTool()
    e = engine(tool=tool)[0]
    whole = e.run(requests(1), policy="x", sampling=GREEDY)
    again = []
    for request, t in zip(requests(1), whole, strict=True):
        start = t.actions[1].start  # behind the first observation
        text = chat().decode(t.ids[t.actions[0]])
        prefix = Prefix(tuple(t.ids[:start].tolist()), tuple(t.roles[:start].tolist()), (text,))
        again.append(Request(request.problem, 0, "0/test", prefix))
    before = len(tool.seen)
    for a, b in zip(whole, e.run(again, policy="x", sampling=GREEDY), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.roles, b.roles)
        assert a.finish == b.finish
        np.testing.assert_allclose(
            a.log_probs[b.log_probs != 0], b.log_probs[b.log_probs != 0], atol=1e-4
        )
        assert not b.log_probs[: b.actions[1].start].any()
    # Where the tool was called again, the first action had run before.
    first = {chat().decode(t.ids[t.actions[0]]) for t in whole if t.turns > 2}
    assert first
    assert first <= {action for _, action in tool.seen[before:]}


def test_a_trajectory_does_not_depend_on_its_neighbours(always_tool):
    whole = engine()[0].run(requests(), policy="x", sampling=Sampling())
    few = engine(slots=3, block=4)[0].run(requests()[5:8], policy="x", sampling=Sampling())
    for a, b in zip(whole[5:8], few, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


def test_a_rerun_repeats_every_bit(always_tool):
    runs = [engine()[0].run(requests(), policy="x", sampling=Sampling()) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.log_probs, b.log_probs)
    assert len({tuple(t.ids) for t in runs[0]}) > len(PROBLEMS)


def test_no_program_compiles_after_warm_up_and_nothing_is_prefilled_twice(always_tool):
    shared_sampler.cache_clear()
    e, sampler = engine()
    # What is read from a file is committed to its device, and so is what comes of it.
    policy = jax.device_put(params(), jax.devices()[0])
    sampler.load(policy)
    e.run(requests(), policy="x", sampling=Sampling())
    assert sampler.late_compilations() == 0
    warm, before = sampler.compilations(), e.activity.copy()
    found = e.run(requests(), policy="x", sampling=Sampling(0.8, 5, 0.9))
    sampler.load(policy)
    assert sampler.compilations() == warm
    did = e.activity - before
    # A prompt is read once for both samples of its problem, which begin together here.
    prompts = [int((t.roles == Role.PROMPT).sum()) for t in found if t.sample == 0]
    given = sum(int((t.roles != Role.ACTION).sum()) for t in found)
    assert did.copied == sum(prompts)
    assert did.prefilled == given - sum(prompts)
    assert did.decoded >= sum(int((t.roles == Role.ACTION).sum()) for t in found)
    assert did.trajectories == len(found)
    assert did.calls == sum(t.turns - 1 for t in found)
    assert not did.stuck


def test_limits_and_roles(always_tool):
    for t in engine()[0].run(requests(), policy="x", sampling=Sampling()):
        actions = [s.stop - s.start for s in t.actions]
        assert max(actions) <= LIMITS.turn_tokens
        assert sum(actions) <= LIMITS.trajectory_tokens
        assert t.turns <= LIMITS.max_turns
        assert len(t.tool_statuses) == t.turns - 1
        assert t.finish in ("answered", "turn_limit", "token_limit")
        assert t.roles[0] == Role.PROMPT


def test_without_code_a_turn_ends_the_trajectory():
    for t in engine()[0].run(requests(1), policy="x", sampling=Sampling()):
        assert t.turns == 1
        assert t.finish in ("answered", "no_code", "token_limit")


def test_the_tool_sees_the_text_of_the_action(always_tool):
    tool = EchoTool()
    found = engine(tool=tool)[0].run(requests(1)[:1], policy="x", sampling=Sampling())
    first = found[0].ids[found[0].actions[0]]
    assert tool.seen[0] == ("0/test/p/0#0", chat().decode(first))


def test_a_prompt_that_does_not_fit_is_named():
    long = Request(Problem("big", "word " * 400, "1"), 0, "s")
    with pytest.raises(ValueError, match=r"'big': \d+ tokens to begin with; rollout.context=160"):
        engine()[0].run([long], policy="x", sampling=Sampling())


def test_stop_strings_cut_at_a_tokens_edge(monkeypatch):
    e, _ = engine()
    monkeypatch.setattr(e._chat, "stop_strings", ("a",), raising=False)
    for t in e.run(requests(1), policy="x", sampling=Sampling()):
        action = t.ids[t.actions[0]]
        assert "a" not in chat().decode(action[:-1])


def test_what_a_stop_string_cuts_does_not_depend_on_the_blocks(monkeypatch):
    """In a block of 12 a stop token may stand behind the string; in blocks of 1 it never does."""
    # Many of both, so that turns often end by a stop token behind a stop string.
    stops = (*chat().stop_ids, *range(40, 100))
    monkeypatch.setattr(chat(), "stop_strings", tuple("aeiourst"))
    monkeypatch.setattr(chat(), "stop_ids", stops)
    found = []
    for block in (1, 12):
        e, _ = engine(block=block)
        found.append([t.ids.tolist() for t in e.run(requests(), policy="x", sampling=Sampling())])
    assert found[0] == found[1]
    cut = [ids for ids in found[0] if ids[-1] not in stops]
    assert 0 < len(cut) < len(found[0])


class SlowTool(EchoTool):
    """Answers half of the calls from a thread, after a while; `never` names a call it never answers."""

    def __init__(self, seconds=0.05, never=None):
        super().__init__()
        self.seconds, self.never = seconds, never

    def start(self, key):
        return SlowSession(self, key)


class SlowSession(EchoSession):
    calls = 0

    def run(self, action):
        import threading
        from concurrent.futures import Future

        self.calls += 1
        answer = super().run(action)
        late = Future()
        if (self.key, self.calls) == self.tool.never:
            return late
        if len(action) % 2:
            return answer
        timer = threading.Timer(self.tool.seconds, lambda: late.set_result(answer.result()))
        timer.start()
        return late


@pytest.mark.parametrize("collect", ["fixed", "arrival"])
def test_what_is_sampled_does_not_depend_on_when_tools_answer(always_tool, collect):
    before = engine()[0].run(requests(), policy="x", sampling=Sampling())
    e, _ = engine(tool=SlowTool(), collect=collect)
    found = e.run(requests(), policy="x", sampling=Sampling())
    for a, b in zip(before, found, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
    assert e.activity.report()["mean_tools_busy"] > 0


@pytest.mark.parametrize("collect", ["fixed", "arrival"])
def test_a_call_that_never_ends_is_an_observation(always_tool, collect):
    tool = SlowTool(0.0, never=("0/test/p/1#0", 1))
    e, _ = engine(tool=tool, patience=0.3, collect=collect)
    found = e.run(requests(1), policy="x", sampling=Sampling())
    assert [t.problem_id for t in found] == [p.id for p in PROBLEMS]
    # The session is not asked again, so that every later call of it has timed out as well.
    assert set(found[1].tool_statuses) == {"timeout"}
    assert found[1].turns > 1
    assert e.activity.stuck == 1
    assert all(set(t.tool_statuses) <= {"ok"} for t in found if t.problem_id != "p/1")


def test_an_engine_goes_on_after_a_run_that_was_broken_off(always_tool):
    e, _ = engine()
    stream = e.stream(requests(), policy="x", sampling=Sampling())
    next(stream)
    stream.close()
    found = e.run(requests(1), policy="x", sampling=GREEDY)
    again = engine()[0].run(requests(1), policy="x", sampling=GREEDY)
    assert [t.ids.tolist() for t in found] == [t.ids.tolist() for t in again]


def test_prefixes_that_several_go_on_from_are_read_once(always_tool):
    e, _ = engine()
    [t] = e.run(requests(1)[:1], policy="x", sampling=GREEDY)
    start = t.actions[1].start
    text = chat().decode(t.ids[t.actions[0]])
    prefix = Prefix(tuple(t.ids[:start].tolist()), tuple(t.roles[:start].tolist()), (text,))
    before = e.activity.copy()
    asked = [Request(PROBLEMS[0], k, "s", prefix) for k in range(9)]
    found = e.run(asked, policy="x", sampling=Sampling())
    observed = sum(len(f.ids) - start - sum(s.stop - s.start for s in f.actions[1:]) for f in found)
    assert (e.activity - before).prefilled == start + observed
    assert (e.activity - before).copied == 8 * start


def test_idle_slots_are_neither_decoded_nor_touched(monkeypatch):
    """A slot that pauses while others decode, in fewer rows or in more, goes on as if it had not."""
    monkeypatch.setattr("mdpo_jax.rollout.sampler._FEWEST", 1)
    sampler = Sampler(model_config(), Shapes.make(4, LIMITS.context, 5), (), "float32")
    sampler.load(params())
    prompts = [[5 + i, 9, 12, 7 + i] for i in range(4)]
    held, seeds = np.full(4, 4), [(0, i) for i in range(4)]

    def play(*active):
        state = sampler.extend(sampler.start(), range(4), prompts, [0] * 4, seeds)
        lengths, ids = held.copy(), [[] for _ in range(4)]
        for some in active:
            limits = np.isin(np.arange(4), some) * 5
            state, block = sampler.decode(state, lengths, limits, Sampling())
            assert block.counts.tolist() == limits.tolist()
            for slot in some:
                ids[slot] += block.ids[slot].tolist()
            lengths = lengths + limits
        return ids

    together = play(range(4), range(4))
    assert play([1], [0, 2, 3], [1, 3], [0, 2]) == together
    assert [len(sampler._active(np.arange(4) < n)[1]) for n in (1, 2, 3, 4)] == [1, 2, 4, 4]
