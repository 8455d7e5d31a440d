"""The step on packed demonstrations: what it learns from, what it leaves alone, when it stops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import model_config, params, trajectories

from mdpo_jax.data.batches import Shuffled
from mdpo_jax.data.packing import Layout, item, pack, pair_items
from mdpo_jax.model import sharding, transformer
from mdpo_jax.training import losses
from mdpo_jax.training.losses import Forward, Objective, log_probs
from mdpo_jax.training.state import Optimiser, init_state, schedule
from mdpo_jax.training.step import loss_and_gradients, make_step, put
from mdpo_jax.training.trainer import Plan, StepZeroError, Trainer, copy_params
from mdpo_jax.training.value import ValueTerm
from mdpo_jax.types import Pair, Part, Role

LAYOUT = Layout(8, 224, 16)
PAIRS_OBJECTIVE = Objective("pairs", eta=0.5, nll_weight=0.3)


def pairs(reference=None):
    found = trajectories()
    out = []
    for i in range(0, 8, 2):
        references = [
            np.zeros(len(t.ids), np.float32) if reference is None else reference[t.sample]
            for t in found[i : i + 2]
        ]
        out.append(Pair(found[i], found[i + 1], *references))
    return out


def batch(layout=LAYOUT, **kwargs):
    return pack([pair_items(p, "sampled", **kwargs) for p in pairs()], layout)


@jax.jit
def _plain(p, tokens):
    """[1 T] -> [T] log-probs of one sequence by a whole softmax, one row, no chunks."""
    places = jnp.arange(tokens.shape[1])[None]
    hidden = transformer.hidden_states(model_config(), p, tokens, places, jnp.ones_like(tokens))
    logits = jax.nn.log_softmax(transformer.logits(model_config(), p, hidden)[0], -1)
    picked = jnp.take_along_axis(logits[:-1], tokens[0, 1:, None], -1)[:, 0]
    return jnp.concatenate([jnp.zeros(1), picked])


def plain_log_probs(p, ids):
    """Padding behind the sequence is not seen by what comes before it; it saves compilations."""
    return _plain(p, jnp.asarray(np.pad(ids, (0, 256 - len(ids))))[None])[: len(ids)]


def plain_loss(p):
    total = 0.0
    for pair in pairs():
        sums = []
        for t in (pair.chosen, pair.rejected):
            mask = jnp.asarray(t.roles == Role.ACTION)
            sums.append((jnp.sum(plain_log_probs(p, t.ids) * mask), mask.sum()))
        (chosen, count), (rejected, _) = sums
        margin = PAIRS_OBJECTIVE.eta * (chosen - rejected)
        total += -jax.nn.log_sigmoid(margin) - PAIRS_OBJECTIVE.nll_weight * chosen / count
    return total / len(pairs())


@functools.cache
def plain_gradients():
    return jax.value_and_grad(plain_loss)(params())


def gradients_of(forward, p, arrays):
    return jax.jit(lambda p, b: loss_and_gradients(model_config(), forward, PAIRS_OBJECTIVE, p, b))(
        p, arrays
    )


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, float(jnp.abs(y).max())))


def test_packed_loss_and_gradients_equal_the_plain_ones():
    """Of whole texts, in blocks as they are; test_exact.py has every way of computing them."""
    loss, gradients = plain_gradients()
    forward = Forward(remat="full", logprob_chunk=64)
    got, metrics = gradients_of(forward, params(), put(batch(Layout(2, 224, 4)), None))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    close(got, gradients)


def with_one_prompt(chosen, rejected):
    """The pair, the rejected side's first tokens being those of the chosen one up to its actions."""
    prompt = min(int(np.argmax(side.weights > 0)) for side in (chosen, rejected))
    ids = rejected.ids.copy()
    ids[:prompt] = chosen.ids[:prompt]
    return chosen, rejected._replace(ids=ids)


@pytest.mark.parametrize("attention", ["skipping", "reference"])
def test_a_shared_prompt_changes_no_loss_no_metric_and_no_gradient(attention):
    groups = [with_one_prompt(*pair_items(p, "sampled")) for p in pairs()]
    found = []
    for shared in (False, True):
        packed = pack(groups, Layout(2, 448, 16, shared))
        forward = Forward(attention=attention, shared_prompts=shared)
        found.append((packed, *gradients_of(forward, params(), put(packed, None))))
    (apart, gradients, metrics), (together, got, others) = found
    assert (together.segments > 0).sum() < (apart.segments > 0).sum()
    close(got, gradients)
    assert others.keys() == metrics.keys()
    for name, value in others.items():
        assert float(value) == pytest.approx(float(metrics[name]), rel=1e-5, abs=1e-5), name


def test_gradient_is_exactly_zero_at_observations_and_prompts():
    """With respect to the scored values: what no role emitted carries no weight at all."""
    t = trajectories()[0]
    packed = put(pack([[item(t, "sampled")]], Layout(1, 224, 1)), None)
    micro = {k: v[0] for k, v in packed.items()}
    values = log_probs(model_config(), Forward(), params(), micro)
    gradient = jax.grad(lambda v: jnp.sum(v * micro["weights"]))(values)[0, : len(t.ids)]
    np.testing.assert_array_equal(gradient != 0, t.roles == Role.ACTION)
    assert (t.roles == Role.OBSERVATION).any()


@pytest.mark.parametrize("kind", ["pairs", "unpaired"])
def test_the_gradient_in_the_logits_is_zero_but_where_an_action_is_predicted(kind, monkeypatch):
    """Exactly, through the transformer, the loss and the packing."""
    found = [pair_items(p, "sampled") for p in pairs()[:2]]
    groups = found if kind == "pairs" else [[side] for pair in found for side in pair]
    arrays = put(pack(groups, Layout(4, 224, 4)), None)
    kl = "zero" if kind == "unpaired" else "mismatched"
    # So small an eta that no sigmoid is flat.
    objective = Objective(kind, eta=1e-3, nll_weight=0.3 * (kind == "pairs"), kl=kl)

    p = params()

    def scored(config, forward, delta, micro, counted, **kept):
        hidden = transformer.hidden_states(
            config, p, micro["tokens"], micro["positions"], micro["segments"]
        )
        values = jax.nn.log_softmax(transformer.logits(config, p, hidden) + delta)
        picked = jnp.take_along_axis(values[:, :-1], micro["tokens"][:, 1:, None], -1)[..., 0]
        return jnp.pad(picked, ((0, 0), (1, 0))), hidden

    monkeypatch.setattr(losses, "scored", scored)
    delta = jnp.zeros((4, 224, model_config().vocab_size))
    gradient, _ = jax.jit(
        lambda d, b: loss_and_gradients(model_config(), Forward(), objective, d, b)
    )(delta, arrays)
    parts, segments = (np.asarray(arrays[name][0]) for name in ("parts", "segments"))
    ahead = np.pad(parts[:, 1:], ((0, 0), (0, 1)))  # of the token that a place predicts
    same = segments == np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    moved = np.asarray(jnp.any(gradient != 0, -1))
    np.testing.assert_array_equal(moved, (ahead == Part.TEXT) & same)
    assert set(np.unique(parts)) == {0, Part.TEXT, Part.OBSERVATION, Part.TEMPLATE}


def test_later_log_probs_see_the_observation():
    t = trajectories()[0]
    place = int(np.flatnonzero(t.roles == Role.OBSERVATION)[3])
    changed = t.ids.copy()
    changed[place] = (changed[place] + 1) % model_config().vocab_size
    before, after = (plain_log_probs(params(), ids) for ids in (t.ids, changed))
    np.testing.assert_array_equal(before[:place], after[:place])
    assert np.all(np.asarray(before[place + 1 :]) != np.asarray(after[place + 1 :]))


def trainer(**kwargs):
    return Trainer(model_config(), Forward(), Optimiser(**kwargs), LAYOUT)


def test_scores_equal_the_plain_forward():
    items = [item(t, "sampled") for t in trajectories()[:5]]
    for got, t in zip(trainer().score(params(), items, 2), trajectories(), strict=False):
        np.testing.assert_allclose(got, plain_log_probs(params(), t.ids), atol=2e-5)


PLAN = Plan(batch=2, steps=3, learning_rate=1e-3, warmup_steps=1, final_lr_fraction=0.1, seed=0)


def fit(reference, steps=None):
    groups = [pair_items(p, "sampled") for p in pairs(reference)]
    seen = []
    t = trainer(beta2=0.99)
    final = t.fit(
        copy_params(params()), Shuffled(groups, PLAN.batch, 0), PLAN, Objective("pairs", 0.5),
        check_step_zero=True, report=lambda step, metrics: seen.append(metrics),
    )  # fmt: skip
    return final, seen, t


def test_step_zero_is_ln_2_and_the_loss_falls_without_new_programs():
    items = [item(t, "sampled") for t in trajectories()]
    scores = trainer().score(params(), items, 4)
    final, seen, t = fit(scores)
    assert seen[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert seen[0]["log_ratio/max_abs"] < 1e-3
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert t.compilations(Objective("pairs", 0.5)) == 1
    again, _, _ = fit(scores)
    for a, b in zip(jax.tree.leaves(final), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_step_zero_of_kto_is_half_the_mean_of_the_lambdas():
    items = [item(t, "sampled") for t in trajectories()]
    scores = trainer().score(params(), items, 4)
    reference = {t.sample: s for t, s in zip(trajectories(), scores, strict=True)}
    sides = [side for p in pairs(reference) for side in pair_items(p, "sampled")][:3]
    groups = [[side._replace(mismatched=sides[0])] for side in sides]
    objective = Objective("unpaired", 0.5, lambda_correct=0.8, lambda_wrong=2.0)
    seen = []
    trainer().fit(
        copy_params(params()), Shuffled(groups, 3, 0), dataclasses.replace(PLAN, batch=3),
        objective, check_step_zero=True, report=lambda step, metrics: seen.append(metrics),
    )  # fmt: skip
    assert seen[0]["loss"] == pytest.approx((2 * 0.8 + 2.0) / 6, abs=1e-5)
    assert seen[-1]["loss"] < seen[0]["loss"]


def test_a_value_head_trains_beside_the_policy_on_a_mesh_without_new_programs():
    found = pairs()
    groups = [pair_items(p, "sampled") for p in found[:2]]
    groups += [[item(t, "sampled")._replace(correct=True)] for t in trajectories()[8:11]]
    objective = Objective("pairs", 0.5, value=ValueTerm(1.0, 0.1, 10.0))
    mesh = sharding.make_mesh(2, 2, 1)
    t = Trainer(model_config(), Forward(), Optimiser(), LAYOUT, mesh)
    sharded = jax.device_put(params(), sharding.param_shardings(model_config(), mesh))
    seen = []
    final = t.fit(
        copy_params(sharded), [groups] * 3, PLAN, objective,
        report=lambda step, metrics: seen.append(metrics),
    )  # fmt: skip
    assert final.keys() == params().keys()
    assert seen[0]["loss/value"] > seen[-1]["loss/value"] > 0
    assert t.compilations(objective) == 1


def test_a_wrong_reference_stops_the_run_before_it_learns():
    wrong = [np.full(len(t.ids), -1.0, np.float32) for t in trajectories()]
    with pytest.raises(StepZeroError, match=r"expected loss 0\.693147 and log-ratios of 0"):
        fit(wrong)


def test_likelihood_is_the_token_mean():
    packed = pack([[item(t, "sampled")] for t in trajectories()[:4]], LAYOUT)
    state = init_state(copy_params(params()), Optimiser())
    step = make_step(model_config(), Forward(), Objective("likelihood"), Optimiser())
    _, metrics = step(state, put(packed, None), np.float32(0.0))
    scores = [plain_log_probs(params(), t.ids)[t.roles == Role.ACTION] for t in trajectories()[:4]]
    assert float(metrics["loss"]) == pytest.approx(-float(jnp.concatenate(scores).mean()), rel=1e-5)


def test_schedule_warms_up_and_ends_at_its_fraction():
    rate = schedule(1.0, 10, 200, 0.1)
    assert float(rate(0)) == pytest.approx(1 / 11)
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(200)) == pytest.approx(0.1)
    assert float(schedule(1.0, 40, 20, 0.0)(2)) == pytest.approx(1.0)
