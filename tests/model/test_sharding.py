"""On four fake devices (tests/conftest.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mdpo_jax.model.families import ModelConfig, leaf, param_shapes
from mdpo_jax.model.sharding import RULES, batch_sharding, make_mesh, param_shardings
from mdpo_jax.model.transformer import hidden_states, logits

MESHES = [
    {"fsdp": 2, "tensor": 2},
    {"fsdp": 4},
    {"tensor": 4},
]


def _loss(config, params, ids):
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = hidden_states(config, params, ids, places, jnp.ones_like(ids), remat="full")
    return jnp.mean(jnp.sin(logits(config, params, hidden))), hidden


_step = jax.jit(jax.value_and_grad(_loss, 1, has_aux=True), static_argnums=0)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_sharded_equals_unsharded(config, params, ids, sizes):
    tokens = ids(4, 12)
    (value, hidden), gradient = _step(config, params, tokens)
    mesh = make_mesh(**sizes)
    placed = jax.device_put(params, param_shardings(config, mesh))
    rows = jax.device_put(tokens, batch_sharding(mesh, rows=4))
    with jax.set_mesh(mesh):
        (found, states), other = _step(config, placed, rows)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(states, hidden, atol=2e-5)
    assert states.sharding.is_equivalent_to(batch_sharding(mesh), states.ndim)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize(("sizes", "share"), [({"fsdp": 4}, 4), ({"fsdp": 2, "tensor": 2}, 4)])
def test_each_device_holds_its_share(config, params, sizes, share):
    placed = jax.device_put(params, param_shardings(config, make_mesh(**sizes)))
    for path, x in jax.tree_util.tree_leaves_with_path(placed):
        held = [shard.data.nbytes for shard in x.addressable_shards]
        norm = "norm" in jax.tree_util.keystr(path)
        assert held == [x.nbytes if norm else x.nbytes // share] * 4, path


def test_a_dimension_that_does_not_divide_is_replicated():
    config = ModelConfig("gemma", 97, 32, 48, 2, 4, 1, 16)
    shardings = param_shardings(config, make_mesh(fsdp=2, tensor=2))
    assert leaf(shardings, "layers/attention/key").spec == PartitionSpec(None, ("fsdp",))
    assert leaf(shardings, "embedder/table").spec == PartitionSpec(None, ("fsdp",))
    shapes = param_shapes(config)
    jax.tree.map(lambda s, x: s.shard_shape(x.shape), shardings, shapes)


def test_mesh_axes_are_auto_and_rules_name_only_them():
    mesh = make_mesh(2, 1, 2)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert make_mesh().size == 1
    assert {axis for over in RULES.values() for axis in over} <= set(mesh.axis_names)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"fsdp": 3}, "fsdp 3 .* = 3 does not divide the 4 devices"), ({"data": 0}, "mesh.data: 0")],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(**sizes)


def test_rows_that_do_not_divide_are_refused():
    mesh = make_mesh(2, 2)
    with pytest.raises(ValueError, match="rows: 6 is not divisible by mesh data 2 x fsdp 2 = 4"):
        batch_sharding(mesh, rows=6)
    assert batch_sharding(mesh, leading=1).spec == PartitionSpec(None, ("data", "fsdp"))
