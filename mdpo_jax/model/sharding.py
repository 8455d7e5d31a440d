"""The mesh, and the one table from logical axes to mesh axes.

data    rows
fsdp    rows, and `embed` of every weight
tensor  heads, mlp, vocab
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mdpo_jax.model.families import ModelConfig, nest, weight_map
from mdpo_jax.products import on_one_device

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes; an axis that is absent here is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "row_groups": ("data",),  # where fsdp is needed for another axis
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}

# Mesh axes that are dealt with outside of what is being traced (see `in_groups`).
_taken: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "taken", default=frozenset()
)
_GROUPS = "groups"


def groups() -> int:
    """How many parts of the enclosing `jax.set_mesh` hold parameters of their own: mesh.data."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"]


def in_groups(f: Callable, in_axes: Any) -> Callable:
    """`f` by each group on its own, over a leading axis of `groups()` of what `in_axes` says 0 of.

        jax.vmap, with that axis over `data`: in `f`, rows are over fsdp alone, and whatever is
        sharded, gathered or reduced is so within a group.

    `anywhere` in `f` says of all groups.
    """

    def alone(*given: Any) -> Any:
        token = _taken.set(frozenset({"data"}))
        try:
            return f(*given)
        finally:
            _taken.reset(token)

    return jax.vmap(alone, in_axes=in_axes, axis_name=_GROUPS, spmd_axis_name="data")


def anywhere(flags: jax.Array) -> jax.Array:
    """Whether one is set, in any group: the same for all, so that a `cond` on it stays one."""
    found = jnp.any(flags)
    return jax.lax.pmax(found.astype(jnp.int32), _GROUPS) > 0 if _taken.get() else found


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of the first data * fsdp * tensor devices, axes ("data", "fsdp", "tensor"), all Auto.

    devices: none takes all that there are.  Where they are of several TPU slices, which only a
    data centre's network joins, the slowest part of `data` is over the slices and all else within
    one.  Raises ValueError if an axis is not positive, if the product does not divide the device
    count, or if slices do not divide `data`.
    """
    shape = (data, fsdp, tensor)
    for name, size in zip(MESH_AXES, shape, strict=True):
        if size < 1:
            raise ValueError(f"mesh.{name}: {size}; expected a positive integer")
    size = math.prod(shape)
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) % size:
        raise ValueError(
            f"mesh: data {data} x fsdp {fsdp} x tensor {tensor} = {size} does not divide "
            f"the {len(devices)} devices"
        )
    # The first argument was renamed in jax 0.12; the default axis type is Explicit.
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    # On other platforms a "slice" is a node, over which fsdp is as good as any axis.
    slices = len({getattr(d, "slice_index", None) for d in devices if d.platform == "tpu"})
    if slices > 1:
        if data % slices or size != len(devices):
            raise ValueError(
                f"mesh: data {data} x fsdp {fsdp} x tensor {tensor} over {len(devices)} devices of "
                f"{slices} slices; expected all of them, with mesh.data a multiple of {slices}"
            )
        within = (data // slices, fsdp, tensor)
        order = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
        return Mesh(order, MESH_AXES, axis_types=kinds)
    return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=devices[:size])


def partition(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The spec of an array with these logical axes, by `RULES`.

    A dimension that its mesh axes do not divide is replicated: one key head over tensor=2, or an
    odd vocabulary.
    """
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        over = tuple(name for name in RULES.get(axis or "", ()) if name not in _taken.get())
        ways = math.prod(mesh.shape[name] for name in over)
        entries.append(over if ways > 1 and size % ways == 0 else None)
    # As the compiler writes a spec; with the same one longer, a second call would compile anew.
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The tree of NamedShardings of the stacked parameters.

    A dimension that its mesh axis does not divide is replicated (see `partition`).
    """
    return nest(
        {
            w.path: NamedSharding(mesh, partition(w.logical_axes, w.shape(config), mesh))
            for w in weight_map(config)
        }
    )


def batch_sharding(mesh: Mesh, rows: int | None = None, leading: int = 0) -> NamedSharding:
    """Rows over ("data", "fsdp"), all else replicated.

    leading: number of axes before the rows, 1 for a [micro-batches, rows, length] batch.
    Raises ValueError if `rows` is given and data * fsdp does not divide it.
    """
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if rows is not None and rows % (data * fsdp):
        raise ValueError(
            f"rows: {rows} is not divisible by mesh data {data} x fsdp {fsdp} = {data * fsdp}"
        )
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, RULES["rows"]))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh of the enclosing `jax.set_mesh`; outside of one, does nothing.

    Under fsdp an activation's rows and a weight's `embed` compete for one mesh axis; without this
    the compiler may gather the rows.
    """
    if on_one_device():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))


Pin = Callable[[jax.Array], jax.Array]


def head(table_VD: jax.Array) -> tuple[jax.Array, tuple[Pin, Pin] | tuple[()]]:
    """The unembedding with its vocabulary over the whole mesh, and what pins tokens and logits.

        table at rest     [V, D / fsdp]     one exchange of the table's share, and one of its
        table of the head [V / n, D]        gradient, which adds up here chunk after chunk
        a chunk's tokens  [rows, C, D]      gathered: every device scores all of them on its words
        their logits      [rows, C, V / n]

    In groups (`in_groups`) all that is within one, n its devices.

    A chunk of tokens is small beside the table, which would else be gathered whole for each of them,
    and its gradient reduced whole.  Outside of a mesh, or where its devices do not divide the
    vocabulary, everything stays as it is, and nothing is to be pinned.
    """
    mesh = jax.sharding.get_abstract_mesh()
    over = tuple(name for name in MESH_AXES if name not in _taken.get())
    size = 1 if mesh.empty else math.prod(mesh.shape[name] for name in over)
    if size == 1 or table_VD.shape[0] % size:
        return table_VD, ()

    def pin(*entries: Any) -> Pin:
        return lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))

    return pin(over)(table_VD), (pin(), pin(None, None, over))
