"""The train door in a process of its own, graded so that a model too small to learn makes pairs."""

import sys

from mdpo_jax import train
from mdpo_jax.pipeline import evaluation
from mdpo_jax.types import Verdict


def _by_parity(context, gold, trajectory):
    return Verdict(
        "correct" if (trajectory.ids.sum() + trajectory.sample) % 2 else "wrong", "parity", "0"
    )


if __name__ == "__main__":
    evaluation.verdict = _by_parity
    sys.exit(train.main(sys.argv[1:]))
