"""The training step of a recipe as a program for devices that are not there.

Nothing here holds a weight: arguments are shapes with shardings, and `lower` takes them through
`make_step` as `Trainer.fit` calls it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from mdpo_jax.config import Config
from mdpo_jax.data.packing import padded_micros
from mdpo_jax.model import families, lora, sharding
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.kernels import choose, sees_prefixes
from mdpo_jax.model.lora import Lora
from mdpo_jax.pipeline import settings
from mdpo_jax.training.losses import Forward, Objective
from mdpo_jax.training.state import Optimiser, TrainState, state_shardings
from mdpo_jax.training.step import Fixed, make_step
from mdpo_jax.types import PackedBatch


@dataclasses.dataclass(frozen=True)
class Setup:
    """What one plan compiles: a model's shape, a recipe's settings and a mesh (None: one device).

    rows: of a micro-batch, over the whole mesh.  micros: filled micro-batches a step.
    """

    config: Config
    model: ModelConfig
    devices: tuple[Any, ...]
    mesh: Mesh | None
    rows: int
    micros: int

    @property
    def platform(self) -> str:
        """tpu, gpu or cpu, as `jax.default_backend()` would name it."""
        found = self.devices[0].platform
        return "gpu" if found == "cuda" else found

    @property
    def adapter(self) -> Lora | None:
        """Of a LoRA recipe."""
        return settings.adapter(self.config)

    @property
    def forward(self) -> Forward:
        """The recipe's, `auto` attention resolved for the topology and not for this machine."""
        found, kinds = settings.forward(self.config, self.platform), self.model.kinds
        backend = found.attention
        if backend == "auto":
            backend = choose(
                self.platform, window=kinds[0].window, softcap=self.model.attention_cap,
                head_dim=self.model.head_dim, length=self.config.train.row_length,
                dtype=found.dtype,
            )  # fmt: skip
            # cuDNN builds its kernels with the card at hand; the blocks of scores that the
            # reference keeps in their place make the plan an upper bound.
            backend = "reference" if backend == "cudnn" else backend
        shared = found.shared_prompts and sees_prefixes(backend, self.platform)
        return dataclasses.replace(found, attention=backend, shared_prompts=shared)

    @property
    def objective(self) -> Objective:
        """The method's."""
        return settings.objective(self.config)

    @property
    def in_step(self) -> bool:
        """Whether the reference is held beside the policy."""
        return self.config.train.reference_log_probs == "in_step"

    @property
    def reference_point(self) -> bool:
        """Whether KTO's takes passes of its own."""
        return self.objective.kind == "unpaired" and self.objective.kl != "zero"

    @property
    def optimiser(self) -> Optimiser:
        """The preference step's."""
        return settings.optimiser(self.config)


def lower(setup: Setup) -> Any:
    """The lowered step; `.compile()` takes minutes for a TPU."""
    step = make_step(
        setup.model, setup.forward, setup.objective, setup.optimiser, setup.mesh, setup.adapter
    )
    on_mesh = contextlib.nullcontext() if setup.mesh is None else jax.set_mesh(setup.mesh)
    with on_mesh:
        return step.lower(*arguments(setup))


def arguments(setup: Setup) -> tuple[TrainState, dict[str, Any], Any, Fixed, dict[str, Any] | None]:
    """state, batch, learning rate, what is fixed, and the batch of KTO's reference point, as shapes
    with shardings."""
    everywhere = _everywhere(setup)
    params, base = _params(setup)
    held = jax.tree.map(lambda x: x.sharding, params)
    moments = jax.eval_shape(setup.optimiser.transform().init, params)
    places = state_shardings(params, held, setup.optimiser)
    ema = _placed(_shapes(params, jnp.float32), held) if setup.optimiser.ema else None
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    state = TrainState(params, _placed(moments, places.opt_state), count, ema)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    fixed = Fixed(base, params if setup.in_step else None)
    objective = setup.objective
    beside = objective.kind == "unpaired" and objective.kl == "mismatched"
    return state, batch(setup), rate, fixed, batch(setup) if beside else None


def batch(setup: Setup) -> dict[str, Any]:
    """A packed batch, padded to as many micro-batches as `pack` would make of these."""
    t = setup.config.train
    micros = padded_micros(setup.micros)
    slots = settings.slots(setup.config)
    tokens = (micros, setup.rows, t.row_length)
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("chosen", "rejected", "pair_mask", "margin"), (micros, slots // 2)),
        **dict.fromkeys(("correct", "sequence_mask"), (micros, slots)),
        "prefixes": (*tokens, 2),
    }
    whole = {"weights", "reference", "pair_mask", "margin", "correct", "sequence_mask"}
    rows = _everywhere(setup)
    if setup.mesh is not None:
        rows = sharding.batch_sharding(setup.mesh, setup.rows, leading=1)
    out = {}
    for field in dataclasses.fields(PackedBatch):
        shape = shapes.get(field.name, tokens)
        place = rows if len(shape) >= 3 else _everywhere(setup)
        dtype = jnp.float32 if field.name in whole else jnp.int32
        out[field.name] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    return out


def _params(setup: Setup) -> tuple[Any, Any]:
    """What is trained, and the base under it where that is an adapter."""
    shapes = families.param_shapes(setup.model, jnp.dtype(setup.config.model.param_dtype))
    if setup.mesh is None:
        places = jax.tree.map(lambda _: _everywhere(setup), shapes)
    else:
        places = sharding.param_shardings(setup.model, setup.mesh)
    whole = _placed(shapes, places)
    if setup.adapter is None:
        return whole, None
    parts = lora.halves(setup.model, setup.adapter)
    small = families.nest(
        {path: jax.ShapeDtypeStruct(half.shape, jnp.float32) for path, half in parts.items()}
    )
    if setup.mesh is None:
        places = jax.tree.map(lambda _: _everywhere(setup), small)
    else:
        places = lora.shardings(setup.model, setup.adapter, setup.mesh)
    return _placed(small, places), whole


def shapes_of_state(setup: Setup) -> tuple[Any, Any]:
    """(params, moments) of the trained policy, and a reference in bfloat16."""
    state = arguments(setup)[0]
    held = jax.tree.map(lambda x: x.sharding, state.params)
    reference = _placed(_shapes(state.params, jnp.bfloat16), held)
    return (state.params, state.opt_state), reference


def batch_rows(setup: Setup) -> tuple[Any, Any, Any]:
    """Tokens and mask [rows, length] of one micro-batch, and the learning rate."""
    shape, place = (setup.rows, setup.config.train.row_length), _everywhere(setup)
    kinds = ((shape, jnp.int32), (shape, jnp.float32), ((), jnp.float32))
    tokens, mask, rate = (jax.ShapeDtypeStruct(s, kind, sharding=place) for s, kind in kinds)
    return tokens, mask, rate


def _everywhere(setup: Setup) -> Any:
    if setup.mesh is None:
        return SingleDeviceSharding(setup.devices[0])
    return NamedSharding(setup.mesh, PartitionSpec())


def _shapes(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )
