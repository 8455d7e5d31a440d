"""What a last expression shows, as IPython 9 showed it (frozen; the layout was checked against it)."""

import sympy

from mdpo_jax.environment.display import shown


def test_what_fits_is_the_repr():
    for value in (3, "a'b", [1, (2,), ()], {1: [2], "a": {}}, set(), frozenset(), None, 1e-9):
        assert shown(value) == repr(value)
    assert len(shown(["x" * 75])) == 79


def test_what_does_not_fit_has_an_item_a_line():
    big = 10**29
    assert shown([big, big, big]) == f"[{big},\n {big},\n {big}]"
    assert shown((["x" * 76],)) == "(['" + "x" * 76 + "'],)"  # nothing to break at
    assert shown(([big, 2, big, big], 7)) == f"([{big},\n  2,\n  {big},\n  {big}],\n 7)"
    assert (
        shown({"k": [big, 1, big, 1, big]}) == f"{{'k': [{big},\n  1,\n  {big},\n  1,\n  {big}]}}"
    )


def test_commas_and_brackets_behind_a_value_count():
    inner = ["a", "b" * 68]  # 77 columns: it fits between a bracket and a comma
    assert shown([inner, 1]).splitlines() == [f"[{inner},", " 1]"]
    inner = ["a", "b" * 69]
    assert shown([inner, 1]).splitlines() == ["[['a',", f"  {inner[1]!r}],", " 1]"]


def test_sets_are_sorted_by_value_or_else_by_text():
    x, y = sympy.symbols("x y")
    assert shown({4, -4}) == "{-4, 4}"
    assert shown([frozenset({y, x})]) == "[frozenset({x, y})]"


def test_long_deep_and_own_values():
    class Own(list):
        def __repr__(self):
            return "own"

    assert shown(list(range(1500))).endswith(" 999,\n ...]")
    assert shown({i: i for i in range(1001)}).endswith(" 999: 999,\n ...}")
    assert shown([Own([1] * 90)]) == "[own]"
    loop: list = [1]
    loop.append(loop)
    assert shown(loop) == "[1, [...]]"
