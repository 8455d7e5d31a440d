"""One process of a rollout by several: problems, a random policy, and the stage; or of a warm-up."""

import contextlib
import os
import signal
import sys

from mdpo_jax import hosts
from mdpo_jax.data import store
from mdpo_jax.pipeline import rollouts, stages
from mdpo_jax.pipeline.context import PARAMS, Context
from mdpo_jax.pipeline.files import open_run, stage
from mdpo_jax.pipeline.progress import Progress
from mdpo_jax.recipes import parse


def _run(config):
    with open_run(config) as directory, contextlib.closing(Context(config, directory)) as context:
        path, kept = directory / "sft" / PARAMS, context.parameters
        stage(directory / "problems", lambda f: stages.prepare_problems(context, f), alone=True)
        if os.environ.get("STAGE") == "sft":
            stage(directory / "sft", lambda f: stages.sft(context, f, lambda done: None))
            return
        stage(directory / "sft", lambda f: kept.save(path, *kept.first()))
        stage(
            directory / "iteration-1" / "rollout",
            lambda f: rollouts.rollout(context, f, 1, [(path, 2)], lambda *_: None),
        )


def _dies_after_a_chunk(write):
    def write_lines(path, rows):
        write(path, rows)
        if path.parent.name == "rollout":
            os.kill(os.getpid(), signal.SIGKILL)

    return write_lines


def _dies_after_a_save(self, step, state, place, after=Progress.after):
    after(self, step, state, place)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    import jax

    begin = jax.distributed.initialize
    # jax's own 100 seconds are long for a test.
    jax.distributed.initialize = lambda **given: begin(**given, heartbeat_timeout_seconds=5)
    config = parse(sys.argv[1:])
    hosts.connect(config.mesh.hosts)
    if os.environ.get("VICTIM") == str(jax.process_index()):
        store.write_lines = _dies_after_a_chunk(store.write_lines)
        Progress.after = _dies_after_a_save
    _run(config)
