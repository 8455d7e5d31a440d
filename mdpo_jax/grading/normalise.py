"""Cheap comparison of answers: strings and exact numbers; nothing is ever evaluated."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_FRACTION = re.compile(r"([+-]?)\\?[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")
_RATIO = re.compile(r"([+-]?\d+)/(\d+)")
_COMMAS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
# A gap, LaTeX's own kinds too, before a digit or a command, but not that in "1\,000".
_MIXED = re.compile(r"\d(?:\s|\\[,;:> ]|\\q?quad|\\text\{\s*\})+(?!\d{3}(?![\d/.]))[\d\\]")
_LONGEST_NUMBER = 400  # digits; longer ones go to the worker, which can be killed


def clean(answer: str) -> str:
    """Without what LaTeX adds and means nothing: spacing, sizes, dollars, a final full stop."""
    text = answer.strip().strip("$").strip()
    for old, new in (
        ("\\left", ""), ("\\right", ""), ("\\!", ""), ("\\,", ""), ("\\;", ""), ("\\ ", ""),
        ("\\$", ""), ("dfrac", "frac"), ("tfrac", "frac"), ("\\%", "%"), ("^\\circ", ""),
        ("^{\\circ}", ""), ("{,}", ","),
    ):  # fmt: skip
        text = text.replace(old, new)
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+", "", text).rstrip(".")


def exact_number(answer: str) -> Fraction | None:
    """The rational number that an answer plainly is, or None."""
    text = clean(answer)
    if len(text) > _LONGEST_NUMBER or is_mixed(answer):
        return None
    if _COMMAS.fullmatch(text):
        text = text.replace(",", "")
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    match = _FRACTION.fullmatch(text)
    if match and int(match.group(3)):
        value = Fraction(int(match.group(2)), int(match.group(3)))
        return -value if match.group(1) == "-" else value
    match = _RATIO.fullmatch(text)
    if match and int(match.group(2)):
        return Fraction(int(match.group(1)), int(match.group(2)))
    return None


def is_mixed(answer: str) -> bool:
    r"""Whether a space parts two numbers: "1\,1/2" is a mixed number or two answers, not 11/2."""
    return _MIXED.search(answer) is not None


def brackets(answer: str) -> str | None:
    """`()`, `[]`, `{}` or a mixture if the answer is one list in brackets, else None."""
    text = clean(answer).replace("\\{", "{").replace("\\}", "}")
    if len(text) > 2 and text[0] in "([{" and text[-1] in ")]}" and "," in text:
        return text[0] + text[-1]
    return None
