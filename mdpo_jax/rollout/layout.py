"""Where a sampler's weights and slots lie on the devices of one process, and how they get there.

    mesh of decoding   data x 1 x tensor, the training mesh's devices that are this process's own
    slot s             shard s % data of the rows, row s // data in it; its key heads over tensor
    weights            the same on every shard of rows, heads, mlp and vocab over tensor

Every program runs once a shard of rows, on rows that lie there (`jax.shard_map` over data; tensor
is left to the compiler): nothing but the rows that a copy moves ever crosses from one to another.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mdpo_jax.model import lora
from mdpo_jax.model.families import ModelConfig, weight_map
from mdpo_jax.model.sharding import MESH_AXES, RULES, partition
from mdpo_jax.rollout.shapes import Shapes

ROWS = PartitionSpec(RULES["rows"])
WHOLE = PartitionSpec()


def decode_mesh(mesh: Mesh | None, tensor: int = 0) -> Mesh | None:
    """This process's devices of a training mesh, in its order, as data x 1 x tensor; None for one.

    tensor: 0 takes the training mesh's, cut to what divides the devices.  Raises ValueError for one
    that does not divide them.
    """
    every = jax.local_devices()[:1] if mesh is None else mesh.devices.flat
    own = [d for d in every if d.process_index == jax.process_index()]
    if not tensor:
        tensor = 1 if mesh is None else math.gcd(mesh.shape["tensor"], len(own))
    if len(own) % tensor:
        raise ValueError(
            f"config.rollout.tensor={tensor}: does not divide the {len(own)} devices that a process "
            "decodes on; expected a divisor, or 0"
        )
    if mesh is None:
        return None
    return _mesh(own, (len(own) // tensor, 1, tensor), MESH_AXES)


def _mesh(devices: Sequence[Any], shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    kinds = (AxisType.Auto,) * len(axes)
    return Mesh(np.asarray(devices, object).reshape(shape), axes, axis_types=kinds)


def flat(params: Any) -> dict[str, jax.Array]:
    """Leaves of a tree of parameters by path, `a/b/c`."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(entry.key) for entry in path): x for path, x in found}


def resharded(
    leaves: dict[str, jax.Array], config: ModelConfig, dtype: Any, mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Stacked training parameters as they are decoded with on `mesh`, one of them after the other.

    leaves: as `flat` gives them, taken out as they are used; one that nobody else holds is freed
    before the next is begun.  Layers come apart, with an adapter folded in and of `dtype`, where the
    training layout has them, and are gathered only then: beside both layouts there is never more
    than one leaf in the type of decoding.  Of several processes all must call; each gets its own.
    """
    for weight in weight_map(config):
        parts = [leaves.pop(weight.path + end, None) for end in ("", lora.A, lora.B)]
        where = parts[0].sharding if isinstance(parts[0], jax.Array) else None
        kept = None
        if isinstance(where, NamedSharding):
            kept = NamedSharding(
                where.mesh, PartitionSpec(*where.spec[1 if weight.stacked else 0 :])
            )
        apart = _apart(weight.stacked, jnp.dtype(dtype), kept, *parts)
        del parts
        shape = weight.shape(config)[1 if weight.stacked else 0 :]
        target = NamedSharding(mesh, partition(tuple(weight.axes.split()), shape, mesh))
        names = [weight.path]
        if weight.stacked:
            names = [
                weight.path.replace("layers", f"layer_{i}", 1) for i in range(config.num_layers)
            ]
        layers = {name: _moved(x, target) for name, x in zip(names, apart, strict=True)}
        del apart
        yield layers


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apart(
    stacked: bool, dtype: Any, where: NamedSharding | None, kernel: Any, low: Any, high: Any
) -> list[jax.Array]:
    """The layers of a leaf, an adapter's sum rounded once."""
    leaf = {"w": kernel, "w" + lora.A: low, "w" + lora.B: high}
    leaf = {name: x for name, x in leaf.items() if x is not None}
    layers = [leaf]
    if stacked:
        layers = [{name: x[i] for name, x in leaf.items()} for i in range(len(kernel))]
    out = [lora.fold(layer, dtype)["w"].astype(dtype) for layer in layers]
    return out if where is None else [jax.lax.with_sharding_constraint(x, where) for x in out]


def _moved(x: jax.Array, target: NamedSharding) -> jax.Array:
    """`x` in a layout over this process's devices; of several processes each gets the whole."""
    if x.is_fully_addressable:
        return _mover(target)(x)
    # Replicated over the processes, and of that this process's part.
    mesh = x.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
    by_process = sorted(mesh.devices.flat, key=lambda d: d.process_index)
    sizes = target.mesh.axis_sizes
    everywhere = _mesh(by_process, (-1, *sizes), ("process", *target.mesh.axis_names))
    # Where the two meshes order the devices differently, `device_put` sees to that.
    copies = jax.device_put(x, NamedSharding(everywhere, target.spec))
    own = [shard.data for shard in copies.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, target, own)


@functools.lru_cache(maxsize=64)
def _mover(target: NamedSharding) -> Any:
    """Over the interconnect; `device_put` would go by way of the host."""
    return jax.jit(lambda x: x, out_shardings=target)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Slots dealt to the shards of a mesh of decoding; None: one device, and everything as it is."""

    mesh: Mesh | None = None

    @property
    def ways(self) -> int:
        """Shards of the rows."""
        return 1 if self.mesh is None else self.mesh.shape["data"]

    @property
    def over(self) -> tuple[str, ...]:
        """Mesh axes that part the slots; none if there is one shard."""
        return RULES["rows"] if self.ways > 1 else ()

    def place(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Where an array with these logical axes lies on the mesh."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, partition(axes, shape, self.mesh))

    def per_shard(self, shapes: Shapes) -> Shapes:
        """Shapes of one shard's part of each call.  Raises ValueError for slots left over."""
        if self.ways == 1:
            return shapes
        slots, over = divmod(shapes.slots, self.ways)
        if over:
            raise ValueError(
                f"rollout.slots: {shapes.slots}; expected a multiple of the {self.ways} devices "
                "that share them"
            )
        rows = {min(count, slots) for count in shapes.row_buckets} | {slots}
        return dataclasses.replace(shapes, slots=slots, row_buckets=tuple(sorted(rows)))

    def groups(
        self, shapes: Shapes, slots: Sequence[int], lengths: Sequence[int], overhead: int
    ) -> Iterator[list[list[int]]]:
        """What is extended in one call, by shard: indices of `slots`; see `Shapes.groups`.

        shapes: of a shard.  The k-th longest of every shard go together.
        """
        shards = [
            sorted(
                (i for i, slot in enumerate(slots) if slot % self.ways == shard),
                key=lambda i: (-lengths[i], i),
            )
            for shard in range(self.ways)
        ]
        ranks = list(itertools.zip_longest(*shards))
        longest = [max(lengths[i] for i in rank if i is not None) for rank in ranks]
        for group in shapes.groups(longest, overhead):
            yield [[of[k] for k in group if k < len(of)] for of in shards]

    def rows(self, of_slots: np.ndarray) -> np.ndarray:
        """Values by slot, in the order in which the devices hold the slots."""
        return of_slots.reshape(-1, self.ways).swapaxes(0, 1).reshape(-1)

    def slots(self, of_rows: np.ndarray) -> np.ndarray:
        """The inverse of `rows`, over the first axis."""
        shape = of_rows.shape
        return of_rows.reshape(self.ways, -1, *shape[1:]).swapaxes(0, 1).reshape(shape)

    def program(
        self, function: Callable, takes: Sequence[PartitionSpec], gives: Any, *, statics: int = 0,
        donate: int, shardings: Any = None,
    ) -> Any:  # fmt: skip
        """`function` jitted, once a shard of rows; its first `statics` arguments are static.

        takes, gives: of arguments and results, ROWS or WHOLE.  shardings: of the results, or None
        for those of `gives`.  donate: the place of the argument that is given away.
        """
        fixed = {"static_argnums": tuple(range(statics)), "donate_argnums": donate}
        if self.mesh is None:
            return jax.jit(function, **fixed)

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            whole = functools.partial(function, *arguments[:statics])
            # Not over tensor: that axis is the compiler's, as in training.
            over = frozenset(RULES["rows"])
            sharded = jax.shard_map(
                whole, mesh=self.mesh, in_specs=tuple(takes), out_specs=gives, axis_names=over,
                check_vma=False,
            )  # fmt: skip
            return sharded(*arguments[statics:])

        return jax.jit(run, **fixed, out_shardings=shardings)


ONE_DEVICE = Placement()
