"""`python -m mdpo_jax.export --checkpoint RUN [--iteration T] --out DIR`: a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdpo_jax.doors import guarded, interrupts_held


def main(arguments: Sequence[str]) -> int:
    """Export a run's chosen iteration, or another, and print where it lies."""
    parser = argparse.ArgumentParser(prog="python -m mdpo_jax.export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="run directory")
    parser.add_argument("--iteration", type=int, help="0 for SFT; default: the chosen one")
    parser.add_argument("--out", required=True, type=Path, help="folder that does not exist yet")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--merge-lora", action="store_true", help="the default of a LoRA run")
    form.add_argument("--peft", action="store_true", help="a LoRA run's adapter as a PEFT folder")
    options = parser.parse_args(arguments)
    return guarded(lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    from mdpo_jax.config import ConfigError

    with interrupts_held():
        from mdpo_jax.pipeline import files, loop

    config = files.read_config(options.checkpoint)
    results = options.checkpoint / "results.json"
    iteration = options.iteration
    if iteration is None:
        if not results.exists():
            raise ConfigError(
                f"--checkpoint={options.checkpoint}: has no results.json, so no iteration is "
                "chosen yet; expected a finished run, or --iteration"
            )
        iteration = files.read_json(results)["chosen_iteration"]
    if options.merge_lora and not config.lora.rank:
        raise ConfigError(
            "--merge-lora: config.lora.rank=0, every weight was trained; leave it out"
        )
    folder = loop.export(config, iteration, options.out, options.peft)
    print(f"iteration {iteration} -> {folder}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
