"""Gemma-1.1-it-2B with LoRA on one chip: M-DPO on GSM8K where a notebook gives a TPU or a GPU.

Result    none yet, and the paper has no 2B model
Hardware  by the plan (docs/scaling.md): one TPU v5e chip, 8.0 of 15.75 GiB in the step; while
          sampling 5.0 GB of weights and 0.02 GiB a slot
Time      predicted, not measured: 4.2 s a step of 16 pairs, if every sequence had 1,024 tokens;
          sampling is not in it
Command   python -m mdpo_jax.train --config=gemma2b_colab --config.problems.path=GSM8K_TRAIN.jsonl \
              --config.problems.test_path=GSM8K_TEST.jsonl

The hub's `google/gemma-1.1-2b-it` is gated: accept its licence there, then `hf auth login`.  A short
warm-up on GSM8K's own calculations, run by the tool, teaches the format.  Against the paper, all of
it untuned: LoRA, whose learning rate is 50 times that of full fine-tuning; N = 8 as 6 + 2; 4 turns of
256 tokens; 500 problems an iteration; batches of 16 pairs.
`--smoke` runs every stage on CPU with a stand-in model and problems.
"""

from mdpo_jax.config import SFT, Config, Lora, Mesh, Model, Pairs, Problems, Rollout, Tool, Train


def get_config() -> Config:
    """The recipe."""
    return Config(
        name="gemma2b_colab",
        iterations=2,
        model=Model(
            path="google/gemma-1.1-2b-it", dtype="bfloat16", param_dtype="bfloat16", remat="full"
        ),
        problems=Problems(path="gsm8k_train.jsonl", per_iteration=500, dev=200, test=500),
        sft=SFT(steps=100, batch=16, learning_rate=1e-4, warmup_steps=10),
        rollout=Rollout(
            samples=6,
            previous_samples=2,
            max_turns=4,
            turn_tokens=256,
            trajectory_tokens=768,
            context=1024,
            slots=32,
            decode_dtype="bfloat16",
        ),
        tool=Tool(timeout=20.0),
        pairs=Pairs(per_problem=1, max_tokens=1024),
        train=Train(
            eta=0.1,
            learning_rate=2e-5,
            batch_pairs=16,
            warmup_steps=5,
            rows=2,
            row_length=1024,
            logprob_chunk=512,
        ),
        lora=Lora(rank=16, alpha=32.0),
        mesh=Mesh(fsdp=0),
    )
