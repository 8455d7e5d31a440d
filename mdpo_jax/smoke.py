"""`--smoke`: any recipe from warm-up to export on a CPU, in about a minute and without a download.

The policy becomes a random one of the recipe's family, two layers of 48, with a tokenizer that spells
the family's special tokens; the problems become the synthetic suite's with 0, 1 or 2 for an answer, so
that what has learnt no more than the form is right now and then, and there are pairs.  What is the
recipe's own stays: chat format and system prompt, method and objective, tool, rules for pairs,
optimiser and its settings, samples a problem, turns, types, remat, adapter and mesh.  What comes out
is no measure of anything.
"""

from __future__ import annotations

import dataclasses

from mdpo_jax.config import Config

SUFFIX = "-smoke"
NOTE = (
    "smoke run: a stand-in model and stand-in problems; that every stage runs is all it shows, "
    "its figures mean nothing"
)


def is_smoke(config: Config) -> bool:
    """Whether a configuration came from `smoke`."""
    return config.name.endswith(SUFFIX)


def smoke(config: Config) -> Config:
    """The recipe, made small; its run directory is runs/NAME-smoke-METHOD-SEED."""
    replace, train = dataclasses.replace, config.train
    shape = {"path": None, "vocab_size": 448, "hidden_size": 48, "num_layers": 2, "num_heads": 4}
    shape |= {"num_kv_heads": 2, "head_dim": 16, "intermediate_size": 96}
    files = {"path": None, "dev_path": None, "test_path": None}
    suite = {"steps": (1.0,), "largest_start": 99, "largest_value": 2, "mental_scale": 0.0}
    # About 120 trajectories an iteration, whatever the samples of a problem.
    samples = config.rollout.samples + config.rollout.previous_samples
    counts = {"per_iteration": max(4, 120 // samples), "dev": 4, "test": 4}
    warm_up = {"path": None, "steps": 100, "easy_steps": 0, "skill_steps": 0, "batch": 8}
    warm_up |= {"demonstrations": 200, "learning_rate": 6e-3, "warmup_steps": 5, "beta2": 0.98}
    warm_up |= {"observation_weight": 0.25, "final_lr_fraction": 0.05}
    tokens = {"turn_tokens": 32, "trajectory_tokens": 96, "observation_tokens": 32, "context": 256}
    return replace(
        config,
        name=f"{config.name}{SUFFIX}",
        workdir="",
        iterations=min(2, config.iterations),
        model=replace(config.model, **shape),
        problems=replace(config.problems, **files, **suite, **counts, noise=0.0),
        sft=replace(config.sft, **warm_up),
        rollout=replace(config.rollout, **tokens, slots=8, chunk_problems=8),
        train=replace(train, batch_pairs=2, rows=4, row_length=256, max_steps=2),
        raft=replace(config.raft, batch=8, max_steps=2),
        evaluate=replace(config.evaluate, pass_samples=2, pass_problems=2),
    )
