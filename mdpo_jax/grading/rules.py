"""What strings and exact numbers settle of a pair of answers, in microseconds, per policy.

`strict` is for rewards: a policy that is trained on it finds every leniency.  `lenient` is for
figures to compare with published ones, whose graders forgive percents, rounding and units.
"""

from __future__ import annotations

import re
from typing import Literal

from mdpo_jax.grading.normalise import (
    agree_as_floats,
    agree_rounded,
    clean,
    exact_number,
    has_magnitude,
    is_long_decimal,
    is_mixed,
    split_percent,
    split_unit,
    units_differ,
)
from mdpo_jax.grading.structure import base, brackets, count
from mdpo_jax.types import Verdict

Policy = Literal["strict", "lenient"]
POLICIES: tuple[Policy, ...] = ("strict", "lenient")
_LONGEST_ANSWER = 1000
_LETTERS = re.compile(r"[A-Z]{2,}")


def settle(gold: str, answer: str, policy: Policy) -> Verdict | None:
    """The verdict if it is cheap to have; None sends the pair to a worker."""
    if not gold.strip():
        return Verdict("unknown", "unparsable_gold", answer)
    if not answer.strip():
        return Verdict("wrong", "no_answer", answer)
    if gold.strip() == answer.strip():
        return Verdict("correct", "exact", answer)
    if len(answer) > _LONGEST_ANSWER:
        return Verdict("wrong", "too_long", answer)
    found = _strict(gold, answer) if policy == "strict" else _lenient(gold, answer)
    return None if found is None else Verdict("correct" if found[0] else "wrong", found[1], answer)


def for_worker(gold: str, answer: str) -> tuple[str, str]:
    """The pair as a worker takes it: without percent marks, which `settle` has compared."""
    return tuple(split_percent(text.strip().rstrip("\\"))[0] for text in (gold, answer))  # pyright: ignore[reportReturnType]


def _strict(gold: str, answer: str) -> tuple[bool, str] | None:
    # GSM8K's golds have no percent signs, so `20\%` is right for 20; but never 0.2, nor 20 for 0.2,
    # nor `0.2\%`: whether that is a share or a percentage nobody can tell.
    (bare_gold, gold_percent), (bare, percent) = split_percent(gold), split_percent(answer)
    (bare_gold, gold_unit), (bare, unit) = split_unit(bare_gold), split_unit(bare)
    a, b = exact_number(bare_gold), exact_number(bare)
    if units_differ(gold_unit, unit):
        return False, "unit"
    if gold_percent != percent and (a is None or abs(a) <= 1):
        return False, "percent"
    if a is not None and b is not None:
        if a != b and is_long_decimal(bare) and agree_as_floats(a, b):
            return True, "float"
        return a == b, "numeric"
    if _normalised(gold, answer):
        return True, "normalised"
    if _LETTERS.fullmatch(clean(gold)) and _LETTERS.fullmatch(clean(answer)):
        return False, "letters"  # an order or a word; math-verify would take a product
    if has_magnitude(gold) != has_magnitude(answer):
        return False, "magnitude"
    if base(gold) != base(answer):
        return False, "base"
    kinds = brackets(gold), brackets(answer)
    if None not in kinds and kinds[0] != kinds[1]:
        return False, "brackets"
    counts = count(gold), count(answer)
    return (False, "count") if None not in counts and counts[0] != counts[1] else None


def _lenient(gold: str, answer: str) -> tuple[bool, str] | None:
    a, b = (exact_number(split_unit(split_percent(text)[0])[0]) for text in (gold, answer))
    if a is not None and b is not None:
        for scaled, rule in ((a, "numeric"), (a * 100, "percent"), (a / 100, "percent")):
            if scaled == b:
                return True, rule
            if agree_rounded(scaled, b, answer, gold):
                return True, "approximate"
        return False, "numeric"
    if _normalised(gold, answer):
        return True, "normalised"
    bases = base(gold), base(answer)
    return (False, "base") if None not in bases and bases[0] != bases[1] else None


def _normalised(gold: str, answer: str) -> bool:
    return clean(gold) == clean(answer) and not is_mixed(gold) and not is_mixed(answer)
