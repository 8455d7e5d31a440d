"""The training state as one pytree, its optimiser and its learning-rate schedule."""

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


class TrainState(NamedTuple):
    """What a step maps to its successor: params and opt_state as pytrees, step as int32 scalar."""

    params: Any
    opt_state: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """AdamW after clipping by the global norm; the learning rate comes with each step."""

    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0

    def transform(self) -> optax.GradientTransformation:
        """Updates before the learning rate: clip, Adam moments in float32, decoupled decay."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(b1=self.beta1, b2=self.beta2, mu_dtype=jnp.float32),
            optax.add_decayed_weights(self.weight_decay),
        )


def init_state(params: Any, optimiser: Optimiser) -> TrainState:
    """A state at step 0 whose moments are sharded as the parameters are.

    Everything in it is committed to its devices, as the step's outputs are; else the second step
    would compile anew.
    """
    transform = optimiser.transform()
    shardings = jax.tree.map(lambda x: x.sharding, params)
    scalar = jax.tree.leaves(shardings)[0]
    if isinstance(scalar, NamedSharding):
        scalar = NamedSharding(scalar.mesh, PartitionSpec())
    moments = optax.tree.map_params(
        transform,
        lambda _, sharding: sharding,
        jax.eval_shape(transform.init, params),
        shardings,
        transform_non_params=lambda _: scalar,
    )
    opt_state = jax.jit(transform.init, out_shardings=moments)(params)
    step = hosts.place(np.zeros((), np.int32), scalar)
    return TrainState(jax.device_put(params, shardings), opt_state, step)


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
