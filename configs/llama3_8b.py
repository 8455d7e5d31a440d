"""Llama-3-8B-Instruct with the paper's settings for Mistral-7B and Gemma-2 (arXiv 2409.02392).

Result    none yet; the paper has no Llama 3
Hardware  by count of bytes: 16 a parameter (float32 weights, gradient, two moments) x 8.03 B
          = 128 GB over the mesh, and 2 a parameter (16 GB) for the sampler's copy, beside
          activations and caches; not planned yet: tools/plan.py --config=llama3_8b
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
