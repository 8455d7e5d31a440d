"""What an evaluation says of a policy: pass@k, maj@k, groups of problems, slices by tool use.

Pure functions of outcomes.  Every share comes with a 95 % interval over problems (see
`metrics.share_interval`); an `unknown` verdict counts as not right, and is counted apart.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mdpo_jax.reporting.metrics import paired_interval, pass_at_k_by_problem, share_interval
from mdpo_jax.types import Problem

KS = (1, 2, 4, 8, 16, 32, 64)
# As in environment/tool.py, which is on this floor.
STATUSES = ("ok", "error", "timeout", "memory", "output_limit", "killed", "refused")
FINISHES = ("answered", "no_code", "turn_limit", "token_limit")
GROUPED = ("level", "type", "subject", "steps")  # tags of problems
TOO_LONG = "prompt_too_long"

Shares = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One trajectory as far as it is scored.

    vote: its answer, in a form that is equal for equal answers; None if it gave none.
    turns: 0 where the prompt did not fit and nothing was sampled.
    """

    problem: str
    sample: int
    label: str
    rule: str
    vote: str | None
    finish: str
    statuses: tuple[str, ...]
    turns: int

    @property
    def right(self) -> bool:
        return self.label == "correct"


Decoded = tuple[Sequence[Outcome], Sequence[Outcome]]


def scored(
    problems: Sequence[Problem], greedy: Sequence[Outcome], sampled: Sequence[Outcome], seed: int
) -> dict[str, Any]:
    """All figures of one suite.  `sampled` has as many outcomes for each problem, or none."""
    out: dict[str, Any] = {"greedy": share(greedy, _right, seed)}
    out["slices"] = {"greedy": tool_slices(greedy, seed)}
    if sampled:
        votes = _by_problem(problems, sampled)
        n = len(votes[0])
        ks = [k for k in KS if k <= n]
        out["pass_at_k"] = {str(k): _mean(_passes(votes, k), seed) for k in ks}
        curves = np.array([_curve(of) for of in votes])
        out["maj_at_k"] = {str(k): _mean(curves[:, k], seed) for k in ks}
        out["slices"]["sampled"] = tool_slices(sampled, seed)
    out["groups"] = {
        tag: _groups(problems, tag, greedy, sampled, seed)
        for tag in GROUPED
        if any(tag in p.tags for p in problems)
    }
    return out


def share(
    outcomes: Iterable[Outcome], counts: Callable[[Outcome], bool], seed: int
) -> dict[str, Any]:
    """Of the outcomes that count: {value, low, high, n}; value None where there is no outcome."""
    right, of = Counter[str](), Counter[str]()
    for outcome in outcomes:
        of[outcome.problem] += 1
        right[outcome.problem] += counts(outcome)
    if not of:
        return {"value": None, "low": None, "high": None, "n": 0}
    parts, wholes = (np.array([c[p] for p in of], np.float64) for c in (right, of))
    low, high = share_interval(parts, wholes, seed)
    return {"value": right.total() / of.total(), "low": low, "high": high, "n": of.total()}


def majority(votes: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """maj@k of one problem: the chance that the majority's answer among k of its samples is right.

    A sample votes for its answer; samples without one do not vote.  The answer with the most votes
    wins, each of several with equally many as likely as the others, and counts as right as often as
    the samples that gave it were (1 or 0, unless the grader failed on one of them).  If nobody
    votes, nothing wins and it is wrong.  Where n > k samples are there, this is the mean over all
    C(n, k) choices of k of them, computed exactly: unbiased as pass@k is, and without a random draw
    or a dependence on the samples' order, which the first k would have.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"k: {k} of n = {len(votes)} samples; expected 1 <= k <= n")
    return majority_curve(*_ballot(votes, right))[k]


@functools.lru_cache(maxsize=1 << 16)  # most problems have one of a few ballots
def majority_curve(groups: tuple[tuple[int, float], ...], silent: int) -> tuple[float, ...]:
    """maj@k for k = 0, 1, ... up to n or 64; groups: (votes, share that is right) of each answer.

    Subsets of k samples are counted by polynomials in x (samples taken).  For a winner of t votes
    every answer gives sum_{s<t} C(c, s) x^s, or C(c, t) x^t and one more answer that ties:

        ways[r, k]: subsets of k with r answers at t votes and the others below
        credit[r, k]: the sum over these subsets of the r answers' shares that are right
    """
    n = sum(votes for votes, _ in groups) + silent
    top = min(n, KS[-1])
    total = np.zeros(top + 1)
    for t in range(1, min(top, max((votes for votes, _ in groups), default=0)) + 1):
        able = [group for group in groups if group[0] >= t]
        ways = np.zeros((min(len(able), top // t) + 1, top + 1))
        ways[0, 0] = 1.0
        credit = np.zeros_like(ways)
        for votes, right in able:
            below, tied = [math.comb(votes, s) for s in range(t)], math.comb(votes, t)
            more, gain = _times(ways, below), _times(credit, below)
            more[1:, t:] += tied * ways[:-1, :-t]
            gain[1:, t:] += tied * (credit + right * ways)[:-1, :-t]
            ways, credit = more, gain
        # Answers that cannot have t votes are as good as silent.
        rest = n - sum(votes for votes, _ in able)
        credit = _times(credit, [math.comb(rest, s) for s in range(rest + 1)])
        total += (credit[1:] / np.arange(1, len(credit))[:, None]).sum(axis=0)
    return tuple(total / [math.comb(n, k) for k in range(top + 1)])


def tool_slices(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """How a policy uses its tool, and its accuracy by that.

    `turns`, `calls`: accuracy of trajectories by number of turns, and by what happened to their
    calls (with and without an error or a timeout: of those that made a call).  `status`: share of
    all calls.  `finish`: share of trajectories; the last two are `unfinished`.  `unknown`: verdicts
    by rule.
    """
    tried = [o for o in outcomes if o.turns]
    called = [o for o in tried if o.statuses]
    by_turns = {t: [o for o in tried if o.turns == t] for t in sorted({o.turns for o in tried})}
    calls = {"no call": [o for o in tried if not o.statuses]}
    for status in ("error", "timeout"):
        calls[f"without {status}"] = [o for o in called if status not in o.statuses]
        calls[f"with {status}"] = [o for o in called if status in o.statuses]
    statuses = Counter(status for o in called for status in o.statuses)
    total = statuses.total()
    return {
        "turns": {str(t): share(some, _right, seed) for t, some in by_turns.items()},
        "calls": {name: share(some, _right, seed) for name, some in calls.items()},
        "calls_total": total,
        "calls_per_trajectory": total / max(1, len(outcomes)),
        "status": {
            name: {"n": statuses[name], "value": statuses[name] / total if total else None}
            for name in dict.fromkeys((*STATUSES, *sorted(statuses)))
        },
        "finish": {f: share(outcomes, lambda o, f=f: o.finish == f, seed) for f in FINISHES},
        "unfinished": share(outcomes, lambda o: o.finish in FINISHES[2:], seed),
        "unknown": dict(sorted(Counter(o.rule for o in outcomes if o.label == "unknown").items())),
        TOO_LONG: len(outcomes) - len(tried),
    }


def compared(
    problems: Sequence[Problem], ours: Decoded, theirs: Decoded, seed: int
) -> list[dict[str, Any]]:
    """Ours minus theirs, paired by problem: greedy accuracy, pass@1, maj@k at the largest common k.

    ours, theirs: (greedy, sampled) outcomes of the same problems.  `better`, `worse`: how many
    problems the difference comes from.
    """
    greedy, sampled = (
        [_by_problem(problems, o) for o in pair] for pair in zip(ours, theirs, strict=True)
    )
    pairs = {"greedy accuracy": [_rights(votes) for votes in greedy]}
    n = min(len(votes[0]) for votes in sampled)
    if n:
        k = max(k for k in KS if k <= n)
        pairs["pass@1"] = [_rights(votes) for votes in sampled]
        pairs[f"maj@{k}"] = [np.array([_curve(of)[k] for of in votes]) for votes in sampled]
    rows = []
    for name, (a, b) in pairs.items():
        values = {"ours": float(a.mean()), "theirs": float(b.mean())}
        signs = {"better": int((a > b).sum()), "worse": int((a < b).sum()), "n": len(a)}
        rows.append({"figure": name, **values, **paired_interval(a, b, seed)._asdict(), **signs})
    return rows


def _right(outcome: Outcome) -> bool:
    return outcome.right


def _by_problem(problems: Sequence[Problem], outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Outcomes of each problem, in the problems' order."""
    found: dict[str, list[Outcome]] = {p.id: [] for p in problems}
    for outcome in outcomes:
        found[outcome.problem].append(outcome)
    counts = {len(some) for some in found.values()}
    if len(counts) != 1:
        raise ValueError(f"outcomes: {sorted(counts)} a problem; expected as many for each")
    return list(found.values())


def _rights(votes: Sequence[Sequence[Outcome]]) -> Float[np.ndarray, " problems"]:
    return np.array([np.mean([o.right for o in of]) for of in votes])


def _passes(votes: Sequence[Sequence[Outcome]], k: int) -> Float[np.ndarray, " problems"]:
    right = np.array([sum(o.right for o in of) for of in votes])
    return pass_at_k_by_problem(right, len(votes[0]), k)


def _mean(values: Float[np.ndarray, " problems"], seed: int) -> Shares:
    low, high = share_interval(values, np.ones(len(values)), seed)
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}


def _groups(
    problems: Sequence[Problem], tag: str, greedy: Iterable[Outcome], sampled: Iterable[Outcome],
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Greedy accuracy and pass@1 of the problems that share a tag's value."""
    value = {p.id: str(p.tags.get(tag, "none")) for p in problems}
    counts = Counter(value.values())
    out: dict[str, Any] = {}
    for name in sorted(counts):
        out[name] = {"n": counts[name]}
        for decoding, outcomes in (("greedy", greedy), ("sampled", sampled)):
            some = [o for o in outcomes if value[o.problem] == name]
            if some:
                out[name][decoding] = share(some, _right, seed)
    return out


def _curve(outcomes: Sequence[Outcome]) -> tuple[float, ...]:
    return majority_curve(*_ballot([o.vote for o in outcomes], [o.right for o in outcomes]))


def _ballot(
    votes: Sequence[str | None], right: Sequence[bool]
) -> tuple[tuple[tuple[int, float], ...], int]:
    """(votes, share that is right) of each answer, in an order of its own, and who did not vote."""
    given: dict[str, list[bool]] = {}
    for vote, is_right in zip(votes, right, strict=True):
        if vote is not None:
            given.setdefault(vote, []).append(is_right)
    groups = sorted((len(some), sum(some) / len(some)) for some in given.values())
    return tuple(groups), sum(vote is None for vote in votes)


def _times(ways: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """[r, k] times the polynomial sum_s factors[s] x^s, cut at the last k."""
    out, top = np.zeros_like(ways), ways.shape[1]
    for s, factor in enumerate(factors[:top]):
        out[:, s:] += factor * ways[:, : top - s]
    return out
