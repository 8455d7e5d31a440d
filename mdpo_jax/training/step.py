"""The pure step: packed batch in, new state and metrics out; where model and objectives meet."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mdpo_jax import objectives
from mdpo_jax.model import sharding, transformer
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.training.state import Optimiser, TrainState
from mdpo_jax.types import PackedBatch

Arrays = dict[str, Array]
# Metrics that are maxima over pairs; all others are sums whose weights already hold the counts.
_MAXIMA = ("log_ratio/max_abs",)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises: `pairs` is M-DPO (eq. 14) plus an NLL term, `likelihood` SFT/RAFT."""

    kind: Literal["pairs", "likelihood"]
    eta: float = 0.1
    nll_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class Forward:
    """How the trainer runs the model: compute type, remat policy, head chunk, attention backend."""

    dtype: str = "float32"
    remat: str = "none"
    logprob_chunk: int = 2048
    attention: str = "auto"


def put(batch: PackedBatch, mesh: Mesh | None) -> Arrays:
    """The batch on the devices: rows over the data axes, everything per pair replicated."""
    arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if mesh is None:
        return {name: jnp.asarray(value) for name, value in arrays.items()}
    rows = sharding.batch_sharding(mesh, leading=1)
    replicated = NamedSharding(mesh, PartitionSpec())
    return {
        name: jax.device_put(value, rows if value.ndim == 3 else replicated)
        for name, value in arrays.items()
    }


def log_probs(
    config: ModelConfig, forward: Forward, params: Any, micro: Arrays
) -> Float[Array, "rows length"]:
    """Log-prob of every token given those before it in its segment; 0 at column 0.

    The value at a segment's first token is meaningless and must carry weight 0 (it is a prompt
    token by construction).
    """
    hidden = transformer.hidden_states(
        config, params, micro["tokens"], micro["positions"], micro["segments"],
        dtype=jnp.dtype(forward.dtype), remat=forward.remat, backend=forward.attention,
    )  # fmt: skip
    rows, length, width = hidden.shape
    values = objectives.token_log_probs(
        hidden[:, :-1].reshape(rows * (length - 1), width),
        transformer.unembedding(params),
        micro["tokens"][:, 1:].reshape(-1),
        chunk=forward.logprob_chunk,
        softcap=config.logit_cap,
    )
    return jnp.pad(values.reshape(rows, length - 1), ((0, 0), (1, 0)))


def micro_loss(
    config: ModelConfig,
    forward: Forward,
    objective: Objective,
    params: Any,
    micro: Arrays,
    totals: Arrays,
) -> tuple[Float[Array, ""], Arrays]:
    """This micro-batch's share of the step's loss and metrics; shares add up over micro-batches."""
    values = log_probs(config, forward, params, micro)
    slots = micro["sequence_mask"].shape[0]

    def by_sequence(per_token):
        flat = jax.ops.segment_sum(
            per_token.reshape(-1), micro["segments"].reshape(-1), num_segments=slots + 1
        )
        return flat[1:]  # segment 0 is padding

    policy, tokens = by_sequence(values * micro["weights"]), by_sequence(micro["weights"])
    if objective.kind == "likelihood":
        loss = -jnp.sum(policy) / totals["tokens"]
        return loss, {"loss": loss, "logps/mean": -loss}

    log_ratio = policy - by_sequence(micro["reference"] * micro["weights"])
    chosen, rejected = micro["chosen"], micro["rejected"]
    weights = micro["pair_mask"] / totals["pairs"]
    loss, metrics = objectives.mdpo_loss(
        log_ratio[chosen], log_ratio[rejected], eta=objective.eta, weights=weights
    )
    nll = objectives.nll_loss(policy[chosen], tokens[chosen], weights=weights)
    both = jnp.abs(jnp.stack([log_ratio[chosen], log_ratio[rejected]])) * micro["pair_mask"]
    metrics |= {
        "loss/preference": loss,
        "loss/nll": nll,
        "loss": loss + objective.nll_weight * nll,
        "logps/chosen": jnp.sum(weights * policy[chosen]),
        "logps/rejected": jnp.sum(weights * policy[rejected]),
        "log_ratio/mean_abs": jnp.sum(weights * both) / 2,
        "log_ratio/max_abs": jnp.max(both),
    }
    return metrics["loss"], metrics


def loss_and_gradients(
    config: ModelConfig, forward: Forward, objective: Objective, params: Any, batch: Arrays
) -> tuple[Any, Arrays]:
    """Gradients of the whole batch's loss and its metrics, micro-batch by micro-batch.

    The loop's trip count is traced: empty micro-batches at the end cost nothing, and a batch with
    more of them does not compile anew.
    """
    totals = {
        "pairs": jnp.maximum(jnp.sum(batch["pair_mask"]), 1),
        "tokens": jnp.maximum(jnp.sum(batch["weights"]), 1),
    }
    grad = jax.value_and_grad(
        functools.partial(micro_loss, config, forward, objective), has_aux=True
    )

    def one(index):
        micro = {name: value[index] for name, value in batch.items()}
        (_, metrics), gradients = grad(params, micro, totals)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), metrics

    def body(index, carry):
        gradients, metrics = carry
        more, new = one(index)
        merged = {
            name: jnp.maximum(value, new[name]) if name in _MAXIMA else value + new[name]
            for name, value in metrics.items()
        }
        return jax.tree.map(jnp.add, gradients, more), merged

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
    return jax.lax.fori_loop(0, _filled(batch), body, zeros)


def _filled(batch: Arrays) -> Array:
    """How many micro-batches hold a sequence; the empty ones are the last."""
    return jnp.sum(jnp.any(batch["sequence_mask"] > 0, axis=1))


@functools.lru_cache(maxsize=8)
def make_step(
    config: ModelConfig, forward: Forward, objective: Objective, optimiser: Optimiser,
    mesh: Mesh | None = None,
):  # fmt: skip
    """`step(state, batch, learning_rate) -> state, metrics`: pure, jitted once, state donated."""

    def step(state: TrainState, batch: Arrays, learning_rate: Float[Array, ""]):
        gradients, metrics = loss_and_gradients(config, forward, objective, state.params, batch)
        updates, opt_state = optimiser.transform().update(gradients, state.opt_state, state.params)
        params = jax.tree.map(
            lambda p, u: (p - learning_rate * u).astype(p.dtype), state.params, updates
        )
        metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": learning_rate}
        return TrainState(params, opt_state, state.step + 1), metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = sharding.param_shardings(config, mesh)

    def pinned(state: TrainState, batch: Arrays, learning_rate: Float[Array, ""]):
        # Without this the compiler may give a leaf another layout than it came in with, and the
        # next call would compile anew.
        new, metrics = step(state, batch, learning_rate)
        params = jax.lax.with_sharding_constraint(new.params, shardings)
        return new._replace(params=params), metrics

    return jax.jit(pinned, donate_argnums=0)


@functools.lru_cache(maxsize=8)
def make_scorer(config: ModelConfig, forward: Forward):
    """`score(params, batch) -> [M R L]` log-probs by the trainer's own forward, jitted once."""

    def score(params: Any, batch: Arrays) -> Float[Array, "micros rows length"]:
        def one(index, values):
            micro = {name: batch[name][index] for name in ("tokens", "positions", "segments")}
            return values.at[index].set(log_probs(config, forward, params, micro))

        nothing = jnp.zeros(batch["tokens"].shape, jnp.float32)
        return jax.lax.fori_loop(0, _filled(batch), one, nothing)

    return jax.jit(score)
