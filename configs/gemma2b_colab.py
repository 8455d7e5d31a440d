"""Gemma-1.1-it-2B with LoRA on one chip: M-DPO on GSM8K where a notebook gives a TPU or a GPU.

Result    none yet, and the paper has no 2B model
Hardware  one TPU v5e or v6e chip, or a GPU of 16 GB; by count of bytes: the base in bfloat16, 2 a
          parameter x 2.51 B = 5.0 GB, the sampler's merged copy 5.0 GB again, adapters of rank 16
          in float32 with gradient and two moments 16 x 19.6 M = 0.3 GB, beside activations and
          caches; no plan has been run
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
