"""What one micro-batch adds to the step's loss and metrics; where log-probs meet the objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mdpo_jax import objectives
from mdpo_jax.model import sharding, transformer
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.objectives.mdpo import Kind
from mdpo_jax.objectives.mkto import KLConvention
from mdpo_jax.training import value
from mdpo_jax.training.segments import Arrays, at_tokens, by_sequence
from mdpo_jax.training.value import ValueTerm
from mdpo_jax.types import ACTION_PARTS, Part

# Metrics that are maxima over pairs; all others are sums whose weights already hold the counts.
MAXIMA = ("log_ratio/max_abs",)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises, and how (`config.Train` explains the fields).

    kind: `pairs` is M-DPO (eq. 14), `unpaired` M-KTO (eq. 15), `likelihood` SFT and RAFT; which
    tokens count, and hence whether it is the single-turn version, is in the batch's weights.
    value: term (C) by a value head.  turns: how many turns have metrics of their own; later ones
    are counted with the last.
    """

    kind: Literal["pairs", "unpaired", "likelihood"]
    eta: float = 0.1
    nll_weight: float = 0.0
    loss: Kind = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False
    lambda_correct: float = 1.0
    lambda_wrong: float = 1.0
    kl: KLConvention = "mismatched"
    observation_ce_weight: float = 0.0
    value: ValueTerm | None = None
    turns: int = 0


@dataclasses.dataclass(frozen=True)
class Forward:
    """How the trainer runs the model: compute type, remat policy, head chunk, attention backend,
    whether batches hold segments that go on from a shared prompt, and whether layers are unrolled."""

    dtype: str = "float32"
    remat: str = "none"
    logprob_chunk: int = 2048
    attention: str = "auto"
    shared_prompts: bool = False
    unrolled: bool = False


def groups(forward: Forward) -> int:
    """Parts of the mesh that score by parameters of their own (`sharding.groups`).

    1 where attention may be cuDNN's: jax's rule for mapping it takes no mask that heads share.
    """
    on_gpu = forward.attention == "auto" and jax.default_backend() == "gpu"
    return 1 if on_gpu or forward.attention == "cudnn" else sharding.groups()


def scored(
    config: ModelConfig, forward: Forward, params: Any, micro: Arrays,
    counted: Bool[Array, "rows length"] | None = None, *,
    whole: Callable[[Any], Any] = lambda params: params, copies: bool = False,
) -> tuple[Float[Array, "rows length"], Float[Array, "rows length width"]]:  # fmt: skip
    """Log-prob of every token given those before it in its segment, and the last hidden states.

    The log-prob is 0 at column 0; that of a segment's first token is meaningless and must carry
    weight 0 (it is a prompt token by construction).  counted: the tokens whose log-probs are asked
    for; those of the others are 0 and the head is spared most of them.
    whole: from `params` to what the model takes.  copies: params have a leading axis of
    `groups(forward)`, a copy for each group of the mesh, which scores its rows by it.
    """
    names = ("tokens", "positions", "segments", *(["prefixes"] if forward.shared_prompts else []))
    used = {name: micro[name] for name in names}

    def of_group(params: Any, micro: Arrays, counted: Any) -> tuple[Array, Array]:
        return _scored(config, forward, whole(params), micro, counted)

    ways = groups(forward)
    if ways == 1:
        return of_group(params, used, counted)
    rows = jax.tree.map(lambda x: x.reshape(ways, -1, *x.shape[1:]), (used, counted))
    found = sharding.in_groups(of_group, (0 if copies else None, 0, 0))(params, *rows)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _scored(
    config: ModelConfig, forward: Forward, params: Any, micro: Arrays, counted: Any
) -> tuple[Array, Array]:
    hidden = transformer.hidden_states(
        config, params, micro["tokens"], micro["positions"], micro["segments"],
        micro["prefixes"] if forward.shared_prompts else None,
        dtype=jnp.dtype(forward.dtype), remat=forward.remat, backend=forward.attention,
        unrolled=forward.unrolled,
    )  # fmt: skip
    table, pins = sharding.head(transformer.unembedding(params))
    values = objectives.token_log_probs(
        hidden[:, :-1],
        table,
        micro["tokens"][:, 1:],
        chunk=forward.logprob_chunk,
        softcap=config.logit_cap,
        counted=None if counted is None else counted[:, 1:],
        spread=objectives.Spread(*pins, needed=sharding.anywhere),
    )
    return jnp.pad(values, ((0, 0), (1, 0))), hidden


def log_probs(
    config: ModelConfig, forward: Forward, params: Any, micro: Arrays,
    counted: Bool[Array, "rows length"] | None = None,
) -> Float[Array, "rows length"]:  # fmt: skip
    """What `scored` says of them, without the hidden states."""
    return scored(config, forward, params, micro, counted)[0]


def totals(batch: Arrays) -> Arrays:
    """What the whole batch's sums are divided by; at least 1 each, but for correct and wrong."""
    mask = batch["sequence_mask"]
    correct = jnp.sum(batch["correct"] * mask)
    counts = {
        "pairs": jnp.sum(batch["pair_mask"]),
        "tokens": jnp.sum(batch["weights"]),
        "sequences": jnp.sum(mask),
        "observations": jnp.sum(batch["parts"] == Part.OBSERVATION),
        "readouts": jnp.sum(value.readouts(batch)),
    }
    counts = {name: jnp.maximum(count, 1) for name, count in counts.items()}
    share = 1 / counts["sequences"]
    return counts | {"correct": correct * share, "wrong": (jnp.sum(mask) - correct) * share}


def micro_loss(
    objective: Objective, score: Callable[[Arrays, Array], tuple[Array, Array]], head: Any,
    micro: Arrays, totals: Arrays,
) -> tuple[Float[Array, ""], Arrays]:  # fmt: skip
    """This micro-batch's share of the step's loss and metrics; shares add up over micro-batches.

    score: `scored` of the policy, of a micro-batch and the tokens that count.  head: of
    `objective.value`, else None.
    """
    seen = micro["parts"] == Part.OBSERVATION
    counted = micro["weights"] > 0
    if objective.observation_ce_weight:
        counted |= seen
    values, hidden = score(micro, counted)
    policy = by_sequence(values * micro["weights"], micro)
    if objective.kind == "likelihood":
        loss = -jnp.sum(policy) / totals["tokens"]
        metrics = {"logps/mean": -loss}
    else:
        ratios = (values - micro["reference"]) * micro["weights"]
        if objective.kind == "pairs":
            loss, metrics = _pairs(objective, policy, ratios, micro, totals, (head, hidden))
        else:
            loss, metrics = _unpaired(objective, policy, ratios, micro, totals)
    if objective.observation_ce_weight:
        metrics["loss/observation_ce"] = -jnp.sum(values * seen) / totals["observations"]
        loss += objective.observation_ce_weight * metrics["loss/observation_ce"]
    return loss, metrics | {"loss": loss}


def _pairs(
    objective: Objective, policy: Array, ratios: Array, micro: Arrays, totals: Arrays,
    term: tuple[Any, Array],
) -> tuple[Float[Array, ""], Arrays]:  # fmt: skip
    """M-DPO, equation 14; term: the value head, or None, and the hidden states it reads."""
    chosen, rejected = micro["chosen"], micro["rejected"]
    weights = micro["pair_mask"] / totals["pairs"]
    log_ratio, tokens = by_sequence(ratios, micro), by_sequence(micro["weights"], micro)
    margin, extra = micro["margin"], {}
    if objective.value is not None:
        head, hidden = term
        c, fit, extra = value.term_c_and_loss(
            objective.value, head, hidden, jax.lax.stop_gradient(objective.eta * ratios), micro,
            totals,
        )  # fmt: skip
        margin += c[rejected] - c[chosen]
        extra["loss/value"] = fit
    lengths = (tokens[chosen], tokens[rejected]) if objective.length_normalised else None
    loss, metrics = objectives.mdpo_loss(
        log_ratio[chosen], log_ratio[rejected], eta=objective.eta, kind=objective.loss,
        label_smoothing=objective.label_smoothing, margin=margin, weights=weights, lengths=lengths,
    )  # fmt: skip
    nll = objectives.nll_loss(policy[chosen], tokens[chosen], weights=weights)
    both = jnp.abs(jnp.stack([log_ratio[chosen], log_ratio[rejected]])) * micro["pair_mask"]
    metrics |= extra | {
        "loss/preference": loss,
        "loss/nll": nll,
        "logps/chosen": jnp.sum(weights * policy[chosen]),
        "logps/rejected": jnp.sum(weights * policy[rejected]),
        "log_ratio/mean_abs": jnp.sum(weights * both) / 2,
        "log_ratio/max_abs": jnp.max(both),
        "term_c/margin_mean_abs": jnp.sum(weights * jnp.abs(margin)),
    }
    metrics["displacement"] = metrics["rewards/chosen"] / objective.eta
    nothing = jnp.zeros_like(policy)
    for side, slots in (("chosen", chosen), ("rejected", rejected)):
        share = nothing.at[slots].add(weights)
        metrics |= _split(objective, side, ratios, share, micro)
    loss += objective.nll_weight * nll
    if objective.value is not None:
        loss += objective.value.weight * extra["loss/value"]
    return loss, metrics


def _unpaired(
    objective: Objective, policy: Array, ratios: Array, micro: Arrays, totals: Arrays
) -> tuple[Float[Array, ""], Arrays]:
    """M-KTO, equation 15."""
    log_ratio, mask = by_sequence(ratios, micro), micro["sequence_mask"]
    weights = mask / totals["sequences"]
    loss, metrics = objectives.mkto_loss(
        log_ratio, micro["correct"], totals["kl"], eta=objective.eta,
        lambda_correct=objective.lambda_correct, lambda_wrong=objective.lambda_wrong,
        weights=weights, totals=(totals["correct"], totals["wrong"]),
    )  # fmt: skip
    metrics |= {
        "loss/preference": loss,
        "log_ratio/mean_abs": jnp.sum(weights * jnp.abs(log_ratio)),
        "log_ratio/max_abs": jnp.max(jnp.abs(log_ratio) * mask),
    }
    metrics["displacement"] = metrics["rewards/chosen"] / objective.eta
    for side, member, total in (
        ("chosen", micro["correct"], totals["correct"]),
        ("rejected", 1 - micro["correct"], totals["wrong"]),
    ):
        # Means over the class; NaN without one, as mkto_loss has them.
        share = jnp.where(total > 0, member * weights / jnp.where(total > 0, total, 1), jnp.nan)
        metrics[f"logps/{side}"] = jnp.sum(share * policy)
        metrics |= _split(objective, side, ratios, share, micro)
    return loss, metrics


def _split(
    objective: Objective, side: str, ratios: Array, share: Float[Array, " sequences"], micro: Arrays
) -> Arrays:
    """A side's mean log-ratio, in nats, cut by turn and by what the action's tokens are."""
    per_token = ratios * at_tokens(share, micro)
    turns = jnp.clip(micro["turns"], 0, objective.turns)

    def cut(buckets: Array, count: int) -> Array:
        return jax.ops.segment_sum(
            per_token.reshape(-1), buckets.reshape(-1), num_segments=count + 1
        )

    by_turn, by_part = cut(turns, objective.turns), cut(micro["parts"], len(Part))
    names = {f"turn_{t}": by_turn[t] for t in range(1, objective.turns + 1)}
    names |= {part.name.lower(): by_part[part] for part in ACTION_PARTS}
    return {f"log_ratio/{side}/{name}": found for name, found in names.items()}
