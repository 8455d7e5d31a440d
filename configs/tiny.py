"""The whole loop on two CPU cores, in minutes and without a download.

Result    README, "What it gives"
Hardware  2 CPU cores, 3 GiB of memory
Command   python -m mdpo_jax.train --config=tiny

A fresh 0.15 M-parameter Gemma learns chain problems with a Python tool from demonstrations that do
most steps "in the head", which so small a model cannot; three iterations of M-DPO teach it to use
the tool.

Deviations from the paper, all because the model is tiny and its trajectories are short: eta 1
(paper: 0.1; at about 30 action tokens a trajectory the log-ratios would otherwise run to 9 nats and
wear down the copying of numbers), learning rate 2e-4 (1/15 of SFT's),
4 pairs a problem (paper: 1), N = 8 as 6 + 2 (paper: 20 + 10), 4 turns of 64 tokens (paper: 6 of
512), trajectories without a tool call are kept as rejected (they are the habit to unlearn), batches
of 16 pairs (32) after a warm-up of 5 steps (40), beta2 0.98, the cosine ends at a tenth of its peak.
SFT counts tool output with weight 0.25 (else numbers are copied badly) and decays weights by 0.01.
RAFT takes 8 right trajectories a problem (paper: 1) at twice M-DPO's learning rate, 90 steps at most.
"""

from mdpo_jax.config import (
    SFT,
    Config,
    Evaluate,
    Model,
    Pairs,
    Problems,
    Raft,
    Rollout,
    Tool,
    Train,
)


def get_config() -> Config:
    """The recipe."""
    return Config(
        name="tiny",
        iterations=3,
        model=Model(remat="full"),
        problems=Problems(per_iteration=512, dev=256, test=1024),
        sft=SFT(
            steps=700,
            easy_steps=250,
            skill_steps=250,
            demonstrations=6000,
            batch=32,
            learning_rate=4e-3,
            warmup_steps=40,
            final_lr_fraction=0.05,
            beta2=0.98,
            weight_decay=0.01,
            observation_weight=0.25,
            previous_fraction=0.9,
        ),
        rollout=Rollout(
            samples=6,
            previous_samples=2,
            max_turns=4,
            turn_tokens=64,
            trajectory_tokens=128,
            observation_tokens=48,
            context=192,
            slots=256,
            chunk_problems=128,
        ),
        tool=Tool(timeout=5.0, memory_mb=512, preload=("math",), cache=True),
        pairs=Pairs(per_problem=4, max_tokens=160, require_tool=False),
        train=Train(
            eta=1.0,
            learning_rate=2e-4,
            batch_pairs=16,
            warmup_steps=5,
            final_lr_fraction=0.1,
            beta2=0.98,
            rows=10,
            row_length=160,
            layout="fixed",
            save_every=0,
        ),
        raft=Raft(per_problem=8, learning_rate=4e-4, epochs=1, batch=32, max_steps=90),
        evaluate=Evaluate(pass_samples=8, pass_problems=128),
    )
