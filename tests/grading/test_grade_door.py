"""`python -m mdpo_jax.grade`: files, quarantine, exit codes."""

import gzip
import json

import pytest
from support import read_rows, run_rows

from mdpo_jax import grade

GOOD = [
    {"gold": "1/2", "pred": "0.5", "form": "answer", "id": "a"},
    {"gold": ["1", "2"], "pred": "2", "form": "answer", "id": "b"},
    {"gold": "$5$", "pred": r"$\boxed{6}$", "form": "text", "id": "c"},
    {"gold": "5", "pred": r"it is \boxed{5}.", "form": "solution", "id": "d"},
    {"gold": " ", "pred": "5", "form": "answer", "id": "e"},
]
BAD = ["{", "[1]", '{"gold": 1, "pred": "1", "form": "answer"}', '{"gold": "1", "form": "answer"}',
       '{"gold": "1", "pred": "1", "form": "essay"}']  # fmt: skip


def run(tmp_path, lines, *more, **name):
    return run_rows(grade.main, "cases", tmp_path, lines, *more, **name)


def test_rows_come_back_in_order_with_their_verdicts(tmp_path, capsys):
    code, out = run(tmp_path, map(json.dumps, GOOD), name="cases.jsonl.gz")
    rows = read_rows(out)
    assert code == 0
    assert [r["id"] for r in rows] == list("abcde")
    assert [(r["verdict"], r["rule"]) for r in rows] == [
        ("correct", "numeric"), ("correct", "exact"), ("wrong", "numeric"), ("correct", "exact"),
        ("unknown", "unparsable_gold"),
    ]  # fmt: skip
    assert all(r["seconds"] >= 0 for r in rows)
    assert rows[0] | GOOD[0] == rows[0]
    assert "3 correct, 1 unknown, 1 wrong" in capsys.readouterr().out
    assert not (tmp_path / "out.jsonl.quarantine").exists()


def test_bad_rows_are_set_aside_with_their_reasons(tmp_path, capsys):
    code, out = run(tmp_path, [*BAD, "", json.dumps(GOOD[0])], "--policy=lenient")
    assert code == 0
    assert len(read_rows(out)) == 1
    aside = read_rows(tmp_path / "out.jsonl.quarantine")
    assert [row["line"] for row in aside] == [1, 2, 3, 4, 5]
    assert [row["reason"].split(":")[0] for row in aside[2:]] == ["gold", "pred", "form"]
    assert "expected one of answer, text, solution" in aside[4]["reason"]
    assert "5 quarantined" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "more", "words"),
    [
        (BAD[4:], [], "no usable row; line 1: form: 'essay'; expected one of"),
        ([], [], "no usable row; it is empty"),
        ([json.dumps(GOOD[0])], ["--threads=0"], "--threads=0; expected more than 0"),
        ([json.dumps(GOOD[0])], ["--cases=/nowhere/x"], "no such file"),
        ([json.dumps(GOOD[0])], ["--out=/nowhere/x"], "a new one, in a folder that exists"),
    ],
)
def test_wrong_input_is_one_line_and_2(tmp_path, capsys, lines, more, words):
    code, out = run(tmp_path, lines, *more)
    said = capsys.readouterr().err
    assert code == 2
    assert words in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_an_unknown_policy_names_what_is_accepted(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, [json.dumps(GOOD[0])], "--policy=kind")
    assert stop.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_a_broken_gzip_is_one_line_and_2(tmp_path, capsys):
    cases = tmp_path / "cases.jsonl.gz"
    cases.write_bytes(gzip.compress(json.dumps(GOOD[0]).encode() * 50)[:-9])
    assert grade.main([f"--cases={cases}", f"--out={tmp_path / 'out.jsonl'}"]) == 2
    assert "not a whole gzip file" in capsys.readouterr().err
