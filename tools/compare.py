"""Several methods on the same seeds, from the same warm-up: a table with intervals.

    python tools/compare.py --out runs/table --config=tiny --seeds 0 1 2 \
        --run method=mdpo --run method=mkto --run method=raft

Each --run is what differs: `--config.FIELD=VALUE` overrides, several in one quoted argument; --config
and --config.FIELD=VALUE given outside are common to all.  The warm-up of a seed is made once, by a run
of `method=sft`, and its folders are copied into the others (every stage is a function of files, so
the result is that of a run from scratch).  A finished run is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

SHARED = ("problems", "start", "sft", "sft-dev", "sft-test")
# Overrides that leave the shared folders as they are.
AFTER_SFT = ("method=", "train.", "raft.", "term_c.", "pairs.")
IN_SFT = (
    "method=sft", "train.rows", "train.row_length", "train.clip", "train.logprob_chunk",
    "train.batch_pairs", "raft.batch",
)  # fmt: skip


def run_all(options: argparse.Namespace, common: list[str]) -> dict[str, list[Path]]:
    """Run directories of each --run, one a seed."""
    found: dict[str, list[Path]] = {}
    for seed in options.seeds:
        warm = options.out / f"sft-{seed}"
        _run([*common, f"--config.seed={seed}", "--config.method=sft"], warm)
        for text in options.run:
            folder = options.out / f"{text.replace(' ', ',').replace('/', '_')}-{seed}"
            if not folder.exists():
                partial = folder.with_name(folder.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                for name in SHARED:
                    if (warm / name).exists():
                        shutil.copytree(warm / name, partial / name)
                partial.rename(folder)
            overrides = [f"--config.{part}" for part in text.split()]
            _run([*common, f"--config.seed={seed}", *overrides], folder)
            found.setdefault(text, []).append(folder)
    return found


def _run(arguments: list[str], folder: Path) -> None:
    from mdpo_jax import train

    if (folder / "results.json").exists():
        return
    code = train.main([*arguments, f"--config.workdir={folder}"])
    if code:
        raise SystemExit(f"{folder}: the run ended with code {code}")


def _last(folder: Path) -> int:
    from mdpo_jax.pipeline.files import read_config

    return read_config(folder).last_iteration


def accuracies(folder: Path, decoding: str) -> np.ndarray:
    """[problems] 0/1 on test of a run's last iteration."""
    from mdpo_jax.pipeline.evaluation import correct

    return correct(folder / f"iteration-{_last(folder)}" / "train-test", "test", decoding)


def distance(first: Path, second: Path) -> float:
    """KL of the first run's last policy from the second's, nats a trajectory, on its test samples
    that fit train.row_length."""
    from mdpo_jax.data import store
    from mdpo_jax.pipeline.context import PARAMS, Context
    from mdpo_jax.pipeline.evaluation import kl_estimate
    from mdpo_jax.pipeline.files import read_config

    samples = first / f"iteration-{_last(first)}" / "train-test" / "test-sampled.jsonl.gz"
    found = [store.graded_from(row).trajectory for row in store.read_lines(samples)]
    with contextlib.closing(Context(read_config(second), second)) as context:
        params = context.load(second / f"iteration-{_last(second)}" / "train" / PARAMS)
        return kl_estimate(context, found, params)["kl"]


def table(runs: dict[str, list[Path]], seeds: list[int]) -> list[dict[str, Any]]:
    """Rows of figures, the first run being what the others are compared with."""
    from mdpo_jax.reporting.metrics import paired_interval

    base = next(iter(runs.values()))
    rows = []
    for name, folders in runs.items():
        row: dict[str, Any] = {"run": name}
        for decoding in ("greedy", "sampled"):
            values = [accuracies(folder, decoding) for folder in folders]
            row[decoding] = [float(v.mean()) for v in values]
            if folders is not base:
                row[f"{decoding}_minus_first"] = [
                    paired_interval(v, accuracies(b, decoding), seed=seed)._asdict()
                    for v, b, seed in zip(values, base, seeds, strict=True)
                ]
        if folders is not base:
            pairs = list(zip(folders, base, strict=True))
            row["kl_from_first"] = [distance(a, b) for a, b in pairs]
            row["kl_of_first"] = [distance(b, a) for a, b in pairs]
        rows.append(row)
    return rows


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run", action="append", required=True)
    options, common = parser.parse_known_args()
    for part in (part for text in options.run for part in text.split()):
        if not part.startswith(AFTER_SFT) or part.startswith(IN_SFT):
            parser.error(f"--run {part!r}: changes the warm-up, or is it; give it outside of --run")
    rows = table(run_all(options, common), options.seeds)
    (options.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        figures = [
            f"{d} {100 * np.mean(row[d]):.1f} ({', '.join(f'{100 * v:.1f}' for v in row[d])})"
            for d in ("greedy", "sampled")
        ]
        print(f"{row['run']:40s} {'  '.join(figures)}")
        for name in ("greedy_minus_first", "sampled_minus_first"):
            for entry in row.get(name, ()):
                low, high = 100 * entry["low"], 100 * entry["high"]
                print(f"    {name} {100 * entry['difference']:+.1f} [{low:+.1f}, {high:+.1f}]")
        for name in ("kl_from_first", "kl_of_first"):
            if name in row:
                print(f"    {name} {', '.join(f'{v:.3f}' for v in row[name])} nats")


if __name__ == "__main__":
    main()
