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

# Fields of config.Train -> what they are when left alone, and the objectives that read them.
_PAIRS, _REFERENCE = ("pairs",), ("pairs", "unpaired")
_READ_BY: dict[str, tuple[Any, tuple[str, ...]]] = {
    "loss": ("sigmoid", _PAIRS),
    "label_smoothing": (0.0, _PAIRS),
    "length_normalised": (False, _PAIRS),
    "nll_weight": (None, _PAIRS),
    "lambda_correct": (1.0, ("unpaired",)),
    "lambda_wrong": (1.0, ("unpaired",)),
    "kl": ("mismatched", ("unpaired",)),
    "turn_discount": (None, _REFERENCE),
    "reference": ("preset", _REFERENCE),
    "reference_log_probs": ("stored", _REFERENCE),
    "observation_ce_weight": (0.0, ("pairs", "unpaired", "likelihood")),
}


def inconsistency(name: str, train: Any, term_c: Any) -> str | None:
    """Why a method cannot go with these sections of the config, or None.

    A name means one row: what has a name of its own is refused under another, and so is what the
    method would silently ignore.
    """
    method = METHODS[name]
    if name == "mdpo_nll" and train.nll_weight == 0:
        return "train.nll_weight=0; expected above 0, or method=mdpo"
    if name in ("mdpo", "mdpo_fixed_ref") and train.nll_weight:
        return f"train.nll_weight={train.nll_weight}; expected none, or method=mdpo_nll"
    if name == "mdpo_fixed_ref" and train.reference not in ("preset", "fixed"):
        return f"train.reference={train.reference}; expected fixed, or method=mdpo"
    if name == "mdpo" and train.reference == "fixed":
        return "train.reference=fixed; expected updated or mixture, or method=mdpo_fixed_ref"
    if method.observations and train.mask != "sampled":
        return f"train.mask={train.mask} chooses nothing where everything counts; expected sampled"
    return _ignored(method, train) or _reference(train) or _term_c(method, train, term_c)


def _ignored(method: Method, train: Any) -> str | None:
    for field, (default, readers) in _READ_BY.items():
        value = getattr(train, field)
        if method.objective not in readers and value != default:
            names = ", ".join(n for n, m in METHODS.items() if m.objective in readers)
            return f"train.{field}={value} is read by {names} only; expected {default}".replace(
                "None", "none"
            )
    return None


def _reference(train: Any) -> str | None:
    if train.reference != "mixture" and train.mixture != 0.5:
        return f"train.mixture={train.mixture} needs train.reference=mixture; expected 0.5"
    if train.reference == "mixture" and train.reference_log_probs == "in_step":
        return "train.reference_log_probs=in_step holds one policy; expected stored with a mixture"
    return None


def _term_c(method: Method, train: Any, term_c: Any) -> str | None:
    """Equation 13 is of sums over sampled tokens, and of a likelihood."""
    if term_c.kind == "none":
        return None
    if method.objective != "pairs" or method.observations:
        names = ", ".join(n for n in METHODS if n.startswith("mdpo"))
        return f"term_c.kind={term_c.kind} corrects M-DPO; expected none, or one of {names}"
    if term_c.kind == "monte_carlo" and train.reference == "mixture":
        return "term_c.kind=monte_carlo samples one policy; expected no mixture as train.reference"
    for field, accepted in (
        ("mask", ("sampled",)),
        ("length_normalised", (False,)),
        ("turn_discount", (None,)),
        ("loss", ("sigmoid", "robust")),
    ):
        value = getattr(train, field)
        if value not in accepted:
            wanted = " or ".join(str(a).lower() for a in accepted)
            return f"term_c.kind={term_c.kind} with train.{field}={value}; expected {wanted}"
    return None
