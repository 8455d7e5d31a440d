"""Recorded trajectories: both formats, bad rows, and when a re-run says the same."""

import pytest

from mdpo_jax.data.recorded import Block, agreement, blocks_of, fault, identity, is_error_report

TORA = {"idx": 3, "code": ["Hm.\n```python\nx = 1\nprint(x)\n```\n```output\n1\n```\nSo 1."]}
CODER = {
    "id": "test/algebra/1.json",
    "segments": [
        {"role": "system", "content": "Solve."},
        {"role": "user", "content": "1+1?"},
        {"role": "code", "content": "x = 1\r\nx + 1"},
        {"role": "execution", "content": "2"},
        {"role": "text", "content": "Then"},
        {"role": "code", "content": "x"},
        {"role": "code", "content": "y"},
        {"role": "execution", "content": ""},
        {"role": "code", "content": "z"},
    ],
}
TRACEBACK = """\
seen
---------------- TypeError     Traceback (most recent call last) Cell In[2], line 2
----> 2 set(x)
 TypeError: 'int' object is not iterable"""
SYNTAX = "Cell In[2], line 2\n    1 = 1\n    ^\nSyntaxError: cannot assign to literal"
NAME = "NameError: name 'x' is not defined"


def test_tora_blocks_are_read_off_the_text():
    assert fault(TORA) == ""
    assert identity(TORA) == 3
    assert blocks_of(TORA) == [Block("x = 1\nprint(x)", "1")]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("no code", []),
        ("```python\na\n```", [Block("a", None)]),
        ("```python\na\n```\n```python\nb\n```\n```output\n2\n3\n```",
         [Block("a", None), Block("b", "2\n3")]),
        ("```python\na\n```\n```output\n```", [Block("a", "")]),
        ("```python\na\n```\n```output\n7", [Block("a", "7")]),
        ("```python\na", []),
        ("```output\n1\n```", []),
    ],
)  # fmt: skip
def test_tora_texts_of_other_shapes(text, blocks):
    assert blocks_of({"idx": 0, "code": [text]}) == blocks


def test_mathcoder_blocks_are_segments():
    assert fault(CODER) == ""
    assert identity(CODER) == "test/algebra/1.json"
    assert identity(CODER | {"id": None, "file_row": 8}) == 8
    assert blocks_of(CODER) == [
        Block("x = 1\r\nx + 1", "2"), Block("x", None), Block("y", ""), Block("z", None)
    ]  # fmt: skip
    assert blocks_of({"segments": []}) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "[1]: not an object; expected ToRA"),
        ({"a": 1}, "segments: missing, the fields are ['a']; expected ToRA"),
        ({"code": "x"}, "code: 'x'; expected a list of one text"),
        ({"code": ["x", "y"]}, "code: ['x', 'y']; expected a list of one text"),
        ({"segments": [{"role": "code"}]}, "expected a list of {role, content}"),
        ({"id": [1], "segments": []}, "id: [1]; expected a string or a number"),
    ],
)
def test_a_bad_row_names_field_value_and_what_is_accepted(row, words):
    assert words in fault(row)


@pytest.mark.parametrize(
    ("recorded", "error"),
    [
        (TRACEBACK, True), (SYNTAX, True), (NAME, True), ("  " + SYNTAX, True),
        ("KeyboardInterrupt", True), ("sympy.SympifyError: x", True),
        ("", False), ("Error: 3 %", False), ("The error\nNameError: x", False), ("3", False),
        ("StandardError = 3", False),
    ],
)  # fmt: skip
def test_error_reports(recorded, error):
    assert is_error_report(recorded) == error


@pytest.mark.parametrize(
    ("recorded", "output", "expected"),
    [
        ("1\n", "1", "value equal"),
        ("\n 1", "1 \n", "value equal"),
        ("a  b", "a b", "value different"),
        ("", "Result is not defined", "value equal"),
        ("1", NAME, "value different"),
        (NAME, NAME, "error equal"),
        (TRACEBACK, "TypeError: 'int' object is not iterable", "error same line"),
        (SYNTAX, "SyntaxError: cannot assign to literal here", "error different"),
        (None, "1", "unrecorded"),
    ],
)
def test_agreement(recorded, output, expected):
    assert agreement(recorded, output) == expected
