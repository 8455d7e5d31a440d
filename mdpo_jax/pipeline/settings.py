"""A recipe's settings as what the trainer takes; the plan compiles the step from the same."""

from __future__ import annotations

from mdpo_jax.config import Config
from mdpo_jax.model.kernels import sees_prefixes
from mdpo_jax.model.lora import Lora
from mdpo_jax.training.losses import Forward
from mdpo_jax.training.state import Optimiser


def forward(config: Config, platform: str) -> Forward:
    """How the model is run.  platform: of the devices, as `jax.default_backend()` names it."""
    m, t = config.model, config.train
    shared = t.shared_prompts == "auto" and sees_prefixes(m.attention, platform)
    return Forward(m.dtype, m.remat, t.logprob_chunk, m.attention, shared)


def optimiser(config: Config, *, sft: bool = False) -> Optimiser:
    """The preference step's, or the warm-up's."""
    t = config.train
    part = config.sft if sft else t
    return Optimiser(
        beta2=part.beta2, weight_decay=part.weight_decay, clip=t.clip, name=t.optimiser,
        ema=0.0 if sft else t.ema,
    )  # fmt: skip


def adapter(config: Config) -> Lora | None:
    """Rank, alpha and targets of a LoRA run; None where every weight is trained."""
    c = config.lora
    return Lora(c.rank, c.alpha, c.targets) if c.rank else None


def slots(config: Config) -> int:
    """Sequences for which a micro-batch has a place: all of any step's batch."""
    return max(2 * config.train.batch_pairs, config.sft.batch, config.raft.batch)
