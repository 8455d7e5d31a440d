"""The step on an adapter: its gradients, what it leaves alone, and what it never computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import model_config, params, trajectories

from mdpo_jax.data.batches import Shuffled
from mdpo_jax.data.packing import Item, Layout, item, pack, pair_items
from mdpo_jax.model import lora, sharding
from mdpo_jax.model.families import ModelConfig, param_shapes
from mdpo_jax.model.lora import Lora
from mdpo_jax.training.losses import Forward, Objective
from mdpo_jax.training.state import Optimiser, TrainState, init_state
from mdpo_jax.training.step import Fixed, loss_and_gradients, make_step, put
from mdpo_jax.training.trainer import Plan, Trainer, copy_params
from mdpo_jax.types import Pair

LAYOUT = Layout(8, 224, 16)
OBJECTIVE = Objective("pairs", eta=0.5, nll_weight=0.3)
LORA = Lora(2, 3.0)


@functools.cache
def adapters():
    """Random, B too."""
    rng = np.random.default_rng(5)
    tree = lora.init(model_config(), LORA, jax.random.key(1))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), tree)


def batch(layout=LAYOUT, scores=None):
    found, groups = trajectories(), []
    for i in range(0, 8, 2):
        reference = [np.zeros(len(t.ids), np.float32) for t in found[i : i + 2]]
        if scores is not None:
            reference = scores[i : i + 2]
        groups.append(pair_items(Pair(found[i], found[i + 1], *reference), "sampled"))
    return groups if scores is not None else pack(groups, layout)


def near(found, expected):
    np.testing.assert_allclose(
        found, expected, atol=2e-5 * max(1.0, float(jnp.abs(expected).max()))
    )


def gradients_of(base, a, arrays, forward=Forward()):  # noqa: B008
    @jax.jit
    def run(base, a, arrays):
        return loss_and_gradients(
            model_config(), forward, OBJECTIVE, a, arrays, lambda a: lora.combine(base, a, LORA)
        )

    return run(base, a, arrays)


@pytest.mark.parametrize(("layout", "remat"), [(LAYOUT, "none"), (Layout(2, 224, 4), "full")])
def test_gradients_are_those_of_the_merged_model_through_the_merge(layout, remat):
    """Whole gradients of a dense model, chained through W + alpha/r * A @ B by autodiff."""
    arrays = put(batch(layout), None)
    forward = Forward(remat=remat, logprob_chunk=64)
    found, metrics = gradients_of(params(), adapters(), arrays, forward)
    merged, back = jax.vjp(lambda a: lora.merge(params(), a, LORA), adapters())
    dense = jax.jit(lambda p, b: loss_and_gradients(model_config(), forward, OBJECTIVE, p, b))
    whole, expected = dense(merged, arrays)
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    jax.tree.map(near, found, back(whole)[0])


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 2, 1)], ids=["1 x 2 x 2", "2 x 2 x 1"])
def test_a_mesh_gives_the_single_device_result(shape):
    one, expected = gradients_of(params(), adapters(), put(batch(), None))
    mesh = sharding.make_mesh(*shape)
    base = jax.device_put(params(), sharding.param_shardings(model_config(), mesh))
    placed = jax.device_put(adapters(), lora.shardings(model_config(), LORA, mesh))
    with jax.set_mesh(mesh):
        many, metrics = gradients_of(base, placed, put(batch(), mesh))
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
    jax.tree.map(near, many, one)


@pytest.mark.parametrize("shape", [None, (1, 2, 2), (2, 1, 2)], ids=str)
def test_steps_change_the_adapter_alone_in_one_program(shape):
    mesh = None if shape is None else sharding.make_mesh(*shape)
    base, small = copy_params(params()), copy_params(adapters())
    if mesh is not None:
        base = jax.device_put(base, sharding.param_shardings(model_config(), mesh))
        small = jax.device_put(small, lora.shardings(model_config(), LORA, mesh))
    before = jax.tree.map(np.asarray, base)
    plan = Plan(2, 3, 1e-3, 1, 0.1, 0)
    t = Trainer(model_config(), Forward(), Optimiser(beta2=0.99), LAYOUT, mesh, LORA)
    objective, seen = Objective("pairs", 0.5), []
    items = [item(t, "sampled") for t in trajectories()]
    scores = t.score(lora.combine(base, small, LORA), items, 4)
    final = t.fit(
        small, Shuffled(batch(scores=scores), 2, 0), plan, objective, fixed=Fixed(base),
        check_step_zero=True, report=lambda step, metrics: seen.append(metrics),
    )  # fmt: skip
    assert seen[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert seen[0]["log_ratio/max_abs"] < 1e-3
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert t.compilations(objective) == 1
    jax.tree.map(np.testing.assert_array_equal, base, before)
    assert jax.tree.structure(final) == jax.tree.structure(adapters())
    for moved, start in zip(jax.tree.leaves(final), jax.tree.leaves(adapters()), strict=True):
        assert not np.array_equal(moved, start)


def test_sft_and_raft_learn_through_the_adapter_too():
    groups = [[item(t, "sampled")] for t in trajectories()[:8]]
    t = Trainer(model_config(), Forward(), Optimiser(beta2=0.99), LAYOUT, None, LORA)
    losses = []
    t.fit(
        lora.init(model_config(), LORA, jax.random.key(0)), Shuffled(groups, 4, 0),
        Plan(4, 6, 1e-2, 1, 1.0, 0), Objective("likelihood"), fixed=Fixed(params()),
        report=lambda step, metrics: losses.append(metrics["loss"]),
    )  # fmt: skip
    assert losses[-1] < losses[0] - 0.05


def test_the_state_holds_nothing_of_the_base():
    state = init_state(copy_params(adapters()), Optimiser())
    number = lora.count(model_config(), LORA)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == number
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * number


# Sizes of which no two coincide, products included, so that a shape tells what an array is; and so
# few tokens that a gradient of the base would outweigh all activations.
WIDE = ModelConfig("gemma", 331, 136, 712, 8, 4, 2, 26, tied=False)


def _shapes(jaxpr):
    """Of every value computed in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _shapes(inner)


def _initial(p):
    return TrainState(p, Optimiser().transform().init(p), jnp.zeros((), jnp.int32))


@functools.cache
def _traced(which, remat):
    """The step of one pair of 20 tokens, with an adapter or on all weights; no array is made."""
    ids, ones = np.arange(1, 21, dtype=np.int32), np.ones(20, np.float32)
    arrays = put(pack([[Item(ids, ones, ones), Item(ids, ones, ones)]], Layout(2, 24, 4)), None)
    base = param_shapes(WIDE)
    if which is None:
        params, base = base, None
    else:
        params = jax.eval_shape(lambda: lora.init(WIDE, which, jax.random.key(0)))
    step = make_step(WIDE, Forward(remat=remat), OBJECTIVE, Optimiser(), None, which)
    return step.trace(jax.eval_shape(_initial, params), arrays, jnp.float32(0), Fixed(base))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_of_the_bases_size_is_ever_computed(remat):
    """No value of the program has a stacked kernel's or a table's shape."""
    large = {x.shape for x in jax.tree.leaves(param_shapes(WIDE)) if x.ndim > 1 and x.size > 2000}
    for which, expected in ((LORA, set()), (None, large)):
        assert set(_shapes(_traced(which, remat).jaxpr.jaxpr)) & large == expected, which


def test_the_compiled_step_has_no_memory_for_one():
    base = sum(4 * x.size for x in jax.tree.leaves(param_shapes(WIDE)))
    used = {w: _traced(w, "full").lower().compile().memory_analysis() for w in (LORA, None)}
    assert used[None].temp_size_in_bytes > base
    assert used[LORA].temp_size_in_bytes < base / 2
    assert used[None].output_size_in_bytes > 2.9 * base
    assert used[LORA].output_size_in_bytes < base / 10
