"""`python -m mdpo_jax.export --checkpoint RUN|STEP|MODEL --out DIR`: a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdpo_jax.doors import guarded, interrupts_held


def main(arguments: Sequence[str]) -> int:
    """Export a run's chosen iteration, another, or a model as it is, and print where it lies."""
    parser = argparse.ArgumentParser(prog="python -m mdpo_jax.export", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="run directory, folder of parameters in one, model folder, or org/name[@revision]",
    )
    parser.add_argument("--iteration", type=int, help="0 for SFT; default: the chosen one")
    parser.add_argument("--out", required=True, type=Path, help="folder that does not exist yet")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32; default: as stored")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--merge-lora", dest="form", action="store_const", const="merged",
        help="the default of a LoRA run",
    )  # fmt: skip
    form.add_argument(
        "--peft", dest="form", action="store_const", const="peft",
        help="a LoRA run's adapter as a PEFT folder",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    return guarded(lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    with interrupts_held():
        from mdpo_jax.pipeline import exporting

    what = exporting.export(
        options.checkpoint, options.out, options.iteration, options.dtype, options.form
    )
    print(f"{what} -> {options.out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
