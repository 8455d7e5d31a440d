"""Cheap comparison of answers: strings and exact numbers; nothing is ever evaluated."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_PART = r"(?:\{([+-]?\d+)\}|(\d))"
_FRACTION = re.compile(rf"([+-]?)(\d*)\\frac{_PART}{_PART}")
_RATIO = re.compile(r"([+-]?\d+)/(\d+)")
_MIXED_RATIO = re.compile(r"\s*([+-]?)(\d+)(?:\s|\\[,;:> ])+(\d+)/(\d+)\s*")
_COMMAS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
# A gap, LaTeX's own kinds too, before a digit or a command, but not that in "1\,000".
_MIXED = re.compile(r"\d(?:\s|\\[,;:> ]|\\q?quad|\\text\{\s*\})+(?!\d{3}(?![\d/.]))[\d\\]")
_LIST_COMMA = re.compile(r"\d,(?:\s|\\[,;:> ]|\\q?quad)+\d")
_LONGEST_NUMBER = 400  # digits; longer ones go to the worker, which can be killed
_GROUP = re.compile(r"\{[^{},]*\}")
_UNIT = re.compile(
    r"(.*[\d}])(?:(?:\\[,;: ]|\s)*\\(?:text|mbox|mathrm|textnormal)\s*\{\s*([A-Za-z][A-Za-z./ ]*)\}"
    r"|(?:\s|\\[,;: ])+([A-Za-z]{3,}(?:\s[A-Za-z]+)*)|\{([a-z]{2,})\})(?:\^\{?[23]\}?|[²³])?\.?",
    re.DOTALL,
)
_UNITS = {
    unit: names.split()[0]
    for names in (
        "cm centimeter", "mm millimeter", "m meter", "km kilometer", "in inch inche", "ft foot feet",
        "yard yd", "mile mi", "second sec", "minute min", "hour hr", "day", "week", "month", "year",
        "gram g", "kg kilogram", "pound lb", "ounce oz", "dollar", "cent",
    )
    for unit in names.split()
}  # fmt: skip
_MAGNITUDE = re.compile(r"(?i)\b(?:hundred|thousand|million|billion|trillion|dozen|half)s?\b")
# Words after a number that are no unit.
_NO_UNIT = re.compile(
    r"(?i)\b(?:halves|third|quarter|fifth|squared|cubed|factorial|percent|percentage|pi|sqrt|and|or|"
    r"mod|base|times|less|more|not)"
)
_DOUBLED = re.compile(r"\\\\(left|right|frac|dfrac|tfrac|sqrt)(?![a-zA-Z])")  # escaped twice
_CURRENCY = "€£¥₹"
_WORD_WRAP = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox)\s*\{([^{}]*)\}")
_PERCENT = re.compile(
    r"\s*(?:\\?%|\\?(?:text|mbox|mathrm)?\s*\{?\s*(?:percent(?:age)?|pct)\s*\}?)\s*$"
)
_LONG_DECIMAL = re.compile(r"[+-]?\d*\.\d{10,}")
_DECIMAL = re.compile(r"[+-]?\d*\.(\d+)%?")
_RELATIVE = Fraction(1, 10**4)
_LONG_VALUE = Fraction(1, 10**14)


def clean(answer: str) -> str:
    """Without what LaTeX adds and means nothing: spacing, sizes, dollars, a final full stop."""
    text = _DOUBLED.sub(r"\\\1", answer.strip().strip("$").strip())
    for old, new in (
        ("\\left", ""), ("\\right", ""), ("\\!", ""), ("\\,", ""), ("\\;", ""), ("\\ ", ""),
        ("\\$", ""), ("dfrac", "frac"), ("tfrac", "frac"), ("cfrac", "frac"), ("\\%", "%"),
        ("^\\circ", ""), ("^{\\circ}", ""), ("{,}", ","), ("\u2212", "-"),
    ):  # fmt: skip
        text = text.replace(old, new)
    text = _WORD_WRAP.sub(r"\1", text)
    text = re.sub(r"\s+", "", text).rstrip(".\\").lstrip(_CURRENCY)
    return text[1:-1] if _GROUP.fullmatch(text) else text


def exact_number(answer: str) -> Fraction | None:
    """The rational number that an answer plainly is, or None."""
    if len(answer) > _LONGEST_NUMBER:
        return None
    mixed = _MIXED_RATIO.fullmatch(answer.strip("$"))
    if mixed:
        return _mixed(*mixed.groups())
    text = clean(answer)
    match = _FRACTION.fullmatch(text)
    if match:
        sign, whole, *parts = match.groups()
        top, bottom = (parts[i] or parts[i + 1] for i in (0, 2))
        return _mixed(sign, whole, top, bottom)
    if is_mixed(answer):
        return None
    if _COMMAS.fullmatch(text) and not _LIST_COMMA.search(re.sub(r"\\!\s*", "", answer)):
        text = text.replace(",", "")
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    match = _RATIO.fullmatch(text)
    if match and int(match.group(2)):
        return Fraction(int(match.group(1)), int(match.group(2)))
    return None


def answer_key(answer: str) -> str:
    r"""Equal for two answers that are one after the cheap normalisation: `0.5`, `\frac12`, `$1/2$`.

    An equivalence, which the grader's word on pairs is not; formulas that are ordered otherwise are
    two answers to it.
    """
    number = exact_number(answer)
    return clean(answer) if number is None else str(number)


def is_mixed(answer: str) -> bool:
    r"""Whether a space parts two numbers: "1\,1/2" is a mixed number or two answers, not 11/2."""
    return _MIXED.search(answer) is not None


def is_long_decimal(answer: str) -> bool:
    """A decimal with all the digits that a float prints: an exact value computed, not rounded."""
    return _LONG_DECIMAL.fullmatch(clean(answer)) is not None


def agree_as_floats(gold: Fraction, answer: Fraction) -> bool:
    """Equal but for the last digits of a float."""
    return abs(gold - answer) <= _LONG_VALUE * abs(gold)


def agree_rounded(a: Fraction, b: Fraction, *texts: str) -> bool:
    """Published leniency: a decimal within 1e-4 of the other, or rounded to the places it shows.

    Whole numbers and fractions are never close, only equal.
    """
    decimals = [shown for text in texts if (shown := _DECIMAL.fullmatch(clean(text)))]
    if not decimals:
        return a == b
    if abs(a - b) <= _RELATIVE * max(abs(a), abs(b)):
        return True
    places = len(decimals[0].group(1))
    return places >= 2 and abs(a - b) <= Fraction(1, 2 * 10**places)


def split_percent(answer: str) -> tuple[str, bool]:
    """The answer without its percent mark or word, and whether it had one."""
    text = _single_spaced(answer)
    bare = _PERCENT.sub("", text)
    return (bare, True) if bare != text and bare else (answer, False)


def split_unit(answer: str) -> tuple[str, str]:
    r"""A number's text and the words after it: `10\text{ cm}`, `10 weeks`; "" where none are."""
    match = _UNIT.fullmatch(_single_spaced(answer))
    if match is None or has_magnitude(answer):
        return answer, ""
    number, unit = match.group(1), next(filter(None, match.groups()[1:])).strip()
    return (answer, "") if _NO_UNIT.search(unit) or exact_number(number) is None else (number, unit)


def units_differ(a: str, b: str) -> bool:
    """Whether two units are known, and not the same; 5 cm is not 5 m."""
    first, second = (_UNITS.get(u.lower(), _UNITS.get(u.lower().rstrip("s."))) for u in (a, b))
    return None not in (first, second) and first != second


def has_magnitude(answer: str) -> bool:
    """Whether words multiply or divide what they follow: 3 million is not 3."""
    return _MAGNITUDE.search(answer) is not None


def _single_spaced(answer: str) -> str:
    """Runs of spaces cost the patterns of units and percents more than the square of their length."""
    return re.sub(r"\s+", " ", answer).strip().strip("$").strip()


def _mixed(sign: str, whole: str, top: str, bottom: str) -> Fraction | None:
    r"""`1\frac{1}{2}` is 3/2; what is no proper fraction after a whole number is not plain."""
    if not int(bottom) or (whole and not 0 <= int(top) < int(bottom)):
        return None
    value = int(whole or 0) + Fraction(int(top), int(bottom))
    return -value if sign == "-" else value
