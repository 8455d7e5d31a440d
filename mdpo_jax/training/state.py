"""The training state as one pytree, its optimisers and its learning-rate schedule.

What an optimiser keeps, in bytes a parameter, beside 4 of the float32 parameters (the master weights:
the forward casts them, and what it makes of them is never kept) and 4 of their gradient:

    adamw               8     both moments in float32
    adamw_bf16_moments  4     both moments in bfloat16, rounded up or down at random
    lion                4     one moment in float32
    adafactor           0.01  a row and a column of each matrix of 128 x 128 or more, and 4 of what
                              is smaller: 0.003 to 0.007 in all, for models of 2 to 9 B
    ema                +4     the average that a stage saves
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mdpo_jax import hosts
from mdpo_jax.learning import OptimiserName


class TrainState(NamedTuple):
    """What a step maps to its successor: params, opt_state and ema as pytrees, step as int32 scalar.

    ema: the average of the parameters in float32; None where none is kept.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    ema: Any = None

    @property
    def kept(self) -> Any:
        """What a stage saves: the average in the parameters' type, or the parameters."""
        if self.ema is None:
            return self.params
        return jax.tree.map(lambda a, p: a.astype(p.dtype), self.ema, self.params)


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """Updates of one of four kinds after clipping by the global norm; the rate comes with each step.

    beta1, beta2: of AdamW.  Lion has its own (0.9, 0.99), and so has Adafactor (1 - t^-0.8), whose
    rate is ours too: neither relative steps nor a scaling by the parameters.  Lion's updates are
    signs, and take about a tenth of AdamW's learning rate.  ema: decay of the average, 0 for none.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    name: OptimiserName = "adamw"
    ema: float = 0.0

    def transform(self) -> optax.GradientTransformation:
        """Updates before the learning rate: clip, scale, decoupled decay; moments never in the
        parameters' type."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            self._scale(),
            optax.add_decayed_weights(self.weight_decay),
        )

    def _scale(self) -> optax.GradientTransformation:
        if self.name == "lion":
            return _in_float32(optax.scale_by_lion())
        if self.name == "adafactor":
            return _in_float32(
                optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
            )
        adam = _in_float32(optax.scale_by_adam(b1=self.beta1, b2=self.beta2))
        return adam if self.name == "adamw" else _kept_in_bfloat16(adam)

    def averaged(self, ema: Any, params: Any) -> Any:
        """The average after a step; None where there is none."""
        if ema is None:
            return None
        return jax.tree.map(lambda a, p: a + (1 - self.ema) * (p.astype(a.dtype) - a), ema, params)


def _cast(tree: Any, dtype: Any) -> Any:
    """Its floating-point leaves in another type."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax gives moments the parameters' type; in bfloat16 they would hardly move."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(updates, state, _cast(params, jnp.float32))

    return optax.GradientTransformation(
        lambda params: inner.init(_cast(params, jnp.float32)), update
    )


def _kept_in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Updates in float32, and what is kept from step to step in bfloat16, rounded without a bias.

    To the nearest, a second moment would never fall: a step takes a thousandth of it, and half of
    bfloat16's last place is two thousandths.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new: Any
        updates, new = inner.update(updates, _cast(state, jnp.float32), params)
        leaves, tree = jax.tree.flatten(new)
        key = jax.random.fold_in(jax.random.key(0), new.count)
        keys = jax.random.split(key, len(leaves))
        kept = [
            _rounded(x, k) if x.dtype == jnp.float32 else x
            for x, k in zip(leaves, keys, strict=True)
        ]
        return updates, jax.tree.unflatten(tree, kept)

    return optax.GradientTransformation(
        lambda params: _cast(inner.init(params), jnp.bfloat16), update
    )


def _rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two nearest of bfloat16, with `x` as the expectation."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return kept.astype(jnp.bfloat16)


def init_state(params: Any, optimiser: Optimiser) -> TrainState:
    """A state at step 0 whose moments are sharded as the parameters are.

    Everything in it is committed to its devices, as the step's outputs are; else the second step
    would compile anew.
    """
    held = jax.tree.map(lambda x: x.sharding, params)
    shardings: Any = state_shardings(params, held, optimiser)
    init = jax.jit(optimiser.transform().init, out_shardings=shardings.opt_state)
    step = hosts.place(np.zeros((), np.int32), shardings.step)
    ema = None
    if optimiser.ema:  # a copy, for both are donated
        copies = jax.tree.map(lambda x: x.astype(jnp.float32).copy(), params)
        ema = jax.device_put(copies, shardings.ema)
    return TrainState(jax.device_put(params, shardings.params), init(params), step, ema)


def state_like(params: Any, optimiser: Optimiser) -> TrainState:
    """The form of `init_state(params, optimiser)`: shapes, types and shardings, nothing computed."""
    shardings = state_shardings(params, jax.tree.map(lambda x: x.sharding, params), optimiser)
    shapes = jax.eval_shape(
        lambda p: TrainState(
            p,
            optimiser.transform().init(p),
            jnp.zeros((), jnp.int32),
            _cast(p, jnp.float32) if optimiser.ema else None,
        ),
        params,
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes, shardings,
    )  # fmt: skip


def state_shardings(params: Any, shardings: Any, optimiser: Optimiser) -> TrainState:
    """The sharding of every leaf of a state, from those of its parameters (or their shapes).

    A moment lies as its parameter does, a factored one without the axis that was averaged away;
    scalars are everywhere.
    """
    structure = jax.tree.structure(params)
    first = jax.tree.leaves(shardings)[0]
    everywhere: Any = NamedSharding(first.mesh, PartitionSpec()) if _named(first) else first

    def of_moments(path: Any, moments: Any) -> Any:
        if jax.tree.structure(moments) != structure:
            return everywhere
        # optax's adafactor averages a row over the largest axis, a column over the second largest.
        averaged = {"v_row": -1, "v_col": -2}.get(getattr(path[-1], "name", ""))

        def of_moment(moment: Any, param: Any, sharding: Any) -> Any:
            if moment.shape == param.shape or not _named(sharding):
                return sharding
            shared = averaged is not None and param.ndim > 1
            axis = int(np.argsort(param.shape)[averaged]) if shared else None
            if axis is None or moment.shape != tuple(np.delete(param.shape, axis)):
                return everywhere  # one number in the place of what is kept otherwise
            names = [*sharding.spec, *[None] * (param.ndim - len(sharding.spec))]
            del names[axis]
            while names and names[-1] is None:  # as the compiler writes it
                names.pop()
            return NamedSharding(sharding.mesh, PartitionSpec(*names))

        return jax.tree.map(of_moment, moments, params, shardings)

    moments = jax.tree_util.tree_map_with_path(
        of_moments,
        jax.eval_shape(optimiser.transform().init, params),
        is_leaf=lambda x: jax.tree.structure(x) == structure,
    )
    return TrainState(shardings, moments, everywhere, shardings if optimiser.ema else None)


def _named(sharding: Any) -> bool:
    return isinstance(sharding, NamedSharding)


def schedule(peak: float, warmup: int, total: int, final_fraction: float) -> Callable[[int], float]:
    """Linear warm-up to `peak`, then cosine to `final_fraction` of it; step -> learning rate.

    The warm-up is at most a tenth of a short run, so that a run of few steps still learns.
    """
    warmup = min(warmup, max(1, total // 10))
    rate = optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(total, warmup + 1),
        end_value=peak * final_fraction,
    )
    return lambda step: np.asarray(rate(step)).item()
