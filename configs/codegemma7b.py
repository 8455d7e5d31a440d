"""CodeGemma-1.1-it-7B with the paper's settings (arXiv 2409.02392, sections 3.1 and 3.3).

Result    GSM8K / MATH 77.3 / 46.4 (SFT) -> 81.5 / 50.1 (M-DPO, 3 iterations), 81.6 / 49.6 (M-KTO):
          the paper's figures (table 1), not yet reproduced with this code
Hardware  Gemma-7B's, whose shape it has (docs/scaling.md): full fine-tuning on TPU v5e-16 (14.5 of
          15.75 GiB a chip; there with rollout.tensor=4 and rollout.slots=16 of each process) or
          v5p-8 (over 40 GiB to spare)
Time      predicted, not measured: 4.9 s a step of 32 pairs on v5e-16, 8.4 s on v5p-8, if every
          sequence had 2,048 tokens; sampling is not in it
Command   python -m mdpo_jax.train --config=codegemma7b --config.model.path=SFT_FOLDER \
              --config.problems.path=PROMPTS.jsonl --config.problems.test_path=TEST.jsonl

`model.path` is the SFT start, a Hugging Face folder.  To make it from the hub's gated
`google/codegemma-1.1-7b-it` (accept its licence there, then `hf auth login`): that as `model.path`,
`--config.sft.path=DEMONSTRATIONS.jsonl` and `--config.sft.steps=` 3 epochs over `sft.batch`.  The
paper gives one learning rate for Gemma-1.1, which is taken for CodeGemma-1.1 too.
`--smoke` runs every stage on CPU with a stand-in model and problems.
"""

import dataclasses

from mdpo_jax.config import Config
from mdpo_jax.recipes import load_recipe


def get_config() -> Config:
    """The recipe: Gemma-1.1's settings."""
    gemma = load_recipe("gemma7b")
    model = dataclasses.replace(gemma.model, path="codegemma-1.1-7b-it-sft")
    return dataclasses.replace(gemma, name="codegemma7b", model=model)
