"""`--config=gemma7b --smoke`: the paper's recipe through every stage, here with still fewer steps."""

import json

from mdpo_jax import train
from mdpo_jax.recipes import load_recipe, smoke


def test_smoke_keeps_the_recipes_settings():
    recipe, small = load_recipe("gemma7b"), smoke(load_recipe("gemma7b"))
    assert small.train.eta == recipe.train.eta
    assert small.reference == recipe.reference == "updated"
    assert small.pairs.per_problem == recipe.pairs.per_problem
    assert small.rollout.max_turns == recipe.rollout.max_turns == 6
    assert small.rollout.samples == recipe.rollout.samples == 20
    assert small.rollout.previous_samples == recipe.rollout.previous_samples == 10
    assert small.model.dtype == recipe.model.dtype == "bfloat16"
    assert small.model.remat == recipe.model.remat
    assert small.iterations == recipe.iterations == 3


def test_every_stage_of_the_papers_recipe_runs(tmp_path):
    few = [
        "--config.sft.steps=3", "--config.sft.demonstrations=60", "--config.iterations=1",
        "--config.problems.per_iteration=2", "--config.problems.dev=2", "--config.problems.test=2",
        "--config.rollout.samples=2", "--config.rollout.previous_samples=1",
        "--config.mesh.fsdp=1", "--config.evaluate.pass_samples=2",
    ]  # fmt: skip
    assert train.main(["--config=gemma7b", "--smoke", *few, f"--config.workdir={tmp_path}"]) == 0
    stages = ("rollout", "pairs", "reference", "train", "train-dev", "train-test")
    done = [tmp_path / "sft" / "done.json"]
    done += [tmp_path / "iteration-1" / stage / "done.json" for stage in stages]
    assert all(path.is_file() for path in done)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["name"] == "gemma7b-smoke"
    assert (tmp_path / "export" / "model.safetensors").exists()
    assert (tmp_path / "report" / "index.html").exists()
