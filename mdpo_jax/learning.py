"""How the preference step learns: the `train` section of the configuration."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mdpo_jax.checks import above_zero, at_least, require, share

OptimiserName = Literal["adamw", "adamw_bf16_moments", "adafactor", "lion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """The preference step.  eta is the KL coefficient (beta of DPO).

    loss, label_smoothing: of pairs (objectives/mdpo.py).  length_normalised: log-ratios as means
    over tokens.  turn_discount: DMPO's gamma, which weighs earlier turns more; none weighs all alike.
    nll_weight: of the NLL term on chosen; none takes the method's.  observation_ce_weight: of the
    likelihood of tool output, as an auxiliary loss.
    lambda_correct, lambda_wrong, kl: of KTO, and where its reference point comes from
    (objectives/mkto.py).
    reference: `updated` is the policy at the start of the iteration, `fixed` the SFT policy,
    `mixture` the token-wise mixture of both with weight `mixture` on the SFT policy; `preset` takes
    the method's.  reference_log_probs: `stored` scores the data once, before training; `in_step`
    holds the reference beside the policy and scores it in each step.
    start: where an iteration's policy starts.  data: pairs of this iteration, or of all so far.
    displacement_alarm: warns once when the mean log-ratio of chosen trajectories is below minus so
    many nats (their own probability falls, while the rejected one's falls faster); 0 never.
    optimiser: of this step and of the warm-up; what each keeps is in training/state.py.  beta2 is
    that of both kinds of adamw.
    ema: decay of an average of the parameters, kept in float32 beside them, which is what the stage
    saves; 0 for none.
    shared_prompts: `auto` has a pair's prompt there once, and both sides go on from it, where they fit
    into one row and the attention kernel can (not on TPU); the loss is the same.
    rows x row_length tokens form a micro-batch; a step takes as many as its pairs need.  rows is
    rounded up to what mesh.data x mesh.fsdp divides; row_length bounds a sequence.
    layout: `fitted` chooses for each stage fewer rows or tokens a row, as its data fill them best (a
    few longer rows may be among the choices, never more memory); `fixed` takes them as they are.
    save_every: steps of a stage, this or the warm-up, after which its whole state is written, so that
    a rerun goes on from there (two such on disk for a moment: adamw takes 12 bytes a parameter
    each); 0 never.
    """

    eta: float = 0.1
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False
    turn_discount: float | None = None
    nll_weight: float | None = None
    observation_ce_weight: float = 0.0
    lambda_correct: float = 1.0
    lambda_wrong: float = 1.0
    kl: Literal["mismatched", "batch_mean", "zero"] = "mismatched"
    mask: Literal["sampled", "template", "paper"] = "sampled"
    reference: Literal["preset", "updated", "fixed", "mixture"] = "preset"
    mixture: float = 0.5
    reference_log_probs: Literal["stored", "in_step"] = "stored"
    displacement_alarm: float = 10.0
    start: Literal["previous", "sft"] = "previous"
    data: Literal["current", "all"] = "current"
    optimiser: OptimiserName = "adamw"
    ema: float = 0.0
    learning_rate: float = 4e-7
    batch_pairs: int = 32
    epochs: int = 1
    max_steps: int = 0
    warmup_steps: int = 40
    final_lr_fraction: float = 0.0
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    shared_prompts: Literal["auto", "never"] = "auto"
    rows: int = 8
    row_length: int = 4096
    logprob_chunk: int = 2048
    layout: Literal["fitted", "fixed"] = "fitted"
    save_every: int = 100

    def __post_init__(self) -> None:
        above_zero("train", self, "eta", "learning_rate", "clip")
        at_least(0, "train", self, "max_steps", "warmup_steps", "weight_decay", "save_every")
        at_least(0, "train", self, "observation_ce_weight", "displacement_alarm")
        above_zero("train", self, "lambda_correct", "lambda_wrong")
        share("train", self, "mixture")
        nll, gamma = self.nll_weight, self.turn_discount
        require(nll is None or nll >= 0, "train.nll_weight", nll, "at least 0, or none")
        right = gamma is None or 0 < gamma <= 1
        require(right, "train.turn_discount", gamma, "above 0 and at most 1, or none")
        self._check_loss()
        at_least(1, "train", self, "batch_pairs", "epochs", "logprob_chunk")
        # Two rows hold any pair whose sides fit a row each.
        at_least(2, "train", self, "rows", "row_length")
        share("train", self, "final_lr_fraction")
        for name in ("beta2", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", value, "from 0 to below 1")

    def _check_loss(self) -> None:
        smoothing, takes = self.label_smoothing, self.loss in ("sigmoid", "robust")
        require(0 <= smoothing < 0.5, "train.label_smoothing", smoothing, "from 0 to below 0.5")
        accepted = f"0 with train.loss={self.loss}, which takes none"
        require(takes or smoothing == 0, "train.label_smoothing", smoothing, accepted)
