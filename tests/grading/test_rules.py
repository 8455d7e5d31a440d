"""What is settled without a worker: exact numbers, percents, units, shape."""

import time
from fractions import Fraction

import pytest

from mdpo_jax.grading.normalise import answer_key, exact_number, split_percent, split_unit
from mdpo_jax.grading.rules import settle
from mdpo_jax.grading.structure import base, brackets, count


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", Fraction(2469, 2)),
        ("11,\\! 111,\\! 111,\\! 100", 11111111100),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac34", Fraction(3, 4)),
        (r"918\frac{1}{2}", Fraction(1837, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("€77", 77),
        ("185\\", 185),
        (r"1\,000", 1000),
        (".5", Fraction(1, 2)),
        ("{5}", 5),
        (r"2\frac{3}{2}", None),  # a product
        ("1, 234", None),  # a list
        ("1 2", None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("9" * 401, None),
        ("1e5", None),
        ("x", None),
    ],
)
def test_numbers_that_are_plain(text, value):
    assert exact_number(text) == value


@pytest.mark.parametrize(
    ("text", "bare", "marked"),
    [
        (r"10\%", "10", True),
        ("10 %", "10", True),
        ("28 percent", "28", True),
        (r"28\text{ percent}", "28", True),
        ("28 percentage", "28", True),
        ("%", "%", False),
        ("10", "10", False),
    ],
)
def test_percent_marks(text, bare, marked):
    assert split_percent(text) == (bare, marked)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"10\text{ cm}", ("10", "cm")),
        (r"10\text{ cm}^{2}", ("10", "cm")),
        ("10 weeks", ("10", "weeks")),
        ("50.0{mph}", ("50.0", "mph")),
        ("3 million", ("3 million", "")),
        (r"3\text{ million}", (r"3\text{ million}", "")),
        ("12 or 13", ("12 or 13", "")),
        ("10x", ("10x", "")),
    ],
)
def test_units(text, found):
    assert split_unit(text) == found


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("5", 1),
        ("1,234", 1),
        ("1/3, 1/4", 2),
        ("12 or 13", 2),
        (r"6 \text{ and } 8", 2),
        ("19, 46, and 82", 3),
        (r"\pm 1", 2),
        ("(1,2)", 2),
        ("(p,q) = (3,2)", 2),
        ("(1,1)", 2),
        (r"\{1, 2, 2\}", 2),
        ("(1,2),(3,4)", 2),
        (r"[0,1) \cup (2,3)", 1),
        (r"\begin{pmatrix}1,2\\3\end{pmatrix}", 1),
        ("0<x<1", None),
    ],
)
def test_how_many_values(text, n):
    assert count(text) == n


def test_brackets_and_bases():
    assert [brackets(t) for t in ("(1,2)", r"\{1,2\}", "[1,2)", "1,2", "(1,2),(3,4)")] == [
        "()", "{}", "[)", None, None,
    ]  # fmt: skip
    assert [base(t) for t in ("664_7", "664_{12}", "664", "a_7")] == ["7", "12", None, None]


@pytest.mark.parametrize(
    "answer",
    ["5" + " " * 990 + "!", "5}" * 499, "5 a" * 333, "(" * 999, "5," * 499, "{" * 499 + "}" * 499,
     " %" * 499, "\\," * 499, "\\text{" * 166, "5" + r"\text{ a" * 124,
     "and " * 249, "5 " + "a b " * 249],
    ids=lambda text: text[:8],
)  # fmt: skip
def test_no_answer_takes_long(answer):
    start = time.monotonic()
    for policy in ("strict", "lenient"):
        settle("7", answer, policy)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("gold", "answer", "strict", "lenient"),
    [
        ("", "5", "unparsable_gold", "unparsable_gold"),
        ("5", " ", "no_answer", "no_answer"),
        ("5", "1" * 1001, "too_long", "too_long"),
        ("20", r"20\%", "+numeric", "+numeric"),
        (r"10\%", "10", "+numeric", "+numeric"),
        ("0.12", r"0.12\%", "percent", "+numeric"),
        ("50", "0.5", "numeric", "+percent"),
        ("50", "5000", "numeric", "+percent"),
        ("10000", "10001", "numeric", "numeric"),
        (r"\frac{1}{6}", "0.167", "numeric", "+approximate"),
        (r"\frac{1}{6}", "0.2", "numeric", "numeric"),
        (r"\frac{1}{12}", "0.0833333333333333", "+float", "+approximate"),
        ("12", "12.000000000000002", "+float", "+approximate"),
        ("8.5", r"\frac{17}{2}", "+numeric", "+numeric"),
        ("10", "10 weeks", "+numeric", "+numeric"),
        ("3", r"3\text{ million}", "magnitude", None),
        ("664_7", "664", "base", None),
        ("664_7", "664_8", "base", "base"),
        ("(1,2)", "[1,2]", "brackets", None),
        ("A", "A,B,C,D", "count", None),
        ("100, 200", "200, 100", None, None),
        (r"5\text{ cm}", r"5\text{ m}", "unit", "+numeric"),
        ("5 inches", r"5\text{ in}", "+numeric", "+numeric"),
        ("BAC", "ABC", "letters", None),
        ("1/3", "0.333333333333", "numeric", "+approximate"),
    ],
)
def test_what_is_cheap_per_policy(gold, answer, strict, lenient):
    for policy, expected in (("strict", strict), ("lenient", lenient)):
        found = settle(gold, answer, policy)
        rule = found and ("+" if found.correct else "") + found.rule
        assert rule == expected, policy


def test_answers_that_vote_together():
    same = ["0.5", r"\frac12", r"\dfrac{1}{2}", "$1/2$", " .50 "]
    assert len({answer_key(text) for text in same}) == 1
    apart = ["0.5", "0.50001", "x+1", "1+x", r"50\%", "(1,2)", "12"]
    assert len({answer_key(text) for text in apart}) == len(apart)
