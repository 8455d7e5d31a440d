"""`python -m mdpo_jax.report --checkpoint RUN`: the static report of a finished run, or evaluation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdpo_jax.doors import guarded, interrupts_held


def main(arguments: Sequence[str]) -> int:
    """Write RUN/report/index.html anew and print where it lies."""
    parser = argparse.ArgumentParser(prog="python -m mdpo_jax.report", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="directory of a run or of an evaluation"
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: _report(options.checkpoint))


def _report(directory: Path) -> None:
    with interrupts_held():
        from mdpo_jax.pipeline import files, summary

    evaluated = (directory / "evaluation.json").exists()
    config = None if evaluated else files.read_config(directory)
    if not (directory / "results.json").exists():
        raise ValueError(f"--checkpoint={directory}: has no results.json; expected a finished run")
    print(summary.write_report(config) if config else summary.write_evaluation(directory))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
