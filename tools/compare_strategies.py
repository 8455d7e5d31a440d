"""Strategies of exploration beside each other, at an equal budget of sampled tokens a problem.

    python tools/compare_strategies.py --out runs/explore --config=tiny --seeds 0 1 2 \
        --strategies mixture temperatures mcts --budget-tokens 256

A seed's warm-up is made once and copied into the others' folders; then each strategy has one
iteration: rollout, pairs, a preference step, evaluation.  --config and --config.FIELD=VALUE are common
to all.  A finished run is not run again, and an unfinished one goes on.  Prints a table in Markdown:
medians over the seeds, with the least and the most.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHARED = ("problems", "start", "sft", "sft-dev", "sft-test")
COLUMNS: list[tuple[str, Callable[[dict[str, Any]], float], str]] = [
    ("tokens sampled", lambda f: f["tokens_sampled"], "{:,.0f}"),
    ("prefilled", lambda f: f["tokens_prefilled"], "{:,.0f}"),
    ("trajectories", lambda f: f["trajectories"], "{:,.0f}"),
    ("right, %", lambda f: 100 * f["correct"], "{:.1f}"),
    ("coverage, %", lambda f: 100 * f["coverage"], "{:.1f}"),
    ("distinct, %", lambda f: 100 * f["distinct"], "{:.1f}"),
    ("answers", lambda f: f["answers"], "{:.2f}"),
    ("distance", lambda f: f["distance"], "{:.3f}"),
    ("pairs", lambda f: f["pairs"], "{:,.0f}"),
    ("of siblings", lambda f: f["sibling_pairs"], "{:,.0f}"),
    ("greedy, %", lambda f: 100 * f["greedy"], "{:.1f}"),
    ("T = 1, %", lambda f: 100 * f["sampled"], "{:.1f}"),
]


def run_all(options: argparse.Namespace, common: list[str]) -> dict[str, list[Path]]:
    """Run directories of the warm-up and of each strategy, one a seed."""
    found: dict[str, list[Path]] = {"SFT": []}
    common = [*common, "--config.iterations=1"]
    # What was run with other flags lies elsewhere.
    out = options.out / hashlib.sha256(" ".join(sorted(common)).encode()).hexdigest()[:8]
    for seed in options.seeds:
        warm, seeded = out / f"sft-{seed}", [*common, f"--config.seed={seed}"]
        # `checkpoints` lets the warm-up keep what that strategy needs; the others do not look at it.
        _run([*seeded, "--config.method=sft", "--config.explore.strategy=checkpoints"], warm)
        found["SFT"].append(warm)
        for name in options.strategies:
            folder = out / f"{name}-{options.budget_tokens}-{seed}"
            if not folder.exists():
                partial = folder.with_name(folder.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                for part in SHARED:
                    shutil.copytree(warm / part, partial / part)
                partial.rename(folder)
            explore = [f"strategy={name}", f"budget_tokens={options.budget_tokens}"]
            _run([*seeded, *(f"--config.explore.{part}" for part in explore)], folder)
            found.setdefault(name, []).append(folder)
    return found


def _run(arguments: list[str], folder: Path) -> None:
    from mdpo_jax import train

    if (folder / "results.json").exists():
        return
    code = train.main([*arguments, f"--config.workdir={folder}"])
    if code:
        raise SystemExit(f"{folder}: the run ended with code {code}")


def figures(folder: Path, split: str) -> dict[str, Any]:
    """Of one run: its rollout's, its pairs', and its last policy's accuracy."""
    from mdpo_jax.pipeline.files import DONE, RESULTS, read_json

    rows = read_json(folder / RESULTS)["rows"]
    last = max(row["iteration"] for row in rows)
    out = {
        row["decoding"]: row["accuracy"]
        for row in rows
        if row["split"] == split and row["iteration"] == last
    }
    if last:
        done = {
            name: read_json(folder / "iteration-1" / name / DONE) for name in ("rollout", "pairs")
        }
        out |= done["rollout"]["exploration"] | done["pairs"]
        out |= {name: done["rollout"][name] for name in ("trajectories", "correct")}
    return out


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| | " + " | ".join(name for name, _, _ in COLUMNS) + " |"]
    lines.append("|---" * (1 + len(COLUMNS)) + "|")
    for name, seeds in found.items():
        cells = [name]
        for _, value, form in COLUMNS:
            try:
                values = [value(seed) for seed in seeds]
            except KeyError:  # SFT samples nothing
                cells.append("")
                continue
            ends = f"{form.format(min(values))}, {form.format(max(values))}"
            cells.append(f"{form.format(np.median(values))} ({ends})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Run, measure, print."""
    from mdpo_jax.exploration import Strategy

    names = typing.get_args(Strategy)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/explore"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", choices=names, default=list(names))
    parser.add_argument("--budget-tokens", type=int, default=256)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    options, common = parser.parse_known_args()
    if options.budget_tokens < 1:
        parser.error(f"--budget-tokens {options.budget_tokens}: expected at least 1")
    runs = run_all(options, common)
    found = {n: [figures(f, options.split) for f in folders] for n, folders in runs.items()}
    (options.out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
