"""The run: SFT, then iterations of rollout, pairs, reference, training and evaluation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdpo_jax import hosts
from mdpo_jax.config import Config, ConfigError
from mdpo_jax.pipeline import exploring, monte_carlo, reference, stages
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.evaluation import Advance, correct, evaluate
from mdpo_jax.pipeline.files import DONE, RESULTS, open_run, read_json, stage, write_json
from mdpo_jax.pipeline.progress import finished
from mdpo_jax.reporting.console import progress
from mdpo_jax.reporting.metrics import paired_interval


def run(config: Config) -> dict[str, Any]:
    """Everything up to results.json, from wherever the run directory stands; returns results.

    A run that has its results.json is finished: it is read and nothing is done again.
    """
    with open_run(config) as directory:
        path = directory / RESULTS
        known = hosts.by_first(lambda: read_json(path) if path.exists() else None)
        if known is not None:
            return known
        with contextlib.closing(Context(config, directory)) as context:
            return _run(context)


def _run(context: Context) -> dict[str, Any]:
    config, directory = context.config, context.directory
    _ = context.placement, context.forward  # refused before anything is computed
    _ = context.start  # of all processes, before one of them works alone
    stage(directory / "problems", lambda f: stages.prepare_problems(context, f), alone=True)
    dev, test = (stages.read_problems(context, name) for name in ("dev", "test"))
    last = config.last_iteration
    sft = directory / "sft"
    with _timed(context, "SFT", config.sft.steps) as advance:
        stage(sft, lambda f: stages.sft(context, f, advance))
        finished(sft)
    rows = _evaluate(context, sft, "sft", 0, dev, "dev")
    policies = [sft / stages.EARLIER, sft / stages.PARAMS]
    for t in range(1, last + 1):
        folder = directory / f"iteration-{t}"
        _iterate(context, folder, t, policies)
        rows += _evaluate(context, folder / "train", config.method, t, dev, "dev")
        policies.append(folder / "train" / stages.PARAMS)
    chosen = _best(rows)
    rows += _evaluate(context, sft, "sft", 0, test, "test")
    for t in sorted({chosen, last} - {0}):
        folder = directory / f"iteration-{t}" / "train"
        rows += _evaluate(context, folder, config.method, t, test, "test")
    results = {
        "config": config.as_dict(),
        "rows": rows,
        "chosen_iteration": chosen,
        "comparisons": _compare(context, last) if last else [],
        "compilations": _compilations(context),
    }
    hosts.by_first(lambda: write_json(directory / RESULTS, results))
    return results


def evaluate_again(config: Config, iteration: int, split: str) -> list[dict[str, Any]]:
    """Rows of one iteration of a run on one split; ConfigError if it is not trained yet."""
    directory = config.directory
    folder = directory / ("sft" if iteration == 0 else f"iteration-{iteration}/train")
    if not (folder / stages.PARAMS).is_dir():
        raise ConfigError(
            f"--iteration={iteration}: {folder} has no parameters; expected 0 (SFT) to "
            f"{config.last_iteration} of a run that got so far"
        )
    name = config.method if iteration else "sft"
    with open_run(config), contextlib.closing(Context(config, directory)) as context:
        problems = stages.read_problems(context, split)
        return _evaluate(context, folder, name, iteration, problems, split)


def _iterate(context: Context, folder: Path, t: int, policies: list[Path]) -> None:
    """One iteration; `policies` are all so far, the current one last."""
    config, train = context.config, context.config.train
    # Before anything is sampled: a reference that is gone stops the run at once.
    of = reference.sources(context, policies[-1], policies[1])
    total = exploring.expected(config, len(stages.read_problems(context, f"iteration-{t}")))
    with _timed(context, f"iteration {t}: rollout", total) as advance:
        stage(folder / "rollout", lambda f: exploring.rollout(context, f, t, policies, advance))
    stage(folder / "pairs", lambda f: stages.build_pairs(context, f, t), alone=True)
    start = policies[-1] if train.start == "previous" else policies[1]
    if config.preset.objective != "likelihood":
        first = 1 if train.data == "all" else t
        files = [
            folder.parent / f"iteration-{i}" / "pairs" / "pairs.jsonl.gz"
            for i in range(first, t + 1)
        ]
        stage(folder / "reference", lambda f: reference.score_reference(context, f, files, of))
    if config.term_c.kind == "monte_carlo":
        asked = [
            p for i in range(1, t + 1) for p in stages.read_problems(context, f"iteration-{i}")
        ]
        with _timed(context, f"iteration {t}: term C", None) as advance:
            stage(
                folder / monte_carlo.TERM_C,
                lambda f: monte_carlo.estimate(context, f, asked, of[0][0], advance),
            )
    with _timed(context, f"iteration {t}: {config.method}", None) as advance:
        stage(
            folder / "train",
            lambda f: stages.train(context, f, start, of, config.seed + 1000 * t, advance),
        )
        finished(folder / "train")


def _evaluate(
    context: Context, folder: Path, name: str, iteration: int, problems: list, split: str
) -> list[dict[str, Any]]:
    target = folder.parent / f"{folder.name}-{split}"
    label = f"{name} {iteration}" if iteration else name
    with _timed(context, f"evaluate {label} on {split}", None) as advance:

        def work(where: Path) -> dict[str, Any]:
            # Held by nobody else, so that leaves are freed as they are read.
            context.sampler.load(context.load(folder / stages.PARAMS))
            reference = None
            if iteration:
                reference = context.load(context.directory / "sft" / stages.PARAMS)
            rows = evaluate(
                context, where, problems, split=split, policy=label,
                reference=reference, pass_k=split == "dev", advance=advance,
            )  # fmt: skip
            return {"rows": [{"stage": name, "iteration": iteration, **row} for row in rows]}

        return stage(target, work)["rows"]


def _compilations(context: Context) -> dict[str, int]:
    """Most programs that one process compiled: the sampler's, those of them after its warm-up, and
    the step's (0: none ran)."""

    def most(stage_name: str, field: str) -> int:
        folders = context.directory.glob(f"iteration-*/{stage_name}")
        return max((read_json(folder / DONE).get(field, 0) for folder in folders), default=0)

    return {
        "rollout": most("rollout", "compilations"),
        "rollout_after_warm_up": most("rollout", "compilations_after_warm_up"),
        "step": most("train", "compilations"),
    }


def _best(rows: list[dict[str, Any]]) -> int:
    """The iteration with the best mean of greedy and sampled accuracy on dev; ties to the later."""
    score: dict[int, float] = {}
    for row in rows:
        if row["split"] == "dev":
            score[row["iteration"]] = score.get(row["iteration"], 0.0) + row["accuracy"]
    return max(score, key=lambda t: (score[t], t))


def _compare(context: Context, last: int) -> list[dict[str, Any]]:
    """Last iteration minus SFT on test, paired by problem."""
    out = []
    for decoding in ("greedy", "sampled"):
        before = correct(context.directory / "sft-test", "test", decoding)
        after = correct(context.directory / f"iteration-{last}" / "train-test", "test", decoding)
        interval = paired_interval(after, before, seed=context.config.seed)
        out.append({"iteration": last, "versus": "sft", "decoding": decoding, **interval._asdict()})
    return out


@contextlib.contextmanager
def _timed(context: Context, what: str, total: int | None) -> Iterator[Advance]:
    """Progress for one stage, and its seconds in the run's log."""
    start, done = time.monotonic(), 0
    if not hosts.first():
        yield lambda count, text=None: None
        return
    with progress(what, total) as tell:

        def advance(count: int, text: str | None = None) -> None:
            nonlocal done
            done += count
            tell(count, text=text)

        yield advance
    if done:
        line = f"{what}\t{done}\t{time.monotonic() - start:.1f} s\n"
        with open(context.directory / "times.tsv", "a", encoding="utf-8") as log:
            log.write(line)
