"""A rollout stage on an HTTP server that goes away in the middle, and comes back."""

import contextlib

import numpy as np
import pytest
from serving import Serving, other_params
from support import write_model

from mdpo_jax.data import store
from mdpo_jax.model.policy import load_policy
from mdpo_jax.model.transformer import unembedding
from mdpo_jax.pipeline import rollouts, stages
from mdpo_jax.pipeline.context import PARAMS, Context
from mdpo_jax.pipeline.files import stage
from mdpo_jax.recipes import parse
from mdpo_jax.rollout.servers import ServersGone


def rolled_out(run, server, *more):
    """The trajectories of a rollout stage of this run."""
    small = [
        "rollout.backend=http", "rollout.server_kind=sglang", f"rollout.servers={server.url}",
        "rollout.slots=2", "rollout.turn_tokens=8", "rollout.trajectory_tokens=12",
        "rollout.context=224", "rollout.chunk_problems=2", "problems.per_iteration=4",
        "problems.dev=2", "problems.test=2", "iterations=1", "mesh.fsdp=1", "tool.sandbox=limits",
        f"model.path={run.parent / 'model'}", *more,
    ]  # fmt: skip
    config = parse(["--config=tiny", *(f"--config.{field}" for field in small)])
    with contextlib.closing(Context(config, run)) as context:
        stage(run / "problems", lambda f: stages.prepare_problems(context, f))
        start = run / "sft" / PARAMS
        if not start.exists():
            params, base = context.parameters.first()
            context.parameters.save(start, params, base)
        folder = run / "iteration-1" / "rollout"
        stage(folder, lambda f: rollouts.rollout(context, f, 1, [(start, 2)], lambda *_: None))
        return [store.graded_from(row).trajectory for row in store.read_folder(folder)]


def test_a_rollout_goes_on_when_its_server_is_back(tmp_path):
    write_model(tmp_path / "model")
    server = Serving("sglang", weights=other_params(), max_model_len=225)
    whole = rolled_out(tmp_path / "whole", server)
    assert len(whole) == 8
    np.testing.assert_array_equal(  # what it serves now is what the run exported
        unembedding(server.weights), unembedding(load_policy(tmp_path / "model").params)
    )
    server.dies_at = len(server.turns) + 7  # in the second chunk; the first request is the probe
    with pytest.raises(ServersGone, match=f"{server.url} .Conn"):
        rolled_out(tmp_path / "cut", server, "rollout.retries=0")
    folder = tmp_path / "cut" / "iteration-1" / "rollout"
    assert [p.name for p in folder.iterdir()] == ["000-000000.jsonl.gz"]
    server.dies_at = None
    server.come_back()
    again = rolled_out(tmp_path / "cut", server)  # other retries are no other run
    server.die()
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)
