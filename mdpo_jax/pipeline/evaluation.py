"""Greedy and sampled accuracy of a policy, pass@k, tool use, and KL to the SFT policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from mdpo_jax import hosts
from mdpo_jax.data.packing import item
from mdpo_jax.data.parts import parts_of
from mdpo_jax.data.store import Graded, graded_from, graded_row, read_lines, write_lines
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.files import missing
from mdpo_jax.reporting.metrics import pass_at_k, wilson_interval
from mdpo_jax.rollout.engine import Request
from mdpo_jax.rollout.sampling import GREEDY, Sampling
from mdpo_jax.types import ACTION_PARTS, Part, Problem, Role, Trajectory, Verdict


class Advance(Protocol):
    """Tells how much of a stage is done, and what is to be said beside it."""

    def __call__(self, count: int, text: str | None = None) -> None: ...


def _silent(count: int, text: str | None = None) -> None:
    pass


def sample(
    context: Context, problems: Sequence[Problem], *, samples: range, stream: str, policy: str,
    sampling: Sampling, advance: Callable[[int], None] = lambda done: None,
) -> list[Graded]:  # fmt: skip
    """Trajectories of the loaded policy with their verdicts, by problem and then by sample."""
    requests = [Request(p, s, f"{context.config.seed}/{stream}") for p in problems for s in samples]
    found = context.engine.run(requests, policy=policy, sampling=sampling, advance=advance)
    golds = {p.id: p.answer for p in problems}
    return [Graded(t, verdict(context, golds[t.problem_id], t)) for t in found]


def verdict(context: Context, gold: str, trajectory: Trajectory) -> Verdict:
    """The grader's word on the last action; a trajectory that a limit cut is not finished."""
    last = trajectory.ids[trajectory.actions[-1]]
    finished = trajectory.finish not in ("turn_limit", "token_limit")
    return context.grader.grade(gold, context.chat.decode(last), finished=finished)


def evaluate(
    context: Context, folder: Path, problems: Sequence[Problem], *, split: str,
    policy: str, reference: Any = None, pass_k: bool = False, advance: Advance = _silent,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of results.json for the loaded policy on one split; trajectories are kept in `folder`.

    reference: parameters for the fields of `kl_estimate`.
    """
    settings = context.config.evaluate
    sampled = context.sampling(settings.temperature)
    runs = {
        "greedy": (problems, range(1), GREEDY),
        "sampled": (problems, range(1), sampled),
    }
    if pass_k:
        extra = range(1, settings.pass_samples)
        runs["more"] = (problems[: settings.pass_problems], extra, sampled)
    graded: dict[str, list[Graded]] = {}
    for name, (some, samples, sampling) in runs.items():
        path = folder / f"{split}-{name}.jsonl.gz"

        def sampled_of(own: Sequence[Problem], samples=samples, sampling=sampling) -> list[Graded]:
            return sample(
                context, own, samples=samples, stream=f"evaluate/{split}", policy=policy,
                sampling=sampling, advance=advance,
            )  # fmt: skip

        _dealt(path, some, sampled_of)
        graded[name] = [graded_from(row) for row in read_lines(path)]
    rows = [{"split": split, "decoding": d, **_figures(graded[d])} for d in ("greedy", "sampled")]
    if pass_k:
        first = graded["sampled"][: settings.pass_problems]
        rows[1] |= _pass_figures(first, graded["more"], settings.pass_samples)
    if reference is not None and sampled.of_the_policy:
        rows[1] |= kl_estimate(context, [g.trajectory for g in graded["sampled"]], reference)
    return rows


def _dealt(
    path: Path, problems: Sequence[Problem], work: Callable[[Sequence[Problem]], list[Graded]]
) -> None:
    """The file of all problems' trajectories in their order, each process sampling its share."""
    if not missing([path]):
        return
    count = jax.process_count()
    parts = [path.with_name(f"{path.name}.{i}-of-{count}") for i in range(count)]
    own = parts[jax.process_index()]
    if not own.exists():
        write_lines(own, map(graded_row, work(hosts.mine(problems))))
    hosts.wait()

    def joined() -> None:
        rows = [row for part in parts for row in read_lines(part)]
        place = {problem.id: i for i, problem in enumerate(problems)}
        write_lines(path, sorted(rows, key=lambda r: (place[r["problem_id"]], r["sample"])))
        for part in path.parent.glob(f"{path.name}.*-of-*"):  # of a run of other processes, too
            part.unlink()

    hosts.by_first(joined)


def correct(folder: Path, split: str, decoding: str) -> np.ndarray:
    """[problems] 0/1 of an evaluation's trajectories, in the problems' order."""
    path = folder / f"{split}-{decoding}.jsonl.gz"
    return np.array([row["label"] == "correct" for row in read_lines(path)], np.float64)


def kl_estimate(
    context: Context, trajectories: Sequence[Trajectory], reference: Any
) -> dict[str, Any]:
    """The policy's KL divergence from the reference on its own samples, in nats a trajectory.

    `kl`: the mean over trajectories of the sum over action tokens of log pi - log pi_reference;
    `kl_by_turn` [turns] and `kl_by_part` (text, code, answer) are its terms and add up to it.
    """
    length = context.config.train.row_length
    short = [t for t in trajectories if len(t.ids) <= length]
    if not short:
        return {"kl": 0.0, "kl_by_turn": [], "kl_by_part": {}}
    scores = context.trainer().score(reference, [item(t, "sampled") for t in short], 64)
    by_turn, by_part = np.zeros(max(t.turns for t in short)), np.zeros(len(Part))
    for t, s in zip(short, scores, strict=True):
        ratios = np.where(t.roles == Role.ACTION, t.log_probs.astype(np.float64) - s, 0)
        np.add.at(by_turn, np.maximum(t.turn_numbers, 1) - 1, ratios)
        np.add.at(by_part, parts_of(t, context.chat), ratios)
    count = len(short)
    return {
        "kl": float(by_turn.sum() / count),
        "kl_by_turn": (by_turn / count).tolist(),
        "kl_by_part": {p.name.lower(): float(by_part[p] / count) for p in ACTION_PARTS},
    }


def _figures(graded: Sequence[Graded]) -> dict[str, Any]:
    right = sum(g.verdict.correct for g in graded)
    low, high = wilson_interval(right, len(graded))
    statuses = [s for g in graded for s in g.trajectory.tool_statuses]
    return {
        "accuracy": right / len(graded),
        "low": low,
        "high": high,
        "n": len(graded),
        "mean_turns": float(np.mean([g.trajectory.turns for g in graded])),
        "tool_error_rate": float(np.mean([s != "ok" for s in statuses])) if statuses else 0.0,
        "tool_calls": len(statuses) / len(graded),
    }


def _pass_figures(first: Sequence[Graded], more: Sequence[Graded], n: int) -> dict[str, Any]:
    """pass@k for k = 1, 2, 4, ... n over the problems that have n samples."""
    counts = {g.trajectory.problem_id: int(g.verdict.correct) for g in first}
    for g in more:
        counts[g.trajectory.problem_id] += g.verdict.correct
    right = np.array(list(counts.values()))
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
    values = {k: pass_at_k(right, n, k) for k in ks}
    out: dict[str, Any] = {"pass_at_k": {str(k): v for k, v in values.items()}}
    return out | ({"pass_at_8": values[8]} if 8 in values else {})
