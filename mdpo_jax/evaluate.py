"""Accuracy of a policy, with its whole harness.

    python -m mdpo_jax.evaluate --config=NAME [--config.FIELD=VALUE ...]
        [--checkpoint RUN|FOLDER|org/name] [--iteration T] [--data FILE,...] [--mode tool|cot]
        [--samples N] [--temperature T] [--policy strict|lenient] [--problems N] [--out DIR]
        [--versus DIR]

    python -m mdpo_jax.evaluate --checkpoint RUN [--iteration T] [--split dev|test]

The first evaluates any policy on problem files, or without --data on the recipe's own problems. A
run's own configuration is the base where the checkpoint is one; --config is not needed then. The
second is one iteration of a run as the run itself evaluates it. Both go on where they were killed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdpo_jax.doors import guarded, interrupts_held

_OURS = ("data", "mode", "samples", "temperature", "policy", "problems", "out", "versus")


def main(arguments: Sequence[str]) -> int:
    """Evaluate, print the tables; what is finished is read and not repeated."""
    config = [a for a in arguments if a.startswith(("--config=", "--config.")) or a == "--smoke"]
    options = _parser().parse_args([a for a in arguments if a not in config])
    if options.checkpoint and not config and all(getattr(options, n) is None for n in _OURS):
        return guarded(lambda: _again(options))
    return guarded(lambda: _evaluate(options, config))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mdpo_jax.evaluate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--checkpoint", help="run, step of one, model folder or hub id; else config.model.path")
    add("--iteration", type=int, help="of a run; 0: SFT; else the chosen one (second form: else 0)")
    add("--split", default="test", help="of the recipe's own problems: test (default) or dev")
    add("--data", help="problem files, comma-separated: GSM8K, MATH or own rows")
    add("--mode", help="tool (default: turns with the interpreter) or cot (one turn, no tool)")
    add("--samples", type=int, help="a problem, beside the greedy one: pass@k and maj@k (0)")
    add("--temperature", type=float, help="of the samples (1.0)")
    add("--policy", help="the grader's: strict (default) or lenient")
    add("--problems", type=int, help="so many of each suite, spread evenly over it (0: all)")
    add("--out", type=Path, help="folder of this evaluation (evaluations/POLICY-SUITES-MODE)")
    add("--versus", type=Path, help="folder of another evaluation, to compare by problem")
    return parser


def _again(options: argparse.Namespace) -> None:
    with interrupts_held():
        from rich.console import Console

        from mdpo_jax.config import ConfigError
        from mdpo_jax.pipeline import exporting, files, loop
        from mdpo_jax.reporting.console import results_table

    if options.split not in ("dev", "test"):
        raise ConfigError(f"--split={options.split}: expected one of dev, test")
    if not exporting.is_run(Path(options.checkpoint)):
        raise ConfigError(
            f"--checkpoint={options.checkpoint}: not a run directory; expected one, or --config=NAME "
            "with a model's folder"
        )
    config = files.read_config(Path(options.checkpoint))
    rows = loop.evaluate_again(config, options.iteration or 0, options.split)
    Console().print(results_table(rows))


def _evaluate(options: argparse.Namespace, config: Sequence[str]) -> None:
    with interrupts_held():
        from rich.console import Console

        from mdpo_jax.pipeline import evaluating, files, harness
        from mdpo_jax.reporting.console import sheet_table
        from mdpo_jax.reporting.sheets import sheets

    given = {name: value for name, value in vars(options).items() if value is not None}
    if "data" in given:
        given["data"] = tuple(part for part in given["data"].split(",") if part)
    out = evaluating.evaluate(harness.Asked(config=tuple(config), **given))
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    for sheet in sheets(files.read_json(out / files.RESULTS)):
        console.print(sheet_table(sheet), "")
    print(f"{out / files.RESULTS}\n{out / 'report' / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
