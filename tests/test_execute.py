"""`python -m mdpo_jax.execute`: order, formats, quarantine, exit codes."""

import gzip
import json
import time

import pytest
from support import read_rows, run_rows

from mdpo_jax import execute

STATE = {
    "id": "a",
    "segments": [
        {"role": "code", "content": "x = 2"},
        {"role": "execution", "content": ""},
        {"role": "text", "content": "now"},
        {"role": "code", "content": "x + 1"},
        {"role": "execution", "content": "3"},
        {"role": "code", "content": "y"},
        {"role": "execution", "content": "Traceback (most recent call last)\n "
                                         "NameError: name 'y' is not defined"},
    ],
}  # fmt: skip
FRESH = {"id": "b", "segments": [{"role": "code", "content": "'x' in globals()"}]}
TORA = {"idx": 7, "code": ["```python\nprint(40 + 2)\n```\n```output\n42\n```"]}
NO_CODE = {"idx": 8, "code": ["It is 3."]}


def run(tmp_path, lines, *more, **name):
    return run_rows(execute.main, "trajectories", tmp_path, lines, *more, **name)


def test_rows_come_back_in_order_with_what_their_blocks_gave(tmp_path, capsys):
    slow = {"idx": 1, "code": ["```python\nimport time; time.sleep(0.3)\n```"]}
    given = [slow, STATE, "", FRESH, "{", TORA, {"text": "x"}, NO_CODE]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in given]
    code, out = run(tmp_path, lines, "--batch=3", name="rows.jsonl.gz")
    assert code == 0
    rows = read_rows(out)
    assert [row["id"] for row in rows] == [1, "a", "b", 7, 8]
    assert [[b["output"] for b in row["blocks"]] for row in rows] == [
        ["Result is not defined"],
        ["Result is not defined", "3", "NameError: name 'y' is not defined"],
        ["False"], ["42"], [],
    ]  # fmt: skip
    assert [b["status"] for b in rows[1]["blocks"]] == ["ok", "ok", "error"]
    assert [b["recorded"] for row in rows[2:] for b in row["blocks"]] == [None, "42"]
    assert list(rows[3]["blocks"][0]) == ["code", "recorded", "output", "status", "seconds"]
    assert rows[0]["blocks"][0]["seconds"] >= 0.3
    aside = read_rows(tmp_path / "out.jsonl.quarantine")
    assert [row["line"] for row in aside] == [5, 7]
    assert "the fields are ['text']" in aside[1]["reason"]
    said = capsys.readouterr().out
    assert "5 rows, 2 quarantined, 6 blocks" in said
    assert "status: 1 error, 5 ok" in said
    assert "as recorded: 75.00 % (3 of 4)" in said
    assert "values as recorded: 100.00 % (3 of 3)" in said
    assert "same last line: 100.00 % (1 of 1)" in said


def test_no_trajectory_waits_for_another_and_a_timeout_is_a_status(tmp_path):
    stuck = {"idx": 0, "code": ["```python\nwhile True: pass\n```"]}
    start = time.monotonic()
    code, out = run(tmp_path, map(json.dumps, [stuck, TORA]), "--timeout=0.5", "--batch=1")
    assert code == 0
    assert [row["blocks"][0]["status"] for row in read_rows(out)] == ["timeout", "ok"]
    assert time.monotonic() - start < 15


def test_a_block_may_take_for_ever(tmp_path):
    code, out = run(tmp_path, [json.dumps(TORA)], "--timeout=inf")
    assert code == 0
    assert read_rows(out)[0]["blocks"][0]["output"] == "42"


@pytest.mark.parametrize(
    ("semantics", "second"),
    [("replay", "3"), ("last_only", "NameError: name 'x' is not defined")],
)
def test_other_semantics_and_no_sandbox(tmp_path, semantics, second):
    code, out = run(tmp_path, [json.dumps(STATE)], f"--semantics={semantics}", "--sandbox=none")
    assert code == 0
    assert read_rows(out)[0]["blocks"][1]["output"] == second


@pytest.mark.parametrize(
    ("lines", "more", "words"),
    [
        (["[1]"], [], "no usable row; line 1: [1]: not an object; expected ToRA"),
        ([], [], "no usable row; it is empty"),
        ([json.dumps(TORA)], ["--batch=0"], "--batch=0; expected more than 0"),
        ([json.dumps(TORA)], ["--timeout=nan"], "--timeout=nan; expected more than 0"),
        ([json.dumps(TORA)], ["--trajectories=/nowhere/x"], "no such file"),
        (
            [json.dumps(TORA)],
            ["--out=/nowhere/x"],
            "expected a file, or a new one, in a folder that",
        ),
        (
            [json.dumps(TORA)],
            ["--out=/dev/null"],
            "expected a file, or a new one, in a folder that",
        ),
    ],
)
def test_wrong_input_is_one_line_and_2(tmp_path, capsys, lines, more, words):
    code, out = run(tmp_path, lines, *more)
    said = capsys.readouterr().err
    assert code == 2
    assert words in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_a_broken_gzip_leaves_what_was_there(tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl.gz", tmp_path / "out.jsonl"
    rows.write_bytes(gzip.compress(json.dumps(NO_CODE).encode() * 50)[:-9])
    out.write_text("earlier")
    assert execute.main([f"--trajectories={rows}", f"--out={out}"]) == 2
    assert "not a whole gzip file" in capsys.readouterr().err
    assert out.read_text() == "earlier"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("end", ["", ".partial", ".quarantine", ".quarantine.partial"])
def test_the_input_is_never_what_is_written(tmp_path, capsys, end):
    out = tmp_path / "out.jsonl"
    rows = tmp_path / f"out.jsonl{end}"
    rows.write_text(json.dumps(TORA))
    assert execute.main([f"--trajectories={rows}", f"--out={out}"]) == 2
    assert f"--out={out}: would replace trajectories {rows}" in capsys.readouterr().err
    assert rows.read_text() == json.dumps(TORA)
