"""`python -m mdpo_jax.grade --cases FILE.jsonl --policy strict --out OUT.jsonl`: grade answers.

Each row has `gold`, `pred` and `form`: `answer` (a bare answer), `text` (free text that holds one, on
both sides) or `solution` (a policy's final text; strict takes its last box and nothing else).  It is
returned with `verdict` (correct, wrong, unknown), `rule`, `answer` and `seconds`.  Bad rows go to
OUT.jsonl.quarantine and are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mdpo_jax.doors import guarded, interrupts_held, row_files


def main(arguments: Sequence[str]) -> int:
    """Grade the file and print how many verdicts there are of each kind."""
    parser = argparse.ArgumentParser(prog="python -m mdpo_jax.grade", description=__doc__)
    parser.add_argument("--cases", required=True, type=Path, help="JSON lines, plain or .gz")
    parser.add_argument("--policy", choices=("strict", "lenient"), default="strict")
    parser.add_argument("--out", required=True, type=Path, help="replaced if it is there")
    parser.add_argument("--threads", type=int, default=2, help="rows graded at a time")
    parser.add_argument(
        "--timeout", type=float, default=2.0, help="seconds a pair may take a worker"
    )
    options = parser.parse_args(arguments)
    return guarded(lambda: _grade(options), then="nothing is written; begin again")


def _grade(options: argparse.Namespace) -> None:
    with interrupts_held():
        from mdpo_jax.grading.cases import grade_file
        from mdpo_jax.grading.verdict import Grader

    row_files(options, "cases", positive=("threads", "timeout"))
    with Grader(options.timeout, policy=options.policy, workers=options.threads) as grader:
        counts = grade_file(grader, options.cases, options.out, options.threads)
    print(f"{options.out}: {', '.join(f'{n} {label}' for label, n in sorted(counts.items()))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
