"""`python -m mdpo_jax.execute --trajectories FILE.jsonl --out OUT.jsonl`: run recorded code again.

Each row is a recorded trajectory in ToRA's form (`idx`, `code`) or MathCoder's (`id`, `segments`).
It is returned as {"id", "blocks": [{"code", "recorded", "output", "status", "seconds"}]}.  Bad rows
go to OUT.jsonl.quarantine and are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mdpo_jax.doors import guarded, interrupts_held, row_files


def main(arguments: Sequence[str]) -> int:
    """Run the file and print how its blocks ended and how many agree with their recordings."""
    parser = argparse.ArgumentParser(prog="python -m mdpo_jax.execute", description=__doc__)
    parser.add_argument("--trajectories", required=True, type=Path, help="JSON lines, plain or .gz")
    parser.add_argument("--out", required=True, type=Path, help="replaced if it is there")
    parser.add_argument("--batch", type=int, default=64, help="trajectories run at one time")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds a block may take")
    parser.add_argument(
        "--sandbox", choices=("none", "limits", "hardened", "required"), default="hardened",
        help="what confines a process; `required` stops where the machine cannot harden",
    )  # fmt: skip
    parser.add_argument(
        "--semantics", choices=("live", "replay", "last_only"), default="live",
        help="what a block sees of those before it: a live process, their replay, or nothing",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    return guarded(lambda: _execute(options), then="nothing is written; begin again")


def _execute(options: argparse.Namespace) -> None:
    with interrupts_held():
        from mdpo_jax.data.reruns import rerun_file
        from mdpo_jax.environment.interpreter import PythonInterpreter

    row_files(options, "trajectories", positive=("batch", "timeout"))
    with PythonInterpreter(
        timeout=options.timeout, sandbox=options.sandbox, semantics=options.semantics
    ) as tool:
        counts = rerun_file(tool, options.trajectories, options.out, options.batch)
    print(f"{options.out}: {_summary(counts)}")


def _summary(counts: Counter[str]) -> str:
    statuses = {k.removeprefix("status "): n for k, n in counts.items() if k.startswith("status ")}
    lines = [
        f"{counts['rows']} rows, {counts['quarantined']} quarantined, {sum(statuses.values())} blocks",
        f"status: {', '.join(f'{n} {status}' for status, n in sorted(statuses.items()))}",
    ]
    values = counts["value equal"] + counts["value different"]
    errors = counts["error equal"] + counts["error same line"] + counts["error different"]
    for name, part, whole in (
        ("as recorded", counts["value equal"] + counts["error equal"], values + errors),
        ("values as recorded", counts["value equal"], values),
        ("errors with the same last line", errors - counts["error different"], errors),
    ):
        share = f"{100 * part / whole:.2f} %" if whole else "none"
        lines.append(f"{name}: {share} ({part} of {whole})")
    return "\n  ".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
