"""Mistral-7B-v0.3 (pretrained) with the paper's settings (arXiv 2409.02392, sections 3.1 and 3.3).

Result    GSM8K / MATH 77.8 / 42.7 (SFT) -> 82.3 / 47.5 (M-DPO, 3 iterations), 81.7 / 46.7 (M-KTO):
          the paper's figures (table 1), not yet reproduced with this code
Hardware  by the plan (docs/scaling.md), full fine-tuning: TPU v5e-16 (12.3 of 15.75 GiB a chip; there
          with rollout.tensor=4, which leaves room for 86 slots of a process), v5p-8 (about 50 GiB to
          spare), or one H200 with train.rows=2 and train.row_length=2048 (136.9 of 140)
Time      predicted, not measured: 4.1 s a step of 32 pairs on v5e-16, 7.0 s on v5p-8, if every
          sequence had 2,048 tokens; sampling is not in it
Command   python -m mdpo_jax.train --config=mistral7b --config.model.path=SFT_FOLDER \
              --config.problems.path=PROMPTS.jsonl --config.problems.test_path=TEST.jsonl

`model.path` is the SFT start, a Hugging Face folder.  To make it from the hub's
`mistralai/Mistral-7B-v0.3` (which may ask to log in: `hf auth login`): that as `model.path`,
`--config.sft.path=DEMONSTRATIONS.jsonl` and `--config.sft.steps=` 2 epochs over `sft.batch`; after
half of them comes the policy that iteration 1 mixes in.  The pretrained model is taught the paper's
[INST] format; a padding token, which the paper adds, is not needed here.
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
        name="mistral7b",
        model=replace(gemma.model, path="mistral-7b-v0.3-sft", family="mistral", chat="mistral"),
        sft=replace(gemma.sft, learning_rate=1e-5, previous_fraction=0.5),
        train=replace(gemma.train, learning_rate=2e-7),
        raft=replace(gemma.raft, learning_rate=1e-6, epochs=1),
    )
