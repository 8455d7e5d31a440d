"""An evaluation: a policy on suites of problems, greedy and sampled, kept trajectory by trajectory.

    OUT/evaluation.json      harness and policy, written first: another one may not go on here
    OUT/trajectories.jsonl   each trajectory with its verdict, appended as soon as it is graded
    OUT/results.json         every figure, written last
    OUT/report, pass_at_k.*  the same to read

`kill -9` loses the trajectories in flight; the same command goes on with what is not there yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mdpo_jax import recipes
from mdpo_jax.chat import COT_INSTRUCTION
from mdpo_jax.config import Config, ConfigError
from mdpo_jax.data import store, synthetic
from mdpo_jax.data.problems import load_problems
from mdpo_jax.model.policy import fingerprint
from mdpo_jax.pipeline import evaluation, files, stages, summary
from mdpo_jax.pipeline.context import Context, suite
from mdpo_jax.pipeline.exporting import Step, find_step
from mdpo_jax.pipeline.harness import Asked, Suite, comparable, harness
from mdpo_jax.pipeline.outcomes import Outcomes, shown
from mdpo_jax.reporting.console import progress
from mdpo_jax.reporting.scores import TOO_LONG, compared, scored
from mdpo_jax.rollout.engine import Engine, Request
from mdpo_jax.rollout.sampling import GREEDY, Sampling
from mdpo_jax.types import Problem, Trajectory

CLAIM, TRAJECTORIES = "evaluation.json", "trajectories.jsonl"
_GRADERS, _QUEUED = 2, 64  # threads; verdicts that decoding may be ahead of


def evaluate(asked: Asked) -> Path:
    """Evaluates what is not evaluated yet; the folder, with its results.json and report.

    Raises ConfigError and what reading models and problems raises, each in one line.
    """
    config, step = _resolved(asked)
    against = None if asked.versus is None else _evaluation(asked.versus)
    out = asked.out or _place(asked, config, step)
    with files.held(out, f"--out={out}"):
        loaded = _suites(asked, config, step, out)
        if against is not None:
            _same_problems(loaded, against, f"--versus={asked.versus}")
        directory = step.run if step else out
        with contextlib.closing(Context(config, directory, asked.policy)) as context:
            _evaluate(context, asked, step, loaded, out, against)
    summary.write_evaluation(out)
    return out


def _evaluate(
    context: Context, asked: Asked, step: Step | None, suites: Sequence[Suite], out: Path,
    against: dict[str, Any] | None,
) -> None:  # fmt: skip
    params = context.load(step.folder) if step else context.begin()
    place = str(step.folder) if step else str(context.config.model.path)
    claim = {
        "policy": {"path": place, "fingerprint": fingerprint(params)},
        "harness": harness(context, asked, suites),
    }
    _claim(out, claim)
    path = out / files.RESULTS
    results = files.read_json(path) if path.exists() else None
    with Outcomes(out / TRAJECTORIES) as outcomes:
        if results is None:
            _sample_all(context, asked, params, suites, outcomes, out)
            figures = [_figures(context, asked, s, outcomes) for s in suites]
            results = claim | {"kind": "evaluation", "suites": figures}
            files.write_json(path, results)  # a comparison that fails costs no figure
        results.pop("versus", None)  # of another time
        _whole(outcomes, suites, results, f"--out={out}")
        if against is not None and asked.versus is not None:
            results["versus"] = _versus(results, outcomes, suites, asked.versus, against)
    files.write_json(path, results)


def _sample_all(
    context: Context, asked: Asked, params: Any, suites: Sequence[Suite], outcomes: Outcomes,
    out: Path,
) -> None:  # fmt: skip
    """All trajectories that are not kept yet, and those that the report shows."""
    context.sampler.load(params)
    fitting = [_fitting(context, asked, s) for s in suites]
    engine = context.engine if asked.mode == "tool" else context.engine_with(None)
    for decoding, samples, sampling in (
        ("greedy", 1, GREEDY),
        ("sampled", asked.samples, context.sampling(asked.temperature)),
    ):
        requests = _requests(context, asked, fitting, outcomes, decoding, samples)
        _sample(context, engine, requests, outcomes, decoding, sampling)
    first = shown(out / TRAJECTORIES, fitting, context.chat, context.config.evaluate.shown)
    files.write_json(out / summary.SHOWN, first)


def _figures(context: Context, asked: Asked, of: Suite, outcomes: Outcomes) -> dict[str, Any]:
    return {
        "name": of.name,
        "problems": len(of.problems),
        "quarantined": of.quarantined,
        **scored(of.problems, *outcomes.of(of, asked.samples), context.config.seed),
    }


def _requests(
    context: Context, asked: Asked, suites: Sequence[Suite], outcomes: Outcomes, decoding: str,
    samples: int,
) -> list[Request]:  # fmt: skip
    """Those of the trajectories that are not kept yet."""
    seed = context.config.seed
    return [
        Request(_put(p, asked), i, f"{seed}/evaluate/{s.name}")
        for s in suites
        for p in s.problems
        for i in range(samples)
        if not outcomes.has(decoding, p.id, i)
    ]


def _sample(
    context: Context, engine: Engine, requests: Sequence[Request], outcomes: Outcomes,
    decoding: str, sampling: Sampling,
) -> None:  # fmt: skip
    """Sample, grade by a few threads beside the decoding, and keep each as soon as it is graded."""
    if not requests:
        return

    def keep(problem: Problem, trajectory: Trajectory) -> None:
        verdict = evaluation.verdict(context, problem.answer, trajectory)
        outcomes.add(decoding, store.Graded(trajectory, verdict))

    jobs: deque[Future[None]] = deque()
    with (
        progress(f"evaluate, {decoding}", len(requests)) as tell,
        ThreadPoolExecutor(_GRADERS, "grade") as pool,
    ):
        kept = outcomes.count(decoding)
        tell(text=f"{kept} were there" if kept else None)
        for place, trajectory in engine.stream(requests, policy=decoding, sampling=sampling):
            jobs.append(pool.submit(keep, requests[place].problem, trajectory))
            while jobs and (jobs[0].done() or len(jobs) > _QUEUED):
                jobs.popleft().result()
            tell(1, text=engine.live())
        for job in jobs:
            job.result()


def _put(problem: Problem, asked: Asked) -> Problem:
    """The problem as it is put to the policy."""
    if asked.mode == "tool":
        return problem
    return dataclasses.replace(problem, question=problem.question + COT_INSTRUCTION)


def _fitting(context: Context, asked: Asked, of: Suite) -> Suite:
    """Those whose prompt and two tokens of an answer fit; the others count as wrong, unsampled."""
    some = [
        p
        for p in of.problems
        if len(context.chat.prompt(_put(p, asked).question)) + 2 <= context.limits.context
    ]
    if not some:
        raise ConfigError(
            f"config.rollout.context={context.limits.context}: no prompt of {of.name} fits; expected "
            "enough for the prompts and an answer"
        )
    return dataclasses.replace(of, problems=tuple(some))


def _resolved(asked: Asked) -> tuple[Config, Step | None]:
    """The configuration that gives the harness, and the parameters' place inside a run."""
    overrides = [a for a in asked.config if not a.startswith("--config=")]
    step = find_step(asked.checkpoint, asked.iteration) if asked.checkpoint else None
    if step is not None:
        config = files.read_config(step.run)
        if len(overrides) < len(asked.config):
            named = recipes.parse([a for a in asked.config if a not in overrides])
            if named.name != config.name:
                raise ConfigError(
                    f"--config={named.name}: the run's own recipe is {config.name}; expected that, "
                    "or no --config, and --config.FIELD=VALUE for what is to differ"
                )
        config = recipes.overridden(config, [recipes.override(a) for a in overrides])
    elif len(overrides) == len(asked.config):
        raise ConfigError(
            "--config: not given; expected --config=NAME, or a run's directory as --checkpoint"
        )
    else:
        config = recipes.parse(asked.config)
        place = asked.checkpoint or config.model.path
        if place is None:
            raise ConfigError(
                "config.model.path=None: nothing to evaluate; expected a model's folder or hub id, "
                "or --checkpoint"
            )
        model = dataclasses.replace(config.model, path=place)
        config = dataclasses.replace(config, model=model)
    return _in_mode(asked, config, step is not None), step


def _in_mode(asked: Asked, config: Config, of_run: bool) -> Config:
    """Limits of the mode; with data files the tool is the interpreter as it is."""
    replace = dataclasses.replace
    if asked.mode == "cot":
        config = replace(config, rollout=replace(config.rollout, max_turns=1))
    for path in asked.data:
        if not Path(path).is_file():
            raise ConfigError(f"--data={path}: no such file; expected .jsonl or .jsonl.gz files")
    if not asked.data and not of_run and config.problems.path is not None:
        raise ConfigError(
            f"config.problems.path={config.problems.path!r}: a recipe on files; expected --data"
        )
    if asked.data:
        problems = replace(config.problems, path=",".join(asked.data), fault=0.0)
        config = replace(config, problems=problems)
    return config


def _suites(asked: Asked, config: Config, step: Step | None, out: Path) -> list[Suite]:
    """A suite for each file, or the recipe's own problems."""
    found: list[Suite] = []
    for path in map(Path, asked.data):
        name = _stem(path)
        if any(s.name == name for s in found):
            raise ConfigError(f"--data={path}: a second {name}; expected files of different names")
        read = load_problems(path, out / f"quarantine-{name}.jsonl")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append(Suite(name, _spread(read.problems, asked.problems), digest, read.quarantined))
    if not found:
        found = [Suite(asked.split, _spread(_own(asked, config, step), asked.problems))]
    ids: dict[str, str] = {}
    for s in found:
        for p in s.problems:
            if ids.setdefault(p.id, s.name) != s.name:
                raise ConfigError(f"--data: id {p.id!r} is in {ids[p.id]} and in {s.name}")
    return found


def _own(asked: Asked, config: Config, step: Step | None) -> Sequence[Problem]:
    """The recipe's problems of the split: a run's as it has them, else the synthetic suite's."""
    if step is not None:
        path = step.run / "problems" / f"{asked.split}.jsonl.gz"
        return [store.problem_from(row) for row in store.read_lines(path)]
    count = getattr(config.problems, asked.split)
    return synthetic.problems(suite(config), asked.split, count, config.seed)


def _spread(problems: Sequence[Problem], count: int) -> tuple[Problem, ...]:
    """So many, evenly over the file: files are sorted by subject.  0 for all."""
    some = min(count, len(problems)) or len(problems)
    return tuple(problems[i * len(problems) // some] for i in range(some))


def _place(asked: Asked, config: Config, step: Step | None) -> Path:
    """evaluations/POLICY-SUITES-MODE."""
    if step is not None:
        policy = f"{step.run.name}-{step.label.removesuffix('/' + stages.PARAMS)}"
    else:
        policy = str(config.model.path).rstrip("/").removeprefix("/")
        policy = policy.rsplit("/", 1)[-1]
    names = [_stem(path) for path in asked.data] or [asked.split]
    return Path("evaluations") / "-".join([policy.replace("/", "-"), *names, asked.mode])


def _stem(path: str | Path) -> str:
    """A file's name without .jsonl and .gz."""
    return Path(Path(path).name.removesuffix(".gz")).stem


def _claim(out: Path, claim: dict[str, Any]) -> None:
    """Note harness and policy, or compare them with those noted once a trajectory is kept."""
    path, kept = out / CLAIM, out / TRAJECTORIES
    others = [name for name in (files.RESULTS, "config.json") if (out / name).exists()]
    if not path.exists() and others:
        raise ConfigError(
            f"--out={out}: holds {others[0]} of something else; expected a new folder"
        )
    begun = kept.exists() and kept.stat().st_size > 0
    if not path.exists() or not (begun or (out / files.RESULTS).exists()):
        files.write_json(path, claim)
        return
    known = files.read_json(path)
    changed = recipes.differences(known["harness"], claim["harness"])
    old, new = (c["policy"]["fingerprint"] for c in (known, claim))
    if old != new:
        changed = [f"policy.fingerprint: {old!r} -> {new!r}", *changed]
    if changed:
        raise ConfigError(
            f"--out={out}: holds an evaluation of another kind ({'; '.join(changed[:3])}); expected "
            "the same, or another folder"
        )


def _evaluation(directory: Path) -> dict[str, Any]:
    """results.json of a finished evaluation."""
    path = directory / files.RESULTS
    results = files.read_json(path) if path.is_file() else {}
    if not isinstance(results, dict) or results.get("kind") != "evaluation":
        raise ConfigError(
            f"--versus={directory}: no results.json of an evaluation; expected the --out folder of "
            "a finished one"
        )
    if not (directory / TRAJECTORIES).is_file():
        raise ConfigError(f"--versus={directory}: its {TRAJECTORIES} is gone; expected it there")
    return results


def _same_problems(suites: Sequence[Suite], theirs: dict[str, Any], named: str) -> None:
    """ConfigError unless each suite was evaluated there too."""
    there = theirs["harness"]["data"]
    for s in suites:
        same = there.get(s.name, {}).get("problems_sha256") == s.as_dict()["problems_sha256"]
        if not same:
            counts = {name: data["problems"] for name, data in there.items()}
            raise ConfigError(
                f"{named}: {s.name} with {len(s.problems)} problems is not what was evaluated there "
                f"({counts}); expected the same problems"
            )


def _whole(
    outcomes: Outcomes, suites: Sequence[Suite], results: dict[str, Any], named: str
) -> None:  # fmt: skip
    """ConfigError unless every trajectory that the results count is there."""
    samples = results["harness"]["sampling"]["samples"]
    too_long = {s["name"]: s["slices"]["greedy"][TOO_LONG] for s in results["suites"]}
    for s in suites:
        missing = outcomes.missing(s, samples) - too_long[s.name]
        if missing:
            raise ConfigError(
                f"{named}: {TRAJECTORIES} lacks those of {missing} problems of {s.name} that "
                "results.json counts; expected it whole, or a new folder"
            )


def _versus(
    ours: dict[str, Any], outcomes: Outcomes, suites: Sequence[Suite], directory: Path,
    theirs: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Paired differences on each suite, and why they may not be compared."""
    other = Outcomes(directory / TRAJECTORIES, read_only=True)
    _whole(other, suites, theirs, f"--versus={directory}")
    seed = ours["harness"]["sampling"]["seed"]
    here, elsewhere = (of["harness"]["sampling"]["samples"] for of in (ours, theirs))
    rows = {
        s.name: compared(s.problems, outcomes.of(s, here), other.of(s, elsewhere), seed)
        for s in suites
    }
    return {
        "directory": str(directory),
        "policy": theirs["policy"],
        "differences": comparable(theirs, ours),
        "suites": rows,
    }
