"""Term (C) of the pairs by Monte Carlo: the tool is run again, and the reference goes on from there.

    ... action h | observation        V(s') of the state that came
                 | observation'       mean over calls of the tool of V(s'')

V is the log-mean-exp of the utilities of the reference's continuations, with the bias correction of
objectives/term_c.py.  They run to the end, so with a second random observation ahead V is too large,
whatever their number (docs/theory.md, "whole continuations").  An action that the tool always answers
alike adds 0 and costs no continuation.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mdpo_jax import hosts
from mdpo_jax.data import store
from mdpo_jax.environment.replay import Replayed
from mdpo_jax.environment.tool import Observation
from mdpo_jax.objectives.term_c import soft_value
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.evaluation import Advance, verdict
from mdpo_jax.pipeline.files import missing
from mdpo_jax.pipeline.reference import PAIRS
from mdpo_jax.rollout.engine import Prefix, Request
from mdpo_jax.rollout.sampling import Sampling
from mdpo_jax.types import Problem, Trajectory

TERM_C = "term_c"
_AT_ONCE = 16  # trajectories whose tool calls are in flight together
_Call = tuple[int, Replayed, Future[Observation]]  # action, its session, its answer


class _Turn(NamedTuple):
    """An action that was observed: the state that came, and those that could have come, counted."""

    came: Prefix
    drawn: Counter[Prefix]


def estimate(
    context: Context, folder: Path, problems: Sequence[Problem], reference: Path, advance: Advance
) -> dict[str, Any]:
    """(C) of both sides of every pair, in logits, a file a chunk of pairs, in the pairs' order.

    reference: parameters of the policy that goes on; `folder` is beside the reference stage's.
    """
    settings, known = context.config.term_c, {p.id: p for p in problems}
    found = list(store.read_lines(folder.parent / "reference" / PAIRS))
    size = context.config.rollout.chunk_problems
    wanted = missing([folder / f"{start:06d}.jsonl.gz" for start in range(0, len(found), size)])
    if wanted:
        context.sampler.load(context.load(reference))
    for target in hosts.mine(wanted):
        start = int(target.name.split(".")[0])
        pairs = [store.pair_from(row) for row in found[start : start + size]]
        sides = [t for pair in pairs for t in (pair.chosen, pair.rejected)]
        values = _term_c(context, sides, known, folder.parent.name, advance)
        rows = zip(values[::2], values[1::2], strict=True)
        store.write_lines(target, ({"chosen": c, "rejected": r} for c, r in rows))
    hosts.wait()
    margins = [r["rejected"] - r["chosen"] for r in read(folder)]
    return {
        "pairs": len(margins),
        "mean_abs_margin": float(np.mean(np.abs(margins))) if margins else 0.0,
        "observations": settings.observations,
        "continuations": settings.continuations,
    }


def read(folder: Path) -> list[dict[str, float]]:
    """(C) of `chosen` and `rejected` of every pair, in the pairs' order."""
    return list(store.read_folder(folder))


def _term_c(
    context: Context, sides: Sequence[Trajectory], problems: dict[str, Problem], stream: str,
    advance: Advance,
) -> list[float]:  # fmt: skip
    turns: list[list[_Turn]] = []
    for start in range(0, len(sides), _AT_ONCE):
        some = sides[start : start + _AT_ONCE]
        texts = [[context.chat.decode(t.ids[span]) for span in t.actions] for t in some]
        calls = [_ask(context, *both, stream) for both in zip(some, texts, strict=True)]
        turns += [_answered(context, *three) for three in zip(some, texts, calls, strict=True)]
    states = {
        prefix: side.problem_id
        for side, observed in zip(sides, turns, strict=True)
        for turn in observed
        for prefix in (turn.came, *turn.drawn)
        if set(turn.drawn) != {turn.came}
    }
    values = _values(context, states, problems, stream, advance)
    out = []
    for observed in turns:
        total = 0.0
        for turn in observed:
            if turn.came in values:
                draws = turn.drawn.total()
                mean = sum(values[p] * n for p, n in turn.drawn.items()) / draws
                total += values[turn.came] - mean
        out.append(float(total))
    return out


def _ask(context: Context, trajectory: Trajectory, texts: list[str], stream: str) -> list[_Call]:
    """Run every action but the last again, each call in a session of its own."""
    asked = []
    for h, span in enumerate(trajectory.actions[:-1]):
        before = trajectory.ids[: span.stop]
        for m in range(context.config.term_c.observations):
            key = f"{context.config.seed}/{stream}/term-c/{_digest(before)}/{m}"
            session = Replayed(context.tool.start(key), texts[:h])
            asked.append((h, session, session.run(texts[h])))
    return asked


def _answered(
    context: Context, trajectory: Trajectory, texts: list[str], calls: list[_Call]
) -> list[_Turn]:
    """What the tool said, beside what it had said."""
    actions = trajectory.actions
    drawn = [Counter[Prefix]() for _ in actions[:-1]]
    for h, session, call in calls:
        ids, roles = context.chat.observation(
            call.result().text,
            ended=trajectory.ids[actions[h].stop - 1] in context.chat.stop_ids,
            limit=context.config.rollout.observation_tokens,
        )
        session.close()
        drawn[h][_prefix(trajectory, actions[h].stop, texts[: h + 1], ids, roles)] += 1
    came = []
    for h, (span, following) in enumerate(itertools.pairwise(actions)):
        between = slice(span.stop, following.start)
        ids, roles = trajectory.ids[between].tolist(), trajectory.roles[between].tolist()
        came.append(_prefix(trajectory, span.stop, texts[: h + 1], ids, roles))
    return [_Turn(*both) for both in zip(came, drawn, strict=True)]


def _prefix(
    trajectory: Trajectory,
    stop: int,
    texts: Sequence[str],
    ids: Sequence[int],
    roles: Sequence[int],
) -> Prefix:
    return Prefix(
        (*trajectory.ids[:stop].tolist(), *ids),
        (*trajectory.roles[:stop].tolist(), *(int(r) for r in roles)),
        tuple(texts),
    )


def _values(
    context: Context, states: dict[Prefix, str], problems: dict[str, Problem], stream: str,
    advance: Advance,
) -> dict[Prefix, float]:  # fmt: skip
    """V of each state; one that leaves no room to go on is lost, and worth 0."""
    settings, count = context.config.term_c, context.config.term_c.continuations
    room = context.config.rollout.context - 2
    going = [prefix for prefix in states if len(prefix.ids) <= room]
    requests = [
        Request(
            problems[states[prefix]],
            k,
            f"{context.config.seed}/{stream}/term-c/{_digest(prefix.ids)}",
            prefix,
        )
        for prefix in going
        for k in range(count)
    ]
    if not going:
        return dict.fromkeys(states, 0.0)
    # The policy's own samples, whatever the rollouts': V is of the policy itself.
    found = context.engine.run(requests, policy="term-c", sampling=Sampling(), advance=advance)
    right = [verdict(context, problems[t.problem_id].answer, t).correct for t in found]
    utility = settings.utility * np.asarray(right, np.float32).reshape(len(going), count)
    values = np.asarray(soft_value(jnp.asarray(utility), eta=context.config.train.eta)).tolist()
    return dict.fromkeys(states, 0.0) | dict(zip(going, values, strict=True))


def _digest(ids: Any) -> str:
    return hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:16]
