"""Every objective through packing, micro-batches and the step's loop, by hand in float64.

The model is a table of log-probs by token id, so that what a batch does to the numbers is all there
is to see; test_step.py has the transformer.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from support import chat, model_config, trajectories

from mdpo_jax.data.packing import Layout, item, mismatched, pack
from mdpo_jax.data.parts import parts_of
from mdpo_jax.objectives import mdpo_loss
from mdpo_jax.training import losses, step
from mdpo_jax.training.losses import Forward, Objective
from mdpo_jax.training.step import loss_and_gradients, put
from mdpo_jax.training.value import Joint, ValueTerm
from mdpo_jax.types import Part, Role

LAYOUT = Layout(2, 224, 6)  # six sequences fill more than one micro-batch
WIDTH = 5


@pytest.fixture(autouse=True)
def table_model(monkeypatch):
    """params: {"table": [V] log-probs by id, "embedding": [V W] hidden states by id}."""

    def scored(config, forward, params, micro, counted=None, **kept):
        return params["table"][micro["tokens"]], params["embedding"][micro["tokens"]]

    monkeypatch.setattr(losses, "scored", scored)
    monkeypatch.setattr(step, "log_probs", lambda *args: scored(*args)[0])
    jax.clear_caches()


def tables(seed=0):
    rng = np.random.default_rng(seed)
    size = model_config().vocab_size
    table = rng.normal(-1, 0.3, size).astype(np.float32)
    return {"table": table, "embedding": rng.normal(0, 1, (size, WIDTH)).astype(np.float32)}


def made(count=6, **options):
    """Items of several problems with a reference, right and wrong in turn."""
    reference = tables(1)["table"]
    return [
        item(t, "sampled", reference=reference[t.ids], parts=parts_of(t, chat()), **options)
        ._replace(correct=i % 2 == 0)
        for i, t in enumerate(trajectories()[:count])
    ]  # fmt: skip


def log_ratios(items, policy=None):
    table = (policy or tables())["table"].astype(np.float64)
    return np.array([np.sum((table[i.ids] - i.reference) * i.weights) for i in items])


def result(objective, groups, params=None, **more):
    batch = put(pack(groups, LAYOUT), None)
    return jax.jit(
        lambda p, b: loss_and_gradients(model_config(), Forward(), objective, p, b, **more)
    )(params or tables(), batch)


def pairs_of(items):
    return [tuple(items[i : i + 2]) for i in range(0, len(items), 2)]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "robust"])
@pytest.mark.parametrize("normalised", [False, True])
def test_every_pair_loss_sees_the_sums_of_its_sides(loss, normalised):
    items = made()
    smoothing = 0.1 if loss == "robust" else 0.0
    objective = Objective(
        "pairs", 0.3, loss=loss, label_smoothing=smoothing, length_normalised=normalised
    )
    _, metrics = result(objective, pairs_of(items))
    ratios, tokens = log_ratios(items), np.array([i.weights.sum() for i in items])
    lengths = (jnp.asarray(tokens[::2]), jnp.asarray(tokens[1::2])) if normalised else None
    expected, _ = mdpo_loss(
        jnp.asarray(ratios[::2]), jnp.asarray(ratios[1::2]), eta=0.3, kind=loss,
        label_smoothing=smoothing, lengths=lengths,
    )  # fmt: skip
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["logps/chosen"]) == pytest.approx(
        np.mean([np.sum(tables()["table"][i.ids] * i.weights) for i in items[::2]]), rel=1e-5
    )


def test_the_margin_is_subtracted_in_each_pair_s_place():
    items = [i._replace(term_c=0.1 * n) for n, i in enumerate(made())]
    _, metrics = result(Objective("pairs", 0.3), pairs_of(items)[::-1])
    ratios = log_ratios(items)
    logits = 0.3 * (ratios[::2] - ratios[1::2]) - 0.1
    assert float(metrics["loss"]) == pytest.approx(-np.mean(np.log(expit(logits))), rel=1e-5)
    assert float(metrics["term_c/margin_mean_abs"]) == pytest.approx(0.1, rel=1e-5)


def borrowed(items):
    """Each with the completion of the next, scored under the reference."""
    found = trajectories()[: len(items)]
    reference = tables(1)["table"]
    out = []
    for i, entry in enumerate(items):
        t = mismatched(found[i], found[(i + 1) % len(items)], 224)
        stand_in = item(t, "sampled", reference=reference[t.ids])
        out.append(entry._replace(mismatched=stand_in))
    return out


@pytest.mark.parametrize("count", [6, 5, 1])
@pytest.mark.parametrize("kl", ["mismatched", "batch_mean", "zero"])
@pytest.mark.parametrize("sign", [1, -1])
def test_kto_takes_its_reference_point_over_the_whole_batch(count, kl, sign):
    """Odd and one-sided batches included; for one sign the estimate is clamped at 0."""
    items = borrowed(made(count))
    params = tables()
    if sign < 0:
        params["table"] = params["table"] - 0.5
    objective = Objective("unpaired", 0.05, kl=kl, lambda_correct=0.7, lambda_wrong=1.3)
    stand_ins = [[i.mismatched] for i in items]
    more = {"mismatched": put(pack(stand_ins, LAYOUT), None)} if kl == "mismatched" else {}
    _, metrics = result(objective, [[i] for i in items], params, **more)
    ratios = log_ratios(items, params)
    source = {"mismatched": [i.mismatched for i in items], "batch_mean": items, "zero": []}[kl]
    estimate = max(0.0, float(np.mean(log_ratios(source, params)))) if source else 0.0
    right = np.array([i.correct for i in items])
    side = np.where(right, 1, -1)
    each = np.where(right, 0.7, 1.3) * expit(-side * 0.05 * (ratios - estimate))
    assert float(metrics["loss"]) == pytest.approx(each.mean(), rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(estimate, rel=1e-5, abs=1e-5)
    assert float(metrics["rewards/chosen"]) == pytest.approx(0.05 * ratios[right].mean(), rel=1e-4)
    if right.all():
        assert np.isnan(float(metrics["rewards/rejected"]))
    else:
        expected = 0.05 * ratios[~right].mean()
        assert float(metrics["rewards/rejected"]) == pytest.approx(expected, rel=1e-4)


def test_no_gradient_goes_through_the_reference_point():
    items = borrowed(made())
    stand_ins = put(pack([[i.mismatched] for i in items], LAYOUT), None)
    groups = [[i] for i in items]
    objective = Objective("unpaired", 0.05)
    params = tables()
    params["table"] = params["table"] + 0.1
    gradients, metrics = result(objective, groups, params, mismatched=stand_ins)
    kl = float(metrics["kl"])
    assert kl > 0

    def by_hand(table):
        total = 0.0
        for entry in items:
            ratio = jnp.sum((table[entry.ids] - entry.reference) * entry.weights)
            total += jax.nn.sigmoid((-1 if entry.correct else 1) * 0.05 * (ratio - kl))
        return total / len(items)

    expected = jax.grad(by_hand)(jnp.asarray(params["table"]))
    np.testing.assert_allclose(gradients["table"], expected, atol=1e-6)


FINITE = [
    Objective("pairs", 0.3, nll_weight=0.2, observation_ce_weight=0.1),
    Objective("pairs", 0.3, loss="ipo", length_normalised=True),
    Objective("pairs", 0.3, loss="robust", label_smoothing=0.2),
    Objective("unpaired", 0.05, kl="zero", lambda_wrong=1.3),
    Objective("likelihood"),
]


@pytest.mark.parametrize("objective", FINITE)
def test_gradients_agree_with_finite_differences_in_float64(objective):
    items = made(4)
    groups = pairs_of(items) if objective.kind == "pairs" else [[i] for i in items]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {name: value.astype(np.float64) for name, value in tables().items()}
        way = rng.normal(0, 1, params["table"].shape)
        gradients, _ = result(objective, groups, params)
        up, down = (
            float(
                result(objective, groups, params | {"table": params["table"] + e * way})[1]["loss"]
            )
            for e in (1e-6, -1e-6)
        )
    slope = float(np.sum(np.asarray(gradients["table"], np.float64) * way))
    assert (up - down) / 2e-6 == pytest.approx(slope, rel=1e-5)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("kind", ["pairs", "unpaired"])
def test_a_reference_in_the_step_equals_the_stored_one(kind):
    items = made()
    groups = pairs_of(items) if kind == "pairs" else [[i] for i in items]
    objective = Objective(kind, 0.3, kl="batch_mean" if kind == "unpaired" else "mismatched")
    gradients, metrics = result(objective, groups)
    empty = [[i._replace(reference=np.zeros_like(i.reference)) for i in g] for g in groups]
    again, same = result(objective, empty, reference=jax.tree.map(jnp.asarray, tables(1)))
    np.testing.assert_allclose(again["table"], gradients["table"], atol=1e-7)
    for name in metrics:
        np.testing.assert_allclose(same[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_log_ratios_by_turn_and_by_part_add_up():
    items = made()
    objective = dataclasses.replace(Objective("pairs", 0.3), turns=2)  # some have three
    _, metrics = result(objective, pairs_of(items))
    ratios = log_ratios(items)
    for side, own in (("chosen", ratios[::2]), ("rejected", ratios[1::2])):
        found = {k: float(v) for k, v in metrics.items() if k.startswith(f"log_ratio/{side}/")}
        turns = [v for k, v in found.items() if "turn_" in k]
        parts = [v for k, v in found.items() if "turn_" not in k]
        assert (len(turns), len(parts)) == (2, 3)
        assert sum(turns) == pytest.approx(own.mean(), rel=1e-5)
        assert sum(parts) == pytest.approx(own.mean(), rel=1e-5)
        assert all(parts)
    first = [
        np.sum((tables()["table"][i.ids] - i.reference) * i.weights * (i.turns == 1))
        for i in items[::2]
    ]
    assert float(metrics["log_ratio/chosen/turn_1"]) == pytest.approx(np.mean(first), rel=1e-5)


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "likelihood"])
def test_the_observations_likelihood_is_an_addition(kind):
    items = made()
    groups = pairs_of(items) if kind == "pairs" else [[i] for i in items]
    plain = Objective(kind, 0.3, kl="batch_mean" if kind == "unpaired" else "mismatched")
    _, before = result(plain, groups)
    _, after = result(dataclasses.replace(plain, observation_ce_weight=0.25), groups)
    seen = [tables()["table"][i.ids][i.parts == Part.OBSERVATION] for i in items]
    expected = -np.mean(np.concatenate(seen))
    assert float(after["loss/observation_ce"]) == pytest.approx(expected, rel=1e-5)
    assert float(after["loss"] - before["loss"]) == pytest.approx(0.25 * expected, rel=1e-4)


TERM = ValueTerm(utility=4.0, weight=0.5, learning_rate_scale=1.0)


def value_by_hand(entry, params, head):
    """(C), and (found, target) of each read-out of one sequence, straight from the definitions."""
    t = next(t for t in trajectories() if t.ids is entry.ids)
    rewards = 0.3 * (params["table"][entry.ids].astype(np.float64) - entry.reference)
    found = params["embedding"][entry.ids] @ head["kernel"] + head["bias"]
    earned = [float(rewards[span].sum()) for span in t.actions]
    utility, c, fit = 4.0 * entry.correct, 0.0, []
    for h, span in enumerate(t.actions):
        fit.append((found[span.start - 1], utility - sum(earned[h:])))  # V of the state
        fit.append((found[span.stop - 1], utility - sum(earned[h + 1 :])))  # Q of the action
        if h:
            c += found[span.start - 1] - found[t.actions[h - 1].stop - 1]
    return c, fit


def test_the_value_head_is_read_and_fitted_where_it_should_be():
    items = made()
    pairs, single = pairs_of(items[:4]), [[i] for i in items[4:]]
    rng = np.random.default_rng(2)
    head = {"kernel": rng.normal(0, 1, WIDTH).astype(np.float32), "bias": np.float32(0.2)}
    params = tables()
    objective = Objective("pairs", 0.3, value=TERM)
    gradients, metrics = result(objective, [*pairs, *single], Joint(params, head))
    c = np.array([value_by_hand(i, params, head)[0] for i in items[:4]])
    ratios = log_ratios(items[:4])
    logits = 0.3 * (ratios[::2] - ratios[1::2]) + c[::2] - c[1::2]
    preference = -np.mean(np.log(expit(logits)))
    assert float(metrics["loss/preference"]) == pytest.approx(preference, rel=1e-5)
    fit = [both for g in single for both in value_by_hand(g[0], params, head)[1]]
    squared = np.mean([(found - target) ** 2 for found, target in fit])
    assert float(metrics["loss/value"]) == pytest.approx(squared, rel=1e-4)
    assert float(metrics["loss"]) == pytest.approx(preference + 0.5 * squared, rel=1e-4)
    # The preference loss moves no value, and the value's target no policy.
    slope = np.mean([2 * (found - target) for found, target in fit])
    assert float(gradients.head["bias"]) == pytest.approx(0.5 * slope, rel=1e-4)
    plain, _ = result(
        Objective("pairs", 0.3),
        [
            (a._replace(term_c=float(x)), b._replace(term_c=float(y)))
            for (a, b), x, y in zip(pairs, c[::2], c[1::2], strict=True)
        ],
    )
    np.testing.assert_allclose(gradients.policy["table"], plain["table"], atol=1e-6)


@pytest.mark.parametrize("kl", ["mismatched", "batch_mean"])
def test_a_reference_point_never_comes_from_elsewhere(kl):
    more = {} if kl == "mismatched" else {"mismatched": put(pack([[made(1)[0]]], LAYOUT), None)}
    with pytest.raises(ValueError, match=f"kl={kl} with"):
        result(Objective("unpaired", 0.1, kl=kl), [[i] for i in made(2)], **more)


def test_another_mask_changes_the_sums_alone():
    entry = made(1)[0]
    template = item(trajectories()[0], "template", reference=entry.reference)
    assert template.weights.sum() > entry.weights.sum()
    _, metrics = result(Objective("likelihood"), [[template]])
    chosen = tables()["table"][template.ids][template.weights > 0]
    assert float(metrics["loss"]) == pytest.approx(-chosen.mean(), rel=1e-5)


def test_a_mismatched_sequence_is_one_s_prompt_and_the_other_s_completion():
    one, other = trajectories()[0], trajectories()[1]
    both = mismatched(one, other, 224)
    cut = int(np.flatnonzero(one.roles != Role.PROMPT)[0])
    start = int(np.flatnonzero(other.roles != Role.PROMPT)[0])
    np.testing.assert_array_equal(both.ids, [*one.ids[:cut], *other.ids[start:]])
    np.testing.assert_array_equal(both.roles[cut:], other.roles[start:])
    short = mismatched(one, other, cut + 3)  # a long prompt with a long completion
    np.testing.assert_array_equal(short.ids, both.ids[: cut + 3])
    assert short.turns == 1
