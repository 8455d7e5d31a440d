"""Qwen2.5-Math-7B-Instruct, which uses Python by itself, with the paper's loop (arXiv 2409.02392).

Result    none yet; the paper has no Qwen
Hardware  by the plan (docs/scaling.md), full fine-tuning: TPU v5e-16 (12.5 of 15.75 GiB a chip; there
          with rollout.tensor=2 or 4, for the sampler's copy of the weights is 15 GB)
Time      predicted, not measured: 4.0 s a step of 32 pairs on v5e-16, if every sequence had 2,048
          tokens; sampling is not in it
Command   python -m mdpo_jax.train --config=qwen2_5_math_7b --config.problems.path=PROMPTS.jsonl \
              --config.problems.test_path=TEST.jsonl

The hub's `Qwen/Qwen2.5-Math-7B-Instruct` is open (Apache 2.0) and needs no warm-up: the system prompt
asks for its tool-integrated mode.  Qwen itself writes tool output into the same turn; here it is a
user turn, as the paper has it.  Learning rate: the paper's for Mistral-7B and Gemma-2, untuned.
`--smoke` runs every stage on CPU with a stand-in model and problems.
"""

import dataclasses

from mdpo_jax.config import Config
from mdpo_jax.recipes import load_recipe


def get_config() -> Config:
    """The recipe: what differs from Gemma-1.1's settings."""
    gemma, replace = load_recipe("gemma7b"), dataclasses.replace
    return replace(
        gemma,
        name="qwen2_5_math_7b",
        model=replace(
            gemma.model,
            path="Qwen/Qwen2.5-Math-7B-Instruct",
            family="qwen2",
            chat="chatml",
            system="Please integrate natural language reasoning with programs to solve the problem "
            "above, and put your final answer within \\boxed{}.",
        ),
        train=replace(gemma.train, learning_rate=2e-7),
    )
