"""Each optimiser by hand in float64, what it keeps and where, and a step of it on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import tokenizer, trajectories

from mdpo_jax.data.batches import Shuffled
from mdpo_jax.data.packing import Layout, item, pack
from mdpo_jax.model import sharding, transformer
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.training.losses import Forward, Objective
from mdpo_jax.training.state import Optimiser, init_state, state_shardings
from mdpo_jax.training.step import make_step, put
from mdpo_jax.training.trainer import Plan, Trainer, copy_params

NAMES = ("adamw", "adamw_bf16_moments", "adafactor", "lion")
SHAPES = {"matrix": (2, 160, 3, 128), "small": (2, 16, 8), "norm": (2, 16)}


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(scale=scale, size=s).astype(np.float32) for k, s in SHAPES.items()}


# Growing, so that the first is not clipped and Adafactor's updates would be.
GRADIENTS, CLIP = [tree(s, 0.01 * s) for s in range(1, 4)], 5.0
PARAMS = tree(0)


def updates(optimiser, params=PARAMS):
    """Of three steps, before the learning rate, and the state behind them."""
    transform = optimiser.transform()
    state, update, found = transform.init(params), jax.jit(transform.update), []
    for gradients in GRADIENTS:
        new, state = update(gradients, state, params)
        found.append(new)
    return found, state


def clipped(gradients, limit):
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradients.values()))
    return {k: g.astype(np.float64) * min(1.0, limit / norm) for k, g in gradients.items()}


def adam_by_hand(b1, b2):
    mu, nu, out = dict.fromkeys(SHAPES, 0.0), dict.fromkeys(SHAPES, 0.0), []
    for t, gradients in enumerate(GRADIENTS, 1):
        g = clipped(gradients, CLIP)
        mu = {k: b1 * mu[k] + (1 - b1) * g[k] for k in g}
        nu = {k: b2 * nu[k] + (1 - b2) * g[k] ** 2 for k in g}
        steps = {k: mu[k] / (1 - b1**t) / (np.sqrt(nu[k] / (1 - b2**t)) + 1e-8) for k in g}
        out.append({k: steps[k] + 0.1 * PARAMS[k] for k in g})
    return out


def lion_by_hand():
    mu, out = dict.fromkeys(SHAPES, 0.0), []
    for gradients in GRADIENTS:
        g = clipped(gradients, CLIP)
        out.append({k: np.sign(0.9 * mu[k] + 0.1 * g[k]) + 0.1 * PARAMS[k] for k in g})
        mu = {k: 0.99 * mu[k] + 0.01 * g[k] for k in g}
    return out


def adafactor_by_hand():
    """Shazeer & Stern 2018, algorithm 4, without momentum, relative steps and parameter scale."""
    rows, columns, whole, out = 0.0, 0.0, dict.fromkeys(SHAPES, 0.0), []
    for t, gradients in enumerate(GRADIENTS, 1):
        g, decay, steps = clipped(gradients, CLIP), 1 - t**-0.8, {}
        for k in g:
            squares = g[k] ** 2 + 1e-30
            if k == "matrix":  # axes 1 and 3 are the two of at least 128
                rows = decay * rows + (1 - decay) * squares.mean(1, keepdims=True)
                columns = decay * columns + (1 - decay) * squares.mean(3, keepdims=True)
                moment = rows * columns / rows.mean(3, keepdims=True)
            else:
                moment = whole[k] = decay * whole[k] + (1 - decay) * squares
            step = g[k] / np.sqrt(moment)
            steps[k] = step / max(1.0, np.sqrt(np.mean(step**2))) + 0.1 * PARAMS[k]
        out.append(steps)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_updates_equal_those_by_hand(name):
    by_hand = {"lion": lion_by_hand, "adafactor": adafactor_by_hand}
    expected = by_hand.get(name, functools.partial(adam_by_hand, 0.9, 0.98))()
    found, _ = updates(Optimiser(beta2=0.98, weight_decay=0.1, clip=CLIP, name=name))
    for step, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        # What is kept in bfloat16 is read from the second step on.
        off = 0.02 if name == "adamw_bf16_moments" and step else 1e-4
        for k, value in wanted.items():
            np.testing.assert_allclose(got[k], value, rtol=off, atol=off, err_msg=f"{step} {k}")


def test_adafactor_is_optax_s_own_without_its_schedule():
    theirs = optax.adafactor(1.0, multiply_by_parameter_scale=False)
    state = theirs.init(PARAMS)
    found, _ = updates(Optimiser(clip=1e9, name="adafactor"))
    for gradients, got in zip(GRADIENTS, found, strict=True):
        wanted, state = theirs.update(gradients, state, PARAMS)
        for k in SHAPES:
            np.testing.assert_allclose(got[k], -wanted[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "kept", "per_parameter"),
    [("adamw", "float32", 8), ("adamw_bf16_moments", "bfloat16", 4), ("lion", "float32", 4)],
)
def test_moments_have_their_type_whatever_the_parameters(name, kept, per_parameter, dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)
    optimiser = Optimiser(name=name)
    for state in (optimiser.transform().init(params), updates(optimiser, params)[1]):
        moments = [x for x in jax.tree.leaves(state) if x.ndim]
        assert {str(x.dtype) for x in moments} == {kept}
        count = sum(x.size for x in PARAMS.values())
        assert sum(x.nbytes for x in moments) == per_parameter * count


def test_adafactor_keeps_a_row_and_a_column():
    _, state = updates(Optimiser(name="adafactor"))
    kept = {x.shape for x in jax.tree.leaves(state) if x.ndim}
    assert kept == {(2, 3, 128), (2, 160, 3), (2, 16, 8), (2, 16), (1,)}


def test_a_second_moment_in_bfloat16_falls_as_it_should():
    """To the nearest it would stay where it is for ever."""
    transform = Optimiser(name="adamw_bf16_moments", clip=1e9).transform()
    params = {"w": jnp.zeros(4096)}
    update = jax.jit(transform.update)
    _, state = update({"w": jnp.ones(4096)}, transform.init(params), params)
    for _ in range(200):
        _, state = update({"w": jnp.zeros(4096)}, state, params)
    [nu] = [s.nu["w"] for s in state if hasattr(s, "nu")]
    assert float(nu.astype(jnp.float32).mean()) == pytest.approx(0.001 * 0.999**200, rel=0.01)


MESH_AXES = {
    "matrix": (None, ("fsdp",), None, ("tensor",)), "small": (None, ("fsdp",)), "norm": ()
}  # fmt: skip


def on_mesh():
    mesh = sharding.make_mesh(1, 2, 2)
    return mesh, {k: NamedSharding(mesh, PartitionSpec(*axes)) for k, axes in MESH_AXES.items()}


@pytest.mark.parametrize("name", NAMES)
def test_updates_on_a_mesh_gather_nothing_and_are_those_of_one_device(name):
    _, shardings = on_mesh()
    optimiser = Optimiser(name=name)
    params = jax.device_put(PARAMS, shardings)
    state = init_state(params, optimiser).opt_state
    places = state_shardings(params, shardings, optimiser).opt_state
    for x, place in zip(*map(jax.tree.leaves, (state, places)), strict=True):
        assert x.sharding == place
    update = jax.jit(optimiser.transform().update, out_shardings=(shardings, places))
    gradients = [jax.device_put(g, shardings) for g in GRADIENTS]
    compiled = update.lower(gradients[0], state, params).compile()
    assert "all-gather" not in compiled.as_text()
    alone, behind = updates(optimiser)
    for each, wanted in zip(gradients, alone, strict=True):
        got, state = compiled(each, state, params)
        for k in SHAPES:
            np.testing.assert_allclose(got[k], wanted[k], rtol=1e-4, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (state, behind)), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-4, atol=1e-9)


def test_a_factored_moment_lies_as_its_parameter_without_the_axis():
    mesh, shardings = on_mesh()
    found = state_shardings(PARAMS, shardings, Optimiser(name="adafactor"))
    factored = found.opt_state[1][0]
    # matrix [2, 160, 3, 128]: the row has lost 160, the column 128.
    assert factored.v_row["matrix"].spec == PartitionSpec(None, None, ("tensor",))
    assert factored.v_col["matrix"].spec == PartitionSpec(None, ("fsdp",))
    assert factored.v["small"] == shardings["small"]
    everywhere = NamedSharding(mesh, PartitionSpec())
    assert everywhere == found.step == factored.count == factored.v["matrix"]


def test_what_is_not_factored_has_one_number_on_every_device():
    """A table that is narrower than optax's 128: its row and column are placeholders."""
    mesh = sharding.make_mesh(1, 2, 2)
    small = {"table": jnp.zeros((420, 64))}
    places = {"table": NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))}
    state = init_state(jax.device_put(small, places), Optimiser(name="adafactor"))
    shapes = {x.shape for x in jax.tree.leaves(state.opt_state)}
    assert {(1,), (420, 64)} <= shapes


WIDE = ModelConfig("gemma", len(tokenizer()), 128, 128, 1, 1, 1, 128)
FORWARD, LIKELIHOOD, LAYOUT = Forward("bfloat16"), Objective("likelihood"), Layout(4, 224, 8)
AVERAGED = Optimiser(name="adafactor", ema=0.75)


@functools.cache
def wide_params():
    return transformer.init_params(WIDE, jax.random.key(3))


def groups():
    return [[item(t, "sampled")] for t in trajectories()[:4]]


def run(mesh):
    params = wide_params()
    if mesh is not None:
        params = jax.device_put(params, sharding.param_shardings(WIDE, mesh))
    trainer = Trainer(WIDE, FORWARD, AVERAGED, LAYOUT, mesh)
    plan = Plan(4, 2, 1e-3, 1, 1.0, 0)
    final = trainer.fit(copy_params(params), Shuffled(groups(), 4, 0), plan, LIKELIHOOD)
    assert trainer.compilations(LIKELIHOOD) == 1
    return final


def test_two_steps_on_a_mesh_are_those_of_one_device_without_new_programs():
    one, many = run(None), run(sharding.make_mesh(1, 2, 2))
    for a, b, first in zip(*map(jax.tree.leaves, (one, many, wide_params())), strict=True):
        moved = np.abs(np.asarray(a) - first).max()
        assert moved > 0
        # The forward is in bfloat16, and rounds otherwise on a mesh.
        np.testing.assert_allclose(a, b, atol=0.1 * moved)


def test_a_small_step_moves_float32_parameters_and_their_average():
    """A rate far below the last place of the forward's bfloat16 is kept, and everything is donated."""
    step = make_step(WIDE, FORWARD, LIKELIHOOD, AVERAGED, None, None)
    state = init_state(copy_params(wide_params()), AVERAGED)
    before, given = np.asarray(wide_params()["embedder"]["table"]), jax.tree.leaves(state)
    state, _ = step(state, put(pack(groups(), LAYOUT), None), np.float32(1e-6))
    # What holds a place in adafactor's state is one number, and never read.
    assert all(x.is_deleted() for x in given if x.size > 1)
    table = np.asarray(state.params["embedder"]["table"])
    used = np.any(table != before, axis=1)
    assert used.sum() > 20
    assert np.abs(table - before).max() < 1e-4
    as_bfloat16 = [x[used].astype(jnp.bfloat16) for x in (table, before)]
    assert np.mean(as_bfloat16[0] == as_bfloat16[1]) > 0.95
    average = 0.75 * before + 0.25 * table
    np.testing.assert_allclose(state.kept["embedder"]["table"], average, rtol=3e-7, atol=1e-9)
