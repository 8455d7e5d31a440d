"""A recipe's settings as what the trainer takes; the plan compiles the step from the same."""

from __future__ import annotations

from mdpo_jax.checks import require
from mdpo_jax.config import Config
from mdpo_jax.model.attention import BACKENDS
from mdpo_jax.model.kernels import PLATFORMS, sees_prefixes
from mdpo_jax.model.lora import Lora
from mdpo_jax.training.losses import Forward, Objective
from mdpo_jax.training.state import Optimiser
from mdpo_jax.training.value import ValueTerm


def forward(config: Config, platform: str) -> Forward:
    """How the model is run.  platform: of the devices, as `jax.default_backend()` names it.

    ConfigError for attention by a kernel of another platform.
    """
    m, t = config.model, config.train
    usable = ["auto", *(b for b in BACKENDS if PLATFORMS.get(b, platform) == platform)]
    accepted = f"{', '.join(usable)} on {platform} devices"
    require(m.attention in usable, "model.attention", m.attention, accepted)
    shared = t.shared_prompts == "auto" and sees_prefixes(m.attention, platform)
    return Forward(
        m.dtype, m.remat, t.logprob_chunk, m.attention, shared, unrolled(m.remat, platform)
    )  # fmt: skip


def unrolled(remat: str, platform: str) -> bool:
    """Whether few layers follow each other without a scan.

    A CPU copies what a scan gathers; with remat, XLA would keep what is to be computed again.
    """
    return platform == "cpu" and remat == "none"


def objective(config: Config) -> Objective:
    """What the configured method's steps minimise."""
    t, c = config.train, config.term_c
    if config.preset.objective == "likelihood":
        return Objective("likelihood", observation_ce_weight=t.observation_ce_weight)
    head = ValueTerm(c.utility, c.weight, c.learning_rate_scale) if c.kind == "value" else None
    kind = "unpaired" if config.preset.objective == "unpaired" else "pairs"
    return Objective(
        kind,
        eta=t.eta,
        nll_weight=config.nll_weight,
        loss=t.loss,
        label_smoothing=t.label_smoothing,
        length_normalised=t.length_normalised,
        lambda_correct=t.lambda_correct,
        lambda_wrong=t.lambda_wrong,
        kl=t.kl,
        observation_ce_weight=t.observation_ce_weight,
        value=head,
        turns=config.rollout.max_turns,
    )


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
