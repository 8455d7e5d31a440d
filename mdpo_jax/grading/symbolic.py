r"""Inside a worker: one pair of answers, by value where they have one, then by math-verify.

Imported by the fork server alone.  math-verify's own time limits are off: they need SIGALRM and the
main thread; the worker is killed instead.

    two numbers       compared at 40 digits; simplification is never asked
    two formulas      compared at points; where they differ they are not equal
    anything else     math-verify: sets, intervals, matrices, relations, words
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import math_verify
import sympy

from mdpo_jax.grading.normalise import agree_rounded

logging.getLogger("math_verify").setLevel(logging.ERROR)  # "timeout is disabled": on purpose
_ROUNDING = {"strict": 12, "lenient": 4}  # its default of 6 takes 1.414214 for the root of 2
_DIGITS = 40
_EQUAL = sympy.Float("1e-30", _DIGITS)
_FLOAT = sympy.Float("1e-14", _DIGITS)
_MORE_DIGITS = 400  # 100! and 100!+1 agree in the first 150
_ZERO = sympy.Float("1e-200", _DIGITS)
_NOISE = sympy.Float("1e-60", _DIGITS)  # what may remain of an exact zero
_PLACES = (sympy.Rational(13, 17), sympy.Rational(29, 23), sympy.Rational(211, 61))
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?")


def serve(argument: Any) -> Callable[[dict[str, str]], dict[str, str]]:
    """A handler of {"gold", "answer", "form", "policy"}; answers {"label", "rule"}.

    form: `answer` for bare answers, `text` for texts that math-verify is to look through.
    """
    del argument
    return handle


def handle(request: dict[str, str]) -> dict[str, str]:
    """The verdict on one pair; what sympy raises is a verdict too."""
    try:
        gold, answer = (parse(request[key], request["form"]) for key in ("gold", "answer"))
        label, rule = _compare(gold, answer, request)
    except MemoryError:
        label, rule = "unknown", "memory"
    except Exception as error:
        # any expression may break sympy in any way; the verdict says so
        label, rule = "unknown", f"math_verify_{type(error).__name__}"
    return {"label": label, "rule": rule}


def parse(text: str, form: str) -> list:
    """What math-verify reads: an expression and its text, the text alone, or nothing."""
    if form == "answer":
        if _TRIGONOMETRIC.search(text):  # else sin(30^\circ) would be the sine of 30 radians
            text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
        text = f"\\boxed{{{text}}}"
    return math_verify.parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _compare(gold: list, answer: list, request: dict[str, str]) -> tuple[str, str]:
    if not gold:
        return "unknown", "unparsable_gold"
    if not answer:
        return "wrong", "unparsable_answer"
    if isinstance(gold[0], sympy.Expr) and isinstance(answer[0], sympy.Expr):
        verdict = _by_value(gold[0], answer[0], request)
        if verdict is not None:
            return verdict
    if type(gold[0]) is type(answer[0]) and str(gold[0]) == str(answer[0]):
        return "correct", "same_form"  # simplification of two equal sums may take seconds
    rounding = _ROUNDING[request["policy"]]
    same = math_verify.verify(gold, answer, float_rounding=rounding, timeout_seconds=None)
    if not same and isinstance(gold[0], str):
        return "unknown", "unparsable_gold"
    return "correct" if same else "wrong", "math_verify"


def _by_value(gold: Any, answer: Any, request: dict[str, str]) -> tuple[str, str] | None:
    """Numbers are settled by value, formulas refuted by it; None where it says nothing."""
    if gold.is_Symbol or answer.is_Symbol:  # words too: math-verify compares their letters
        return None
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if {str(s) for s in symbols} == {"i"}:  # math-verify leaves it a symbol
        gold, answer = (e.subs(dict.fromkeys(symbols, sympy.I)) for e in (gold, answer))
        symbols = []
    if not symbols:
        same = _same_value(gold, answer)
        if same is False and request["policy"] == "lenient" and _rounded(gold, answer, request):
            return "correct", "approximate"
        return None if same is None else ("correct" if same else "wrong", "value")
    # Positive, for letters in answers mostly are: sqrt(x^2) and x shall not be told apart here.
    for place in _PLACES:
        point = {s: place + i for i, s in enumerate(symbols)}
        if _same_value(gold.subs(point), answer.subs(point)) is False:
            return "wrong", "value_at_a_point"
    return ("correct", "expanded") if (gold - answer).expand() == 0 else None


def _same_value(gold: Any, answer: Any) -> bool | None:
    """Whether two numbers agree; None if one is no finite number that can be had."""
    parts = []
    for value in (gold, answer):
        found = sympy.N(value, _DIGITS)
        pair = sympy.re(found), sympy.im(found)
        if not all(p.is_Float or p.is_Rational for p in pair):
            return None
        parts.append(pair)
    sizes = [max(abs(p) for p in pair) for pair in parts]
    if min(sizes) <= _NOISE:
        return False if max(sizes) > _NOISE else None
    floats = gold.has(sympy.Float) or answer.has(sympy.Float)
    apart, size = max(abs(p - q) for p, q in zip(*parts, strict=True)), max(sizes)
    if floats or apart > _EQUAL * size:
        return bool(apart <= _FLOAT * size) if floats else False
    rest = abs((gold - answer).evalf(20, maxn=_MORE_DIGITS))
    return bool(rest <= _ZERO * size) if rest.is_number and rest.is_finite else None


def _rounded(gold: Any, answer: Any, request: dict[str, str]) -> bool:
    values = [sympy.N(value, _DIGITS) for value in (gold, answer)]
    if not all(v.is_Float for v in values):
        return False
    a, b = (Fraction(str(v)) for v in values)
    return agree_rounded(a, b, request["gold"], request["answer"])


# What answers are made of: the parser learns its grammar as it goes, and forked children keep that.
_USUAL = (
    (r"\frac{1}{2}+\sqrt{3}\pi", r"0.5+\sqrt[3]{2}"),
    (r"x^2+\sin(x)", r"\sin x+x^{2}"),
    (
        r"\begin{pmatrix}1 & -2\\3 & x\end{pmatrix}",
        r"\begin{bmatrix}1 & 3\\3 & \frac{1}{2}\end{bmatrix}",
    ),
    ("(1,2]", r"[1,2)\cup(3,\infty)"),
    ("x=1", "1, 2"),
    (r"\text{neither}", r"\text{even}"),
    (r"\{x, 2\}", r"\sqrt{y}"),
    ("(3, -4)", r"\left(\frac{1}{3}, 2\sqrt{5}\right)"),
    (r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}", r"\binom{n}{k}+n!"),
    (r"-3 \le x < 5", r"x \in (-3, 5]"),
    (r"3x^2 - 2xy + (y-1)^{-2}", r"(3x-1)(x+2)\cdot y"),
    (r"\log_2 8 + e^{i\pi} - |a|", r"\ln(5) - 2i + \cos\theta"),
    (r"1 \pm \sqrt{19}", r"\frac{-5+\sqrt{13}}{6}, \frac{-5-\sqrt{13}}{6}"),
    (r"f(x) = 2x+1", r"90^\circ"),
)


def _warm() -> None:
    """Build parsers and caches once, before the fork, for all workers to share."""
    for gold, answer in _USUAL:
        handle({"gold": gold, "answer": answer, "form": "answer", "policy": "strict"})
    for gold, answer in _USUAL[:2]:
        handle(
            {"gold": f"${gold}$", "answer": f"is ${answer}$.", "form": "text", "policy": "strict"}
        )


_warm()
