"""Gemma-3-it-4B (its text half) with the paper's settings for Gemma-2 (arXiv 2409.02392).

Result    none yet; the paper has no Gemma 3
Hardware  by the plan (docs/scaling.md), full fine-tuning: TPU v5e-8 (14.1 of 15.75 GiB a chip)
Time      predicted, not measured: 4.4 s a step of 32 pairs on v5e-8, if every sequence had 2,048
          tokens; sampling is not in it
Command   python -m mdpo_jax.train --config=gemma3_4b --config.sft.path=DEMONSTRATIONS.jsonl \
              --config.sft.steps=STEPS --config.problems.path=PROMPTS.jsonl

The hub's `google/gemma-3-4b-it` is gated: accept its licence there, then `hf auth login`.  Without
demonstrations (`sft.steps=0`, the default) iterations start from it as it is, and only what it
writes as ```python blocks is run.  Learning rates are the paper's for other models, untuned.
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
        name="gemma3_4b",
        model=replace(gemma.model, path="google/gemma-3-4b-it", family="gemma3"),
        train=replace(gemma.train, learning_rate=2e-7),
    )
