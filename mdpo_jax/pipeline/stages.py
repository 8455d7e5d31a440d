"""The stages of an iteration: each a function from finished files to a finished folder."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdpo_jax import hosts
from mdpo_jax.config import ConfigError
from mdpo_jax.data import packing, pairs, store, synthetic
from mdpo_jax.data.batches import InTurn, Shuffled
from mdpo_jax.data.pairing import siblings
from mdpo_jax.data.problems import load_problems
from mdpo_jax.exploration import CHOICE
from mdpo_jax.pipeline.context import EARLIER, PARAMS, Context, suite
from mdpo_jax.pipeline.demonstrations import demonstrations
from mdpo_jax.pipeline.evaluation import Advance
from mdpo_jax.pipeline.examples import examples
from mdpo_jax.pipeline.kept import keeper
from mdpo_jax.pipeline.progress import METRICS, Progress
from mdpo_jax.pipeline.reference import Sources, checked, identity
from mdpo_jax.reporting import speed
from mdpo_jax.reporting.metrics import MetricsWriter, iterate_metrics, read_metrics
from mdpo_jax.training.losses import Objective
from mdpo_jax.training.meter import Trace
from mdpo_jax.training.step import Fixed
from mdpo_jax.training.trainer import Plan, Trainer
from mdpo_jax.types import Problem, Role

PROFILE = "profile"
_log = logging.getLogger(__name__)
_COMPARED = 32  # trajectories whose log-probs by sampler and trainer are compared


def prepare_problems(context: Context, folder: Path) -> dict[str, Any]:
    """Problem files of the run: iteration-1 ... iteration-T, dev and test, no problem in two."""
    config = context.config
    counts = {
        f"iteration-{t}": config.problems.per_iteration for t in range(1, 1 + config.iterations)
    }
    if config.problems.path is None:
        groups, dropped = _synthetic(context, counts), {}
    else:
        groups, dropped = _from_files(context, counts, folder)
    seen: dict[str, str] = {}
    for name, problems in groups.items():
        for problem in problems:
            if seen.setdefault(problem.question, name) != name:
                raise ConfigError(
                    f"problems: {problem.id!r} is in both {seen[problem.question]} and {name}; "
                    "expected disjoint sets"
                )
        store.write_lines(folder / f"{name}.jsonl.gz", map(store.problem_row, problems))
    return {"counts": {name: len(problems) for name, problems in groups.items()}, **dropped}


def read_problems(context: Context, name: str) -> list[Problem]:
    """One of the sets of `prepare_problems`."""
    path = context.directory / "problems" / f"{name}.jsonl.gz"
    return [store.problem_from(row) for row in store.read_lines(path)]


def _synthetic(context: Context, counts: dict[str, int]) -> dict[str, list[Problem]]:
    config, chains = context.config, suite(context.config)
    groups = {
        split: synthetic.problems(chains, split, getattr(config.problems, split), config.seed)
        for split in ("dev", "test")
    }
    skip = 0
    for name, count in counts.items():
        groups[name] = synthetic.problems(chains, "train", count, config.seed, skip)
        skip += count
    return {name: _fitting(context, "the synthetic suite", found) for name, found in groups.items()}


def _from_files(
    context: Context, counts: dict[str, int], folder: Path
) -> tuple[dict[str, list[Problem]], dict[str, int]]:
    settings, bad, long = context.config.problems, 0, 0
    sources = {"train": (settings.path or "").split(",")}
    sources |= {s: [p] for s in ("dev", "test") if (p := getattr(settings, f"{s}_path"))}
    loaded: dict[str, list[Problem]] = {}
    for name, paths in sources.items():
        loaded[name] = []
        for index, path in enumerate(paths):
            found = load_problems(path, folder / f"quarantine-{name}-{index}.jsonl")
            short = _fitting(context, path, found.problems)
            loaded[name] += short
            bad, long = bad + found.quarantined, long + len(found.problems) - len(short)
    order = np.random.default_rng(context.config.seed).permutation(len(loaded["train"]))
    pool = [loaded["train"][i] for i in order]
    taken = {p.question for name in ("dev", "test") for p in loaded.get(name, [])}
    unique: dict[str, Problem] = {p.question: p for p in pool if p.question not in taken}
    pool = list(unique.values())
    groups = {}
    for split in ("dev", "test"):
        wanted = getattr(settings, split)
        if split in loaded:
            groups[split] = loaded[split][:wanted]
        else:
            # Held out of the training file, but never more than a tenth of it.
            wanted = min(wanted, max(1, len(pool) // 10))
            groups[split], pool = pool[:wanted], pool[wanted:]
    each = min(settings.per_iteration or len(pool), len(pool) // len(counts))
    if not each:
        raise ConfigError(
            f"config.problems.path={settings.path!r}: {len(pool)} training problems are left after "
            f"dev and test; expected at least {len(counts)}, one an iteration"
        )
    for index, name in enumerate(counts):
        groups[name] = pool[index * each : (index + 1) * each]
    if bad or long:
        _log.warning("problems: %d bad rows set aside, %d with too long a prompt", bad, long)
    return groups, {"quarantined": bad, "too_long": long}


def _fitting(context: Context, path: str, problems: Sequence[Problem]) -> list[Problem]:
    """Those whose prompt leaves room for one turn in the cache; ConfigError if none does."""
    limits = context.config.rollout
    lengths = [len(context.chat.prompt(p.question)) for p in problems]
    short = [
        p
        for p, length in zip(problems, lengths, strict=True)
        if length + limits.turn_tokens <= limits.context
    ]
    if not short:
        raise ConfigError(
            f"config.rollout.context={limits.context}: no prompt of {path} leaves room for a turn; "
            f"expected at least {min(lengths) + limits.turn_tokens}, the shortest prompt and "
            f"rollout.turn_tokens={limits.turn_tokens}"
        )
    return short


def sft(context: Context, folder: Path, advance: Advance) -> dict[str, Any]:
    """Warm-up on demonstrations: `params`, and `params-earlier` for iteration 1's mixture."""
    settings, seed = context.config.sft, context.config.seed
    kept, (params, base) = context.parameters, context.parameters.first()
    held_out = {p.question for name in ("dev", "test") for p in read_problems(context, name)}
    parts = demonstrations(context, held_out, folder) if settings.steps else []
    if not parts:
        return _as_it_is(context, folder, params, base)
    single = [(count, [[entry] for entry in items]) for count, items in parts]
    batches = InTurn([(n, Shuffled(groups, settings.batch, seed)) for n, groups in single])
    plan = Plan(
        settings.batch, settings.steps, settings.learning_rate, settings.warmup_steps,
        settings.final_lr_fraction, seed,
    )  # fmt: skip
    earlier = max(1, round(settings.steps * settings.previous_fraction))

    others = keeper(context, folder, settings.steps, base)

    def keep(step: int, params: Callable[[], Any]) -> None:
        if step == earlier:
            kept.save(folder / EARLIER, params(), base)
        others(step, params)

    longest = max(packing.longest(groups) for _, groups in single)
    trainer = context.fitted(context.trainer(sft=True), batches, settings.steps, longest)
    saves = Progress(folder, context.config.train.save_every, settings.steps)
    with _recorded(saves, advance) as report, _traced(context, folder) as trace:
        final = trainer.fit(
            params, batches, plan, Objective("likelihood"), fixed=Fixed(base), report=report,
            keep=keep, saves=saves, trace=trace,
        )  # fmt: skip
    kept.save(folder / PARAMS, final, base)
    return {
        "steps": settings.steps,
        "speed": _speed(folder),
        "demonstrations": len(parts[-1][1]),
        "policy": kept.identity(final, base),
        **_rows(folder, trainer),
    }


def _as_it_is(context: Context, folder: Path, params: Any, base: Any) -> dict[str, Any]:
    """A warm-up without demonstrations: the model that the run starts from, which must be one."""
    c, kept = context.config, context.parameters
    if c.model.path is None:
        raise ConfigError(
            f"config.problems.path={c.problems.path!r}: holds no worked solutions to warm a fresh "
            "model up with; expected sft.path, or model.path to start from"
        )
    for name in (PARAMS, EARLIER):
        kept.save(folder / name, params, base)
    keeper(context, folder, 0, base)(0, lambda: params)
    if c.sft.steps:
        _log.warning("SFT: no worked solutions in %s; skipped", c.problems.path)
    return {
        "steps": 0,
        "note": "no demonstrations: the SFT policy is model.path as it is",
        "policy": kept.identity(params, base),
    }


def build_pairs(context: Context, folder: Path, iteration: int) -> dict[str, Any]:
    """Pairs, and RAFT's right trajectories, from an iteration's rollouts."""
    p = context.config.pairs
    rules = pairs.Rules(
        p.per_problem, p.max_tokens, p.keep_limit, p.require_tool, p.drop_error_before_answer,
        CHOICE[context.config.explore.strategy],
    )  # fmt: skip
    graded = map(store.graded_from, store.read_folder(folder.parent / "rollout"))
    found = pairs.select(graded, rules, f"{context.config.seed}/{iteration}")
    length = context.config.train.row_length
    short = [q for q in found.pairs if max(len(q.chosen.ids), len(q.rejected.ids)) <= length]
    store.write_lines(folder / "pairs.jsonl.gz", map(store.pair_row, short))
    right = [t for t in found.correct if len(t.ids) <= length]
    store.write_lines(folder / "correct.jsonl.gz", map(store.trajectory_row, right))
    dropped = dict(found.dropped)
    long = len(found.pairs) - len(short), len(found.correct) - len(right)
    for name, count in zip(("pair_beyond_row", "correct_beyond_row"), long, strict=True):
        if count:
            dropped[name] = count
            _log.warning("pairs: %d %s train.row_length=%d", count, name, length)
    return {
        "pairs": len(short),
        "sibling_pairs": siblings(short),
        "correct": len(right),
        "problems": found.problems,
        "mixed_problems": found.mixed,
        "dropped": dict(sorted(dropped.items())),
    }


def train(
    context: Context, folder: Path, start: Path, of: Sources, seed: int, advance: Advance
) -> dict[str, Any]:
    """The method's step over an iteration's data.

    start: parameters of the policy to move.  of: the reference's; where that is the same policy,
    the first log-ratios must be 0.
    """
    config, kept = context.config, context.parameters
    context.rest()
    params, base = kept.trainable(start)
    compared = config.preset.objective != "likelihood"
    name = identity(of) if compared else ""
    data = examples(context, folder, name, seed)
    if not data.groups:
        kept.save(folder / PARAMS, params, base)
        keeper(context, folder, 0, base)(0, lambda: params)
        note = "no pair to learn from: the policy is unchanged"
        return {"steps": 0, "note": note, "policy": kept.identity(params, base)}
    policy = checked(kept.whole(params, base), start)
    apart = _sampler_difference(context, folder.parent / "rollout", start, policy)
    at_reference = compared and [path for path, _ in of] == [start]
    reference = None
    if compared and config.train.reference_log_probs == "in_step":
        reference, under = kept.trainable(of[0][0])
        checked(kept.whole(reference, under), of[0][0])
    batches, steps = data.batches(seed), data.plan.steps
    trainer = context.fitted(context.trainer(), batches, steps, data.longest)
    saves = Progress(folder, config.train.save_every, steps)
    with _recorded(saves, advance) as record, _traced(context, folder) as trace:
        report = _alarmed(record, config.train.displacement_alarm, saves)
        final = trainer.fit(
            params, batches, data.plan, data.objective, fixed=Fixed(base, reference),
            check_step_zero=at_reference, report=report, trace=trace,
            keep=keeper(context, folder, steps, base), saves=saves,
        )  # fmt: skip
    kept.save(folder / PARAMS, final, base)
    return {
        "method": config.method,
        "steps": steps,
        "compilations": trainer.compilations(data.objective),
        "speed": _speed(folder),
        "policy": kept.identity(final, base),
        "sampler_trainer": apart,
        **_rows(folder, trainer),
    }


def _rows(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """The shape that a stage's micro-batches had, and the mean share of it that was no padding."""
    layout = trainer.layout
    found: dict[str, Any] = {"rows": layout.rows, "row_length": layout.row_length}
    fills = [row["fill"] for row in iterate_metrics(folder / METRICS)] if hosts.first() else []
    if fills:  # the summary is the first host's
        found["fill"] = float(np.mean(fills))
    return found


def _sampler_difference(
    context: Context, rollouts: Path, start: Path, params: Any
) -> dict[str, float]:
    """|log-prob| of sampled tokens as the sampler gave it minus the trainer's; {} without a sample.

    Over the first of the iteration's trajectories that the policy at `start` sampled, in nats.
    """
    name, length = str(start.relative_to(context.directory)), context.config.train.row_length
    rows = store.read_folder(rollouts)
    found = (store.trajectory_from(row) for row in rows if row["policy"] == name)
    some = list(itertools.islice((t for t in found if len(t.ids) <= length), _COMPARED))
    if not some:
        return {}
    scores = context.trainer().score(params, [packing.item(t, "sampled") for t in some], len(some))
    apart = np.concatenate(
        [np.abs(t.log_probs - s)[t.roles == Role.ACTION] for t, s in zip(some, scores, strict=True)]
    )
    return {"max": float(apart.max()), "mean": float(apart.mean()), "tokens": len(apart)}


def _alarmed(
    report: Callable[[int, dict[str, float]], None], limit: float, saves: Progress
) -> Callable[[int, dict[str, float]], None]:
    """`report` that warns once when chosen trajectories have become less likely by `limit` nats."""
    recent: deque[float] = deque(maxlen=10)

    def beyond(values: dict[str, float]) -> bool:
        if not limit or "displacement" not in values:
            return False
        recent.append(values["displacement"])
        return -float(np.mean(recent)) > limit

    before = [beyond(row) for row in saves.rows()]  # in the call that was interrupted
    warned = any(before)

    def alarmed(step: int, values: dict[str, float]) -> None:
        nonlocal warned
        report(step, values)
        if beyond(values) and not warned:
            warned = True
            _log.warning(
                "%s, step %d: chosen trajectories are %.1f nats less likely than under the "
                "reference (train.displacement_alarm=%g); a smaller learning rate, a larger "
                "eta or an NLL term holds them", saves.folder, step, -np.mean(recent), limit,
            )  # fmt: skip

    return alarmed


@contextlib.contextmanager
def _recorded(
    saves: Progress, advance: Advance
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A trainer's `report` into the stage's metrics, behind the rows of steps already made."""
    if saves.steps:
        _log.warning("%s: goes on after step %d", saves.folder, saves.steps)
        advance(saves.steps)
    if not hosts.first():
        yield lambda step, values: advance(1)
        return
    saves.begin()
    with MetricsWriter(saves.folder / METRICS) as metrics:

        def report(step: int, values: dict[str, float]) -> None:
            metrics.write(step=step, **values)
            advance(1)

        yield report


def _traced(context: Context, folder: Path) -> Trace:
    """Of the first process alone: each sees its own devices, and they do the same."""
    wanted = context.config.profile == "steps" and hosts.first()
    return Trace(folder / PROFILE if wanted else None)


def _speed(folder: Path) -> dict[str, float]:
    """How fast a stage trained, from its metrics; the first process alone knows."""
    return speed.summary(read_metrics(folder / METRICS)) if hosts.first() else {}
