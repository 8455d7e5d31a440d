"""Llama-3-8B-Instruct with the paper's settings for Mistral-7B and Gemma-2 (arXiv 2409.02392).

Result    none yet; the paper has no Llama 3
Hardware  by the plan (docs/scaling.md), full fine-tuning: TPU v5e-16 (13.3 of 15.75 GiB a chip; there
          with rollout.tensor=4, for the sampler's copy of the weights is 16 GB)
Time      predicted, not measured: 4.3 s a step of 32 pairs on v5e-16, if every sequence had 2,048
          tokens; sampling is not in it
Command   python -m mdpo_jax.train --config=llama3_8b --config.sft.path=DEMONSTRATIONS.jsonl \
              --config.sft.steps=STEPS --config.problems.path=PROMPTS.jsonl

The hub's `meta-llama/Meta-Llama-3-8B-Instruct` is gated: ask for access there, then `hf auth login`.
Without demonstrations (`sft.steps=0`, the default) iterations start from it as it is, and only what
it writes as ```python blocks is run.  Learning rates are the paper's for other models, untuned.
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
        name="llama3_8b",
        model=replace(
            gemma.model,
            path="meta-llama/Meta-Llama-3-8B-Instruct",
            family="llama",
            chat="llama3",
        ),
        train=replace(gemma.train, learning_rate=2e-7),
    )
