"""What is computed once before an iteration's training: log-probs of the data under the reference.

Every row of a file carries the fingerprint of the reference that scored it, and the train stage
takes no other: a stale one cannot be used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mdpo_jax.config import ConfigError
from mdpo_jax.data import packing, store
from mdpo_jax.data.store import Graded
from mdpo_jax.model.policy import fingerprint
from mdpo_jax.objectives import mismatched_rows
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.files import DONE, read_json, write_rows
from mdpo_jax.types import Pair, Trajectory

PAIRS, MISMATCHED, ROLLOUTS = "pairs.jsonl.gz", "mismatched.jsonl.gz", "rollouts.jsonl.gz"
_log = logging.getLogger(__name__)
Sources = Sequence[tuple[Path, float]]


def sources(context: Context, updated: Path, fixed: Path) -> Sources:
    """(parameters, weight) of the policies that the iteration's reference is made of.

    Raises ConfigError, before anything is sampled, if one of them is gone.
    """
    kind, share = context.config.reference, context.config.train.mixture
    if kind == "mixture" and updated != fixed:
        found = [(fixed, share), (updated, 1 - share)]
        found = [(path, weight) for path, weight in found if weight > 0]
    else:
        found = [(fixed if kind == "fixed" else updated, 1.0)]
    for path, _ in found:
        if not path.is_dir():
            raise ConfigError(
                f"config.train.reference={kind}: {path} is missing; expected the parameters that "
                "its stage wrote; restore them, or begin in another folder"
            )
    return found


def identity(of: Sources) -> str:
    """Fingerprint of a reference as its policies' stages recorded it."""
    if len(of) == 1:
        return recorded(of[0][0])
    parts = [f"{recorded(path)}*{weight}" for path, weight in of]
    return hashlib.sha256("+".join(parts).encode()).hexdigest()[:16]


def recorded(path: Path) -> str:
    """Fingerprint of the policy at `path`, as the stage that wrote it noted it."""
    found = read_json(path.parent / DONE).get("policy")
    if found is None:
        raise ConfigError(
            f"{path.parent / DONE}: notes no policy (its stage is of an earlier version); delete "
            f"{path.parent} to have it made again"
        )
    return found


def checked(params: Any, path: Path) -> Any:
    """Parameters read from `path`, if they are those that its stage wrote; else ConfigError."""
    found, wrote = fingerprint(params), recorded(path)
    if found != wrote:
        raise ConfigError(
            f"{path}: its fingerprint is {found}, but its stage wrote {wrote}; expected the "
            "parameters as they were written"
        )
    return params


def score_reference(
    context: Context, folder: Path, pair_files: Sequence[Path], of: Sources
) -> dict[str, Any]:
    """Pairs with the reference's log-probs of every token, by the trainer's own forward.

    With them, where the method needs it: the sequences of KTO's reference point, and the unselected
    rollouts of a value head.  Nothing is scored if the step holds the reference itself.
    """
    config = context.config
    context.rest()
    found = [store.pair_from(row) for file in pair_files for row in store.read_lines(file)]
    sides = [t for q in found for t in (q.chosen, q.rejected)]
    borrowed, rollouts, counts = [], [], {}
    if _needs_mismatched(context):
        borrowed, counts["stand_ins_cut"] = _mismatched(context, sides)
    if config.term_c.kind == "value":
        rollouts, counts["rollouts_beyond_row"] = _unselected(context, folder, len(found))
    everything = [*sides, *borrowed, *(g.trajectory for g in rollouts)]
    name = identity(of)
    scores = _scores(context, everything, of)
    scored = [
        Pair(q.chosen, q.rejected, scores[2 * i], scores[2 * i + 1]) for i, q in enumerate(found)
    ]
    mark = {"reference": name}
    write_rows(folder / PAIRS, (store.pair_row(q) | mark for q in scored))
    first, second = len(sides), len(sides) + len(borrowed)
    if borrowed:
        rows = zip(borrowed, scores[first:second], strict=True)
        write_rows(folder / MISMATCHED, (store.scored_row(t, s) | mark for t, s in rows))
    if rollouts:
        rows = (
            store.scored_row(g.trajectory, s) | {"correct": g.verdict.correct} | mark
            for g, s in zip(rollouts, scores[second:], strict=True)
        )
        write_rows(folder / ROLLOUTS, rows)
    return {"pairs": len(scored), "reference": name, **counts}


def _needs_mismatched(context: Context) -> bool:
    config = context.config
    return config.preset.objective == "unpaired" and config.train.kl == "mismatched"


def _scores(
    context: Context, trajectories: Sequence[Trajectory], of: Sources
) -> list[Float[np.ndarray, " length"]]:
    if context.config.train.reference_log_probs == "in_step":
        return [np.zeros(len(t.ids), np.float32) for t in trajectories]
    items = [packing.item(t, "sampled") for t in trajectories]
    batch = 2 * context.config.train.batch_pairs
    parts = []
    for path, weight in of:
        params = checked(context.load(path), path)
        values = context.trainer().score(params, items, batch)
        parts.append([np.log(weight) + v.astype(np.float64) for v in values])
    # Of several policies: the mixture of their probabilities, token by token.
    return [np.logaddexp.reduce(v).astype(np.float32) for v in zip(*parts, strict=True)]


def _mismatched(context: Context, sides: Sequence[Trajectory]) -> tuple[list[Trajectory], int]:
    """[i]: the prompt of side i with another problem's completion; and how many had to be cut."""
    rows, length = mismatched_rows([t.problem_id for t in sides]), context.config.train.row_length
    own = sum(sides[i].problem_id == sides[j].problem_id for i, j in enumerate(rows))
    if own:
        _log.warning(
            "KTO's reference point: %d of %d prompts are scored with a completion of their own "
            "problem, for one problem holds more than half of the data", own, len(sides),
        )  # fmt: skip
    starts = [int(t.actions[0].start) for t in sides]
    cut = sum(starts[i] + len(sides[j].ids) - starts[j] > length for i, j in enumerate(rows))
    if cut:
        _log.warning(
            "KTO's reference point: %d of %d completions are cut at train.row_length=%d, behind a "
            "longer prompt than their own", cut, len(sides), length,
        )  # fmt: skip
    return [packing.mismatched(sides[i], sides[j], length) for i, j in enumerate(rows)], cut


def _unselected(context: Context, folder: Path, pairs: int) -> tuple[list[Graded], int]:
    """Rollouts of this iteration that no filter, but for length and an unknown verdict, has seen;
    and how many were too long."""
    length, most = context.config.train.row_length, context.config.term_c.rollouts * pairs
    kept: list[tuple[bytes, Graded]] = []
    long = 0
    for graded in map(store.graded_from, store.read_folder(folder.parent / "rollout")):
        if len(graded.trajectory.ids) > length:
            long += 1
        elif graded.verdict.label != "unknown":
            key = f"{context.config.seed}/{graded.trajectory.key}"
            kept.append((hashlib.sha256(key.encode()).digest(), graded))
    if long:
        _log.warning(
            "term C: %d rollouts longer than train.row_length=%d are left out", long, length
        )
    return [graded for _, graded in sorted(kept, key=lambda entry: entry[0])[:most]], long
