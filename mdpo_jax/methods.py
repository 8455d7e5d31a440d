"""The rows of the paper's tables by name: which objective, on which tokens, against which reference."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

MethodName = Literal["sft", "raft", "dpo", "kto", "mdpo", "mdpo_fixed_ref", "mkto", "mdpo_nll"]


@dataclasses.dataclass(frozen=True)
class Method:
    """What a name fixes; `config.Train` holds the numbers.

    objective: what an iteration minimises; `none` has no iterations.  observations: tool output
    counts in the loss (single-turn: everything after the prompt is one action).  reference: the
    policy at the start of the iteration, or the SFT policy.  nll_weight: of the NLL term on chosen.
    """

    objective: Literal["none", "likelihood", "pairs", "unpaired"]
    observations: bool = False
    reference: Literal["updated", "fixed"] = "updated"
    nll_weight: float = 0.0


# arXiv 2409.02392: Table 1, but `mdpo_nll`: Table 5.
METHODS: dict[str, Method] = {
    "sft": Method("none"),
    "raft": Method("likelihood"),
    "dpo": Method("pairs", observations=True),
    "kto": Method("unpaired", observations=True),
    "mdpo": Method("pairs"),
    "mdpo_fixed_ref": Method("pairs", reference="fixed"),
    "mkto": Method("unpaired"),
    "mdpo_nll": Method("pairs", nll_weight=1.0),
}

# Options of config.Train that only one kind of objective reads, and what they are when left alone.
_OWN = {
    "pairs": {"loss": "sigmoid", "label_smoothing": 0.0, "length_normalised": False},
    "unpaired": {"lambda_correct": 1.0, "lambda_wrong": 1.0, "kl": "mismatched"},
}


def inconsistency(name: str, train: Any, term_c: Any, sft_steps: int) -> str | None:
    """Why a method cannot go with these options, or None; train, term_c: sections of the config.

    A name means one row: what has a name of its own is refused under another, and so is what the
    method would silently ignore.
    """
    method = METHODS[name]
    if method.objective == "none" and sft_steps == 0:
        return "trains nothing with sft.steps=0; expected sft.steps above 0"
    if name == "mdpo_nll" and train.nll_weight == 0:
        return "train.nll_weight=0; expected above 0, or method=mdpo"
    if name in ("mdpo", "mdpo_fixed_ref") and train.nll_weight:
        return f"train.nll_weight={train.nll_weight}; expected none, or method=mdpo_nll"
    if name == "mdpo_fixed_ref" and train.reference not in ("preset", "fixed"):
        return f"train.reference={train.reference}; expected fixed, or method=mdpo"
    if name == "mdpo" and train.reference == "fixed":
        return "train.reference=fixed; expected updated or mixture, or method=mdpo_fixed_ref"
    if method.objective == "unpaired" and train.nll_weight:
        return f"train.nll_weight={train.nll_weight}; expected none, for no side is chosen"
    if term_c.kind != "none" and (method.objective != "pairs" or method.observations):
        return (
            f"term_c.kind={term_c.kind} corrects M-DPO; expected none, or method=mdpo, "
            "mdpo_fixed_ref or mdpo_nll"
        )
    if term_c.kind == "monte_carlo" and train.reference == "mixture":
        return (
            "term_c.kind=monte_carlo samples one policy; expected train.reference=updated or fixed"
        )
    if train.reference_log_probs == "in_step" and train.reference == "mixture":
        return "train.reference_log_probs=in_step holds one policy; expected stored with a mixture"
    for kind in (k for k in _OWN if k != method.objective):
        for field, default in _OWN[kind].items():
            value = getattr(train, field)
            if value != default:
                return f"train.{field}={value} is of {kind} objectives only; expected {default}"
    return None
