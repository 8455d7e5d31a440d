"""Gemma-2-it-9B with the paper's settings (arXiv 2409.02392, sections 3.1 and 3.3).

Result    GSM8K / MATH 84.1 / 51.0 (SFT) -> 86.3 / 54.5 (M-DPO, 3 iterations), 86.1 / 54.5 (M-KTO):
          the paper's figures (table 1), not yet reproduced with this code
Hardware  by the plan (docs/scaling.md), full fine-tuning: TPU v5e-16 (15.2 of 15.75 GiB a chip; there
          with rollout.tensor=4 and rollout.slots=16 of each process) or v5p-8 (over 35 GiB to spare)
Time      predicted, not measured: 5.3 s a step of 32 pairs on v5e-16, 9.1 s on v5p-8, if every
          sequence had 2,048 tokens; sampling is not in it
Command   python -m mdpo_jax.train --config=gemma2_9b --config.model.path=SFT_FOLDER \
              --config.problems.path=PROMPTS.jsonl --config.problems.test_path=TEST.jsonl

`model.path` is the SFT start, a Hugging Face folder.  To make it from the hub's gated
`google/gemma-2-9b-it` (accept its licence there, then `hf auth login`): that as `model.path`,
`--config.sft.path=DEMONSTRATIONS.jsonl` and `--config.sft.steps=` 3 epochs over `sft.batch`.
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
        name="gemma2_9b",
        model=replace(gemma.model, path="gemma-2-9b-it-sft", family="gemma2"),
        train=replace(gemma.train, learning_rate=2e-7, row_length=2304),
    )
