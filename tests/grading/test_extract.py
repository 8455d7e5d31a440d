"""The answer in a text and the gold in a solution."""

import time

import pytest

from mdpo_jax.grading.extract import (
    extract_answer,
    extract_boxed,
    extract_display,
    extract_gold,
    extract_gsm8k,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} ok", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{{a}b}", "{a}b"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\fbox {3}", "3"),
        (r"\boxed 5$ x", "5"),
        (r"\boxed{open", None),
        (r"\boxed{1} and \boxed{open", None),
        ("none", None),
    ],
)
def test_the_last_box(text, answer):
    assert extract_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$\boxed{1}$ and $\boxed{-2}$.", "1, -2"),
        (r"$\boxed{2}, \boxed{3}, \boxed{5}$", "2, 3, 5"),
        (r"$\boxed{k = 45} \quad \text{and} \quad \boxed{n = 2}$", "k = 45, n = 2"),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", "1, 2"),
        (r"\boxed{5} or \boxed{5}", "5"),
        (r"\boxed{1} no no \boxed{2}", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1}\boxed{2}", "1, 2"),
        (r"\boxed{open \boxed{2}", "2"),
        (r"\boxed{\frac{25}{13}} = \boxed{1\frac{12}{13}}", r"1\frac{12}{13}"),
        ("The answer is 5.", None),
    ],
)
def test_boxes_that_belong_together(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The answer is 4, no: \boxed{5}", "5"),
        ("so the final answer is $7$.", "7"),
        ("it is 3\n#### 1,234", "1234"),
        ("Of 12 people 1,000.5 remain.", "1,000.5"),
        ("nothing", None),
    ],
)
def test_lenient_fallbacks(text, answer):
    assert extract_answer(text, lenient=True) == answer


# Ends of MATH solutions (MIT); the annotated golds of these are lists or alternatives.
@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        (r"is $\boxed{-3}$. Note: $\boxed{3}$ is also accepted as an answer.", "-3 [or] 3"),
        (r"$\boxed{(10, 0)}$ and $\boxed{(0,0)}.$ (Either point is an acceptable answer.)",
         "(10, 0) [or] (0,0)"),
        (r"$x = \boxed{ -\tfrac32}$ and $x = \boxed{-\tfrac34},$ respectively.",
         r"-\tfrac32, -\tfrac34"),
        (r"so $b = \boxed{-10879}.$  If $r = -1,$ then $1988 - b + 8891 = 0,$ so $b = \boxed{10879}.$",
         "-10879, 10879"),
        ("&= 2 = \\boxed{5 - 10i}, \\\\\na + c &= 3 = \\boxed{11}, \\\\\na - c &= 4 = \\boxed{-3}.",
         "5 - 10i, 11, -3"),
        (r"is $\boxed{30^\circ}.$ The cosine of another is 2, so it is $\boxed{45^\circ}.$",
         r"30^\circ, 45^\circ"),
        (r"$\boxed{10}$. - OR - The length is $\boxed{10}$.", "10"),
        (r"$\boxed{12x -34}$, or $\boxed{-34 + 12x}$.", "-34 + 12x"),
        (r"$\boxed{15\frac{39}{40}},$ or $\boxed{\frac{639}{40}}$ inches.", r"\frac{639}{40}"),
        (r"$\boxed{\frac{2\sqrt{53}+53}{53}}$. Thus $a+b+c+d$ is \boxed{161}.", "161"),
        (r"\[x + \boxed{\phantom{2}} = 3\] If the number is $\boxed{4}$, then", "4"),
        ("no box", None),
    ],
)  # fmt: skip
def test_golds_in_several_boxes(solution, gold):
    assert extract_gold(solution) == gold


# Each would cost a careless pattern or a scan from every box more than a minute.
@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 20_000,
        r"\boxed{" * 5_000 + "1" + "}" * 5_000,
        r"\boxed{1} and " * 20_000,
        r"\boxed{1}" + " " * 50_000 + r"x\boxed{2}",
        r"\boxed{1}" + ", and" * 10_000 + r"x\boxed{2}",
        "$" * 50_000,
        "answer is " * 10_000,
        "1,111" * 10_000,
    ],
    ids=lambda text: text[:16],
)
def test_no_text_takes_long(text):
    start = time.monotonic()
    extract_answer(text)
    extract_answer(text, lenient=True)
    extract_display(text)
    assert time.monotonic() - start < 20


def test_gsm8k_mark():
    assert extract_gsm8k("a\n#### 1,234") == "1234"
    assert extract_gsm8k("no") is None


@pytest.mark.parametrize(
    ("text", "answer"), [("$9$", "9"), (r"\boxed{1}", "1"), ("$1$ or $2$", None), ("9", None)]
)
def test_texts_that_are_one_formula(text, answer):
    assert extract_display(text) == answer
