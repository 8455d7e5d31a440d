"""`python -m mdpo_jax.evaluate --checkpoint RUN [--iteration T] [--split test]`: accuracy again.

Evaluates an iteration of a run on one of its splits with the run's own settings, tool and grader.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdpo_jax.doors import guarded, interrupts_held


def main(arguments: Sequence[str]) -> int:
    """Evaluate, print the table; finished evaluations are read and not repeated."""
    parser = argparse.ArgumentParser(prog="python -m mdpo_jax.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="run directory")
    parser.add_argument("--iteration", type=int, default=0, help="0 is the SFT policy")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    options = parser.parse_args(arguments)
    return guarded(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    with interrupts_held():
        from rich.console import Console

        from mdpo_jax.pipeline import files, loop
        from mdpo_jax.reporting.console import results_table

    config = files.read_config(options.checkpoint)
    rows = loop.evaluate_again(config, options.iteration, options.split)
    Console().print(results_table(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
