"""What test_exact.py compares, computed by one of two processes: into a file, on some meshes."""

import pickle
import sys
from pathlib import Path

import exact

from mdpo_jax import hosts
from mdpo_jax.model import sharding
from mdpo_jax.training.losses import Forward

FORWARD = Forward(remat="full", logprob_chunk=24, shared_prompts=True)


def _found(shape):
    run = exact.program(exact.CONFIG, FORWARD, exact.OBJECTIVE, sharding.make_mesh(*shape))
    for layout in exact.LAYOUTS:
        batch = exact.arranged(exact.pairs(), layout)
        yield run(exact.params(), batch, exact.params(seed=1))


if __name__ == "__main__":
    hosts.connect(2)
    shapes = [map(int, shape.split("x")) for shape in sys.argv[2:]]
    found = [one for shape in shapes for one in _found(shape)]
    if hosts.first():
        Path(sys.argv[1]).write_bytes(pickle.dumps(found))
