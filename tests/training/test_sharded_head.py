"""On a mesh: the head splits its vocabulary, and nothing of the table's size moves in each chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plan_hlo
import pytest

from mdpo_jax.model import sharding
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.transformer import init_params
from mdpo_jax.training.losses import Forward, scored

CONFIG = ModelConfig("gemma", 1024, 32, 64, 1, 2, 1, 16, logit_cap=30.0)
FORWARD = Forward(logprob_chunk=16)
ROWS, LENGTH = 4, 33


def _micro():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    micro = {"tokens": tokens, "positions": positions, "segments": np.ones_like(tokens)}
    return micro, rng.random(tokens.shape) < 0.7


@functools.partial(jax.jit, static_argnums=0)
def _loss(config, params, micro, counted):
    return jnp.sum(jnp.sin(scored(config, FORWARD, params, micro, counted)[0]))


@pytest.fixture(scope="module")
def alone():
    params, (micro, counted) = init_params(CONFIG, jax.random.key(0)), _micro()
    return params, jax.value_and_grad(_loss, 1)(CONFIG, params, micro, counted)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 2, "tensor": 2}])
def test_the_same_values_and_gradients(alone, sizes):
    params, (value, gradient) = alone
    mesh, (micro, counted) = sharding.make_mesh(**sizes), _micro()
    placed = jax.device_put(params, sharding.param_shardings(CONFIG, mesh))
    rows = jax.device_put((micro, counted), sharding.batch_sharding(mesh, ROWS))
    with jax.set_mesh(mesh):
        found, other = jax.value_and_grad(_loss, 1)(CONFIG, placed, *rows)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(a).max()))


def test_the_table_and_its_gradient_cross_the_mesh_once_each(alone):
    mesh, (micro, counted) = sharding.make_mesh(fsdp=4), _micro()
    placed = jax.device_put(alone[0], sharding.param_shardings(CONFIG, mesh))
    rows = jax.device_put((micro, counted), sharding.batch_sharding(mesh, ROWS))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(_loss, 1), static_argnums=0)
        text = step.lower(CONFIG, placed, *rows).compile().as_text()
    found = plan_hlo.collectives(text, devices=4)
    table = 4 * CONFIG.vocab_size * CONFIG.hidden_size
    layers = 4 * sum(x.size for x in jax.tree.leaves(alone[0]["layers"]))
    # A share of it there, and one back; the rest is the layers' passes and small things.
    assert found["all-to-all"].sent < table / 2
    assert sum(t.sent for t in found.values()) < table + 6 * layers


def test_a_vocabulary_that_does_not_divide_stays_as_it_is():
    table = jnp.zeros((1023, 32))
    with jax.set_mesh(sharding.make_mesh(fsdp=4)):
        kept, pins = sharding.head(table)
    assert kept is table
    assert pins == ()
