"""From a finished run directory, or evaluation, to its static report."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from mdpo_jax.config import Config
from mdpo_jax.data import store
from mdpo_jax.pipeline.files import DONE, read_json
from mdpo_jax.reporting import speed
from mdpo_jax.reporting.metrics import read_metrics
from mdpo_jax.reporting.plots import pass_at_k_plot
from mdpo_jax.reporting.sheets import Sheet, sheets
from mdpo_jax.reporting.site.build import Report, SampleTrajectory, build_report
from mdpo_jax.types import Role, Trajectory

SHOWN = "shown.json"  # of an evaluation: trajectories as text, so that no tokenizer is needed
PACKAGES = ("jax", "flax", "optax", "transformers", "numpy")


def write_report(config: Config) -> Path:
    """Write `report/index.html` of a run that has its results.json; returns the page's path."""
    directory = config.directory
    results = read_json(directory / "results.json")
    rows = results["rows"]
    notes = [
        f"test, {c['decoding']}: iteration {c['iteration']} minus SFT {100 * c['difference']:+.1f} "
        f"points, 95 % [{100 * c['low']:+.1f}, {100 * c['high']:+.1f}], paired by problem"
        for c in results["comparisons"]
    ]
    notes += _explored(config)
    curves = {
        f"iteration {t}": read_metrics(path)
        for t in range(1, config.last_iteration + 1)
        if (path := directory / f"iteration-{t}" / "train" / "metrics.jsonl").exists()
    }
    report = Report(
        title=f"mdpo_jax: {config.name}, {config.method}, seed {config.seed}",
        config=results["config"],
        rows=rows,
        curves=curves,
        pass_at_k={
            f"{row['stage']} {row['iteration']}": {int(k): v for k, v in row["pass_at_k"].items()}
            for row in rows
            if "pass_at_k" in row
        },
        sheets=tuple(_speed(config)),
        samples=tuple(_samples(config)),
        notes=notes,
        environment={"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    )
    build_report(directory / "report", report)
    return directory / "report" / "index.html"


def _speed(config: Config) -> Iterator[Sheet]:
    """One table of all trainings whose stages noted their speed."""
    folders = {"SFT": "sft"}
    folders |= {
        f"iteration {t}": f"iteration-{t}/train" for t in range(1, config.last_iteration + 1)
    }
    paths = {name: config.directory / folder / DONE for name, folder in folders.items()}
    found = {n: of for n, p in paths.items() if p.exists() and (of := read_json(p).get("speed"))}
    if found:
        yield speed.sheet(found)


def _explored(config: Config) -> Iterator[str]:
    """A line an iteration: how its trajectories were sought, where the rollout noted it."""
    for t in range(1, config.last_iteration + 1):
        done = config.directory / f"iteration-{t}" / "rollout" / DONE
        found = read_json(done).get("exploration") if done.exists() else None
        if found:
            yield (
                f"iteration {t}, {found['strategy']}: {found['tokens_sampled']:,} tokens sampled, "
                f"{100 * found['coverage']:.1f} % of the problems with a right and a wrong trajectory, "
                f"{100 * found['distinct']:.1f} % of the trajectories distinct, mean edit distance "
                f"{found['distance']:.2f}"
            )


def write_evaluation(directory: Path) -> Path:
    """Write `report/index.html` and pass_at_k.{png,svg} of a finished evaluation; the page's path."""
    results = read_json(directory / "results.json")
    curves: dict[str, dict[int, float]] = {}
    bands: dict[str, dict[int, tuple[float, float]]] = {}
    for suite in results["suites"]:
        for field, name in (("pass_at_k", "pass@k"), ("maj_at_k", "maj@k")):
            for k, of in suite.get(field, {}).items():
                named = f"{suite['name']} {name}"
                curves.setdefault(named, {})[int(k)] = of["value"]
                bands.setdefault(named, {})[int(k)] = of["low"], of["high"]
    for suffix in ("png", "svg") if curves else ():
        pass_at_k_plot(curves, directory / f"pass_at_k.{suffix}", bands)
    policy, harness = results["policy"], results["harness"]
    place = Path(policy["path"].removesuffix("/params"))
    report = Report(
        title=f"mdpo_jax: evaluation of {'/'.join(place.parts[-2:])}, {harness['mode']}",
        config={"policy": policy} | {k: v for k, v in harness.items() if k != "versions"},
        pass_at_k=curves,
        bands=bands,
        sheets=tuple(sheets(results)),
        samples=[SampleTrajectory(**sample) for sample in read_json(directory / SHOWN)],
        environment=harness["versions"],
    )
    return build_report(directory / "report", report)


def _samples(config: Config) -> Iterator[SampleTrajectory]:
    """The first greedy test trajectories of SFT and of the last iteration, role by role."""
    export = config.directory / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    path = config.directory / "problems" / "test.jsonl.gz"
    problems = {p.id: p for p in map(store.problem_from, store.read_lines(path))}
    last, folders = config.last_iteration, {"SFT": "sft-test"}
    if last:
        folders[f"iteration {last}"] = f"iteration-{last}/train-test"
    for name, folder in folders.items():
        rows = store.read_lines(config.directory / folder / "test-greedy.jsonl.gz")
        for row, _ in zip(rows, range(config.evaluate.shown), strict=False):
            trajectory, verdict = store.graded_from(row)
            yield SampleTrajectory(
                problem=problems[trajectory.problem_id].question,
                gold=problems[trajectory.problem_id].answer,
                verdict=verdict.label,
                rule=verdict.rule,
                stage=name,
                segments=[segment(tokenizer, trajectory, r, s) for r, s in trajectory.segments],
            )


def segment(
    tokenizer: Any, trajectory: Trajectory, role: Role, span: slice
) -> tuple[str, str, float | None]:
    """A segment of a trajectory as a report shows it."""
    text = tokenizer.decode(trajectory.ids[span].tolist(), clean_up_tokenization_spaces=False)
    mean = float(np.mean(trajectory.log_probs[span])) if role == Role.ACTION else None
    return role.name.lower(), text, mean
