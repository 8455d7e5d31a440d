"""The shape of an answer, read off its text: how many things it gives, in which brackets."""

from __future__ import annotations

import re

from mdpo_jax.grading.normalise import clean, exact_number

_JOINT = re.compile(
    r"\\(?:text|mathrm|mbox|textbf)\s*\{[\s,]*(?:and|or)[\s,]*\}"
    r"|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
)
_RELATION = re.compile(r"[<>\u2264\u2265]|\\(?:l|g)(?:e|t|eq|eqslant)(?![a-zA-Z])")
_NAMES = re.compile(
    r"^(?:[A-Za-z]|\(\s*(?:[A-Za-z]\s*,\s*)+[A-Za-z]\s*\))\s*(?:=|\\in)\s*(?=[{(\[])"
)
_BASE = re.compile(r"\d_(?:\{(\d+)\}|(\d))$")
_DEPTH = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def brackets(answer: str) -> str | None:
    """`()`, `[]`, `{}` or a mixture if the answer is one list in brackets, else None."""
    text = clean(answer).replace("\\{", "{").replace("\\}", "}")
    if len(text) > 2 and text[0] in "([{" and text[-1] in ")]}" and "," in text:
        return text[0] + text[-1] if _closes_at_end(text) else None
    return None


def count(answer: str) -> int | None:
    r"""How many values an answer gives: `1/3, 1/4` and `12 or 13` two, `(1,2)` and `\pm 1` two.

    One that is repeated counts once; None for relations, whose solutions may be written otherwise.
    """
    if _RELATION.search(answer):
        return None
    if exact_number(answer) is not None:
        return 1
    text = _JOINT.sub(",", answer).replace("\\{", "{").replace("\\}", "}")
    text = re.sub(r"\\(?:begin|end)\{[^}]*\}", lambda m: "([" if "begin" in m[0] else "])", text)
    text = clean(_NAMES.sub("", clean(text)))
    wrapped = len(text) > 2 and text[0] in "([{" and text[-1] in ")]}" and _closes_at_end(text)
    parts = _parts(text[1:-1] if wrapped else text)
    if not wrapped or text[0] == "{":
        parts = list(dict.fromkeys(parts))
    return sum(2 if "\\pm" in part else 1 for part in parts) or 1


def base(answer: str) -> str | None:
    """The base of a numeral such as `664_7`, else None."""
    match = _BASE.search(clean(answer))
    return (match.group(1) or match.group(2)) if match else None


def _parts(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += _DEPTH.get(letter, 0)
        if letter in ",;" and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part for part in [*parts, text[start:]] if part]


def _closes_at_end(text: str) -> bool:
    depth = 0
    for index, letter in enumerate(text):
        depth += _DEPTH.get(letter, 0)
        if depth == 0:
            return index == len(text) - 1
    return False
