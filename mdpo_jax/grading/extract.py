r"""The final answer in a text: the last box, boxes that belong together, or GSM8K's mark.

A gold is one answer, or several of which each is accepted, joined by `ALTERNATIVE`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from mdpo_jax.grading.normalise import clean, exact_number

ALTERNATIVE = " [or] "  # no LaTeX; "1 or 2" in a gold is a list, of which both are asked for
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{)?")
_GSM8K = re.compile(r"####\s*(.+)")
_WORD = r"(?:\s|\$|\\[()\[\],;! ]|\\q?quad|[.,;]|(?<![a-zA-Z])(?:and|or|respectively)(?![a-zA-Z]))"
_TEXT = rf"\\(?:text|mbox|mathrm)\s*\{{{_WORD}*\}}"
_NAME = r"[a-zA-Z](?:_\{?\w+\}?)?(?:\([a-zA-Z]\))?\s*=\s*"
_CONNECTOR = re.compile(rf"(?:{_WORD}|{_TEXT})+(?:{_NAME})?(?:{_WORD})*|")
_LONGEST_GAP = 80
_GAP = re.compile(r"\\phantom\s*\{[^{}]*\}")  # a box to fill in, drawn in the solution
_ACCEPTED = re.compile(r"also (?:be )?(?:an? )?accept|acceptable answer|is a correct answer")
_LEFT_SIDE = re.compile(r"([a-zA-Z]\w*)\s*=\s*$")
# The paper's reading of a text without a box (its official code, ToRA's): a sentence, then a number.
_SENTENCE = re.compile(r"(?i)(?:final answer|answer) is:?\s*(.+)")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


class Box(NamedTuple):
    """A closed box: where it begins and ends, and what is in it."""

    start: int
    end: int
    content: str


def extract_boxed(text: str) -> str | None:
    """Content of the last box; None if there is none or it is open."""
    found = list(_BOX.finditer(text))
    box = _box(text, found[-1]) if found else None
    return None if box is None else box.content


def extract_answer(text: str, lenient: bool = False) -> str | None:
    """The answer of a solution: its last box, with those that only "and", "or", commas part from it.

    lenient: the paper's fallbacks as well: "the answer is ...", `####`, the last number.
    """
    joined: list[Box] = []
    for match in reversed(list(_BOX.finditer(text))):
        box = _box(text, match)
        if box is None or (joined and not _connected(text[box.end : joined[0].start], box, joined)):
            break
        joined.insert(0, box)
    if joined:
        return ", ".join(_distinct([b.content for b in joined]))
    return _fallback(text) if lenient else None


def extract_gold(solution: str) -> str | None:
    r"""The gold of a MATH solution; None without a box.

    Most repeat one answer or end with it.  Boxes are one list where words part them, where lines of
    one display do, where they give the same unknown, or where they are angles; they are alternatives
    where the solution says that another answer is accepted too.
    """
    every = [_box(solution, match) for match in _BOX.finditer(solution)]
    found = [b for b in every if b is not None and not _GAP.fullmatch(b.content)]
    different = _distinct([b.content for b in found])
    if len(different) < 2:
        return different[-1] if different else None
    if _ACCEPTED.search(solution, found[0].end):
        return ALTERNATIVE.join(different)
    if _one_list(solution, found):
        return ", ".join(different)
    return extract_answer(solution)


def extract_gsm8k(text: str) -> str | None:
    """The gold of a GSM8K solution: what follows `####`, thousands commas removed."""
    match = _GSM8K.search(text)
    return match.group(1).strip().replace(",", "") if match else None


def extract_display(text: str) -> str | None:
    """The answer of a text that holds a box, or is one formula in dollars; None for other texts."""
    if _BOX.search(text):
        return extract_answer(text)
    match = re.fullmatch(r"\s*(\$\$?)([^$]+)\1\s*", text)
    return match.group(2).strip() if match else None


def _box(text: str, match: re.Match[str]) -> Box | None:
    if match.group(1) is None:  # \boxed 5
        bare = text[match.end() :].split("$")[0].split("\n")[0]
        return Box(match.start(), match.end() + len(bare), bare.strip()) if bare.strip() else None
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, match.end()):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return Box(match.start(), brace.end(), text[match.end() : brace.start()].strip())
    return None


def _connected(gap: str, box: Box, later: Sequence[Box]) -> bool:
    return (
        box.end <= later[0].start  # not around it
        and len(gap) <= _LONGEST_GAP  # the pattern takes quadratic time
        and _CONNECTOR.fullmatch(gap) is not None
    )


def _fallback(text: str) -> str | None:
    mark = extract_gsm8k(text)
    if mark is not None:
        return mark
    sentences = _SENTENCE.findall(text)
    if sentences:
        return sentences[-1].strip().rstrip(".").strip("$ ") or None
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _distinct(answers: Sequence[str]) -> list[str]:
    """Each answer once, in its last form, at its first place."""
    found: dict[object, str] = {}
    for answer in answers:
        bare = re.sub(r"_\{?\d+\}?$", "", clean(answer))
        # "x+11" and "11+x": a solution that boxes a formula twice orders it anew.
        signed = bare if bare.startswith(("+", "-")) else f"+{bare}"
        letters = "".join(sorted(signed)) if re.search(r"[a-z]", bare) else bare
        number = exact_number(bare)
        found[letters if number is None else number] = answer
    return list(found.values())


def _one_list(text: str, found: Sequence[Box]) -> bool:
    between = [text[a.end : b.start] for a, b in itertools.pairwise(found)]
    if all(_CONNECTOR.fullmatch(gap) for gap in between):
        return True
    if all(re.fullmatch(r"[.,;]?\s*\\\\[^\\]*&=(?:(?!\\\\).)*=\s*", gap) for gap in between):
        return True
    unknowns = {m and m.group(1) for m in (_LEFT_SIDE.search(text[: b.start]) for b in found)}
    if len(unknowns) == 1 and None not in unknowns:
        return True
    return all("^\\circ" in b.content.replace("{\\circ}", "\\circ") for b in found)
