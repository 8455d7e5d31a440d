"""The pure step: packed batch in, new state and metrics out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mdpo_jax import hosts, objectives
from mdpo_jax.data.packing import Layout
from mdpo_jax.model import lora, sharding
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.lora import Lora
from mdpo_jax.training import copies, losses
from mdpo_jax.training.losses import Forward, Objective, log_probs
from mdpo_jax.training.segments import Arrays, by_sequence
from mdpo_jax.training.state import Optimiser, TrainState, state_shardings
from mdpo_jax.training.value import Joint
from mdpo_jax.types import PackedBatch


class Fixed(NamedTuple):
    """What steps read and never change: arguments, for as constants they would be compiled in.

    base: the parameters under an adapter.  reference: the reference policy in the form of the
    trained one (an adapter, where that is one), to be scored in the step; None: the batch holds its
    log-probs.
    """

    base: Any = None
    reference: Any = None


NOTHING = Fixed()


def put(batch: PackedBatch, mesh: Mesh | None) -> Arrays:
    """The batch on the devices: rows over the data axes, everything per pair replicated."""
    arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if mesh is None:
        return {name: jnp.asarray(value) for name, value in arrays.items()}
    rows = sharding.batch_sharding(mesh, leading=1)
    replicated = NamedSharding(mesh, PartitionSpec())
    return {
        name: hosts.place(value, rows if value.ndim >= 3 else replicated)
        for name, value in arrays.items()
    }


def loss_and_gradients(
    config: ModelConfig, forward: Forward, objective: Objective, params: Any, batch: Arrays,
    whole: Callable[[Any], Any] = lambda params: params, reference: Any = None,
    mismatched: Arrays | None = None,
) -> tuple[Any, Arrays]:  # fmt: skip
    """Gradients of the whole batch's loss and its metrics, micro-batch by micro-batch.

    params: what is differentiated; a `Joint` with a value head.  whole: from the policy's to what
    the model takes; an adapter is put onto its base, for which no gradient is then computed.
    reference: parameters that the model takes, where the batch does not hold their log-probs.
    mismatched: the batch of KTO's reference point, where the objective takes it from one.

    The loop's trip count is traced: empty micro-batches at the end cost nothing, and a batch with
    more of them does not compile anew.
    """
    shared = losses.totals(batch)
    micro_batch = functools.partial(_micro_batch, config, forward, reference)
    if objective.kind == "unpaired":
        policy = whole(jax.lax.stop_gradient(params))
        if (objective.kl == "mismatched") != (mismatched is not None):
            given = "without" if mismatched is None else "with"
            raise ValueError(f"mismatched: kl={objective.kl} {given} a mismatched batch")
        source = batch if mismatched is None else mismatched
        shared["kl"] = _reference_point(config, forward, objective, policy, source, micro_batch)

    def loss(params: Any, micro: Arrays) -> tuple[Array, Arrays]:
        policy, head = params if objective.value is not None else (params, None)
        score = functools.partial(
            losses.scored, config, forward, policy, whole=whole, copies=groups > 1
        )
        return losses.micro_loss(objective, score, head, micro, shared)

    groups = losses.groups(forward)
    grad, computed = jax.value_and_grad(loss, has_aux=True), _computed(forward, params)
    if groups > 1:
        computed = _policy(objective, copies.copied, computed)

    def one(index: Any) -> tuple[Any, Arrays]:
        (_, metrics), gradients = grad(computed, micro_batch(batch, index))
        return gradients, metrics

    def body(index: Any, carry: tuple[Any, Arrays]) -> tuple[Any, Arrays]:
        gradients, metrics = carry
        more, new = one(index)
        merged = {
            name: jnp.maximum(value, new[name]) if name in losses.MAXIMA else value + new[name]
            for name, value in metrics.items()
        }
        return jax.tree.map(lambda a, g: a + g.astype(a.dtype), gradients, more), merged

    gradients, metrics = jax.eval_shape(one, 0)
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), gradients)
    metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), metrics)
    sums, metrics = jax.lax.fori_loop(0, _filled(batch), body, (sums, metrics))
    if groups > 1:  # here, once a step, and not for every micro-batch
        sums = _policy(objective, copies.summed, sums)
    return sums, metrics


def _policy(objective: Objective, f: Callable[[Any], Any], params: Any) -> Any:
    """f of the policy; a value head beside it, which is small, as it is."""
    return f(params) if objective.value is None else Joint(f(params.policy), params.head)


def _computed(forward: Forward, params: Any) -> Any:
    """Parameters with the layers' kernels in the compute type, in which the blocks would cast them.

    Their gradients come out of the products in that type; a micro-batch's are kept so until they are
    added up in float32, in half the bytes and with the same values.
    """

    def cast(path: Any, x: jax.Array) -> jax.Array:
        keys = [getattr(entry, "key", "") for entry in path]
        kernel = "layers" in keys and x.ndim > 2 and not keys[-1].endswith((lora.A, lora.B))
        return x.astype(forward.dtype) if kernel else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _micro_batch(
    config: ModelConfig, forward: Forward, reference: Any, source: Arrays, index: Any
) -> Arrays:
    """One micro-batch, with the reference's log-probs where the batch does not hold them."""
    micro = {name: value[index] for name, value in source.items()}
    if reference is not None:
        micro["reference"] = log_probs(config, forward, reference, micro, micro["weights"] > 0)
    return micro


def _reference_point(
    config: ModelConfig, forward: Forward, objective: Objective, policy: Any, source: Arrays,
    micro_batch: Callable[[Arrays, Any], Arrays],
) -> Float[Array, ""]:  # fmt: skip
    """KTO's z_0 over all of `source`, before any gradient: the loss is not linear in it."""
    if objective.kl == "zero":
        return jnp.zeros(())
    weight = source["sequence_mask"] / jnp.maximum(jnp.sum(source["sequence_mask"]), 1)

    def body(index: Any, total: Array) -> Array:
        micro = micro_batch(source, index)
        values = log_probs(config, forward, policy, micro, micro["weights"] > 0)
        ratios = values - micro["reference"]
        sums = by_sequence(ratios * micro["weights"], micro)
        return total + objectives.kl_estimate(sums, weight[index], convention=objective.kl)

    return jax.lax.fori_loop(0, _filled(source), body, jnp.zeros(()))


def _filled(batch: Arrays) -> Array:
    """How many micro-batches hold a sequence; the empty ones are the last."""
    return jnp.sum(jnp.any(batch["sequence_mask"] > 0, axis=1))


@functools.lru_cache(maxsize=16)
def make_step(
    config: ModelConfig, forward: Forward, objective: Objective, optimiser: Optimiser,
    mesh: Mesh | None = None, adapter: Lora | None = None, layout: Layout | None = None,
):  # fmt: skip
    """`step(state, batch, learning_rate, fixed, mismatched) -> state, metrics`, jitted once.

    The state is donated, `fixed` never.  With an `adapter` the policy's params are that alone.
    fixed and mismatched may be left out where there is nothing to hand over.  layout: of the batches;
    it changes nothing, but each has a step, whose programs are counted, of its own.
    """
    del layout
    pin = _pin(config, objective, optimiser, mesh, adapter)

    def step(
        state: TrainState, batch: Arrays, learning_rate: Float[Array, ""], fixed: Fixed = NOTHING,
        mismatched: Arrays | None = None,
    ):  # fmt: skip
        def whole(params: Any) -> Any:
            return params if adapter is None else lora.combine(fixed.base, params, adapter)

        reference = None if fixed.reference is None else whole(fixed.reference)
        gradients, metrics = loss_and_gradients(
            config, forward, objective, state.params, batch, whole, reference, mismatched
        )
        updates, opt_state = optimiser.transform().update(gradients, state.opt_state, state.params)
        params = _updated(objective, state.params, updates, learning_rate)
        metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": learning_rate}
        ema = optimiser.averaged(state.ema, params)
        return pin(TrainState(params, opt_state, state.step + 1, ema)), metrics

    return jax.jit(step, donate_argnums=0)


def _pin(
    config: ModelConfig, objective: Objective, optimiser: Optimiser, mesh: Mesh | None,
    adapter: Lora | None,
) -> Callable[[TrainState], TrainState]:  # fmt: skip
    """Keeps the new state where the old one lay.

    Without this the compiler may give a leaf another layout than it came in with, and the next call
    would compile anew.
    """
    if mesh is None:
        return lambda state: state
    if adapter is None:
        shardings: Any = sharding.param_shardings(config, mesh)
    else:
        shardings = lora.shardings(config, adapter, mesh)

    def pin(state: TrainState) -> TrainState:
        places = shardings
        if objective.value is not None:  # the head is small, and on every device
            everywhere = NamedSharding(mesh, PartitionSpec())
            places = Joint(shardings, jax.tree.map(lambda _: everywhere, state.params.head))
        return jax.lax.with_sharding_constraint(
            state, state_shardings(state.params, places, optimiser)
        )

    return pin


def _updated(objective: Objective, params: Any, updates: Any, learning_rate: Array) -> Any:
    def moved(params: Any, updates: Any, rate: Array) -> Any:
        return jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates)

    if objective.value is None:
        return moved(params, updates, learning_rate)
    faster = learning_rate * objective.value.learning_rate_scale
    return Joint(
        moved(params.policy, updates.policy, learning_rate),
        moved(params.head, updates.head, faster),
    )


@functools.lru_cache(maxsize=8)
def make_scorer(config: ModelConfig, forward: Forward):
    """`score(params, batch) -> [M R L]` log-probs by the trainer's own forward, jitted once."""

    def score(params: Any, batch: Arrays) -> Float[Array, "micros rows length"]:
        def one(index, values):
            used = ("tokens", "positions", "segments", "prefixes")
            micro = {name: batch[name][index] for name in used}
            return values.at[index].set(log_probs(config, forward, params, micro))

        nothing = jnp.zeros(batch["tokens"].shape, jnp.float32)
        return jax.lax.fori_loop(0, _filled(batch), one, nothing)

    return jax.jit(score)
