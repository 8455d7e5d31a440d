"""On four fake devices (tests/conftest.py)."""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `make_mesh` asks of a TPU."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def _slices(count):
    """Slices of 2 x 2 chips, dealt in turn: their order is not that of the slices."""
    places = [(x, y, 0) for y in range(2) for x in range(2)]
    return [Chip(4 * s + i, s, xy) for i, xy in enumerate(places) for s in range(count)]


def test_data_is_over_the_slices_and_all_else_within_one():
    mesh = make_mesh(data=4, fsdp=2, devices=_slices(2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2}])
def test_a_mesh_that_slices_do_not_divide_is_refused(sizes):
    with pytest.raises(ValueError, match=r"8 devices of 2 slices; .*mesh\.data a multiple of 2"):
        make_mesh(**sizes, devices=_slices(2))
