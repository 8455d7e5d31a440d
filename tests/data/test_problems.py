import gzip
import json
import logging
from pathlib import Path

import pytest

from mdpo_jax.data.problems import MAX_ROW_BYTES, ProblemError, load_problems, worked_solutions

SHARED = Path(__file__).parents[3] / "shared" / "data"
GSM8K = {"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}
OWN = {"id": "a/1", "question": "1+1?", "answer": "2"}


def _write(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("name", "count", "bad", "first"),
    [
        ("gsm8k_train.jsonl", 7473, 0, "72"),
        ("gsm8k_test.jsonl", 1319, 0, "18"),
        ("math_train.jsonl.gz", 7498, 2, "0"),  # two solutions end in an empty \boxed{}
        ("math_test.jsonl", 5000, 0, "2"),
    ],
)
def test_the_published_sets_load(name, count, bad, first):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    found = load_problems(SHARED / name)
    assert (len(found.problems), found.quarantined) == (count, bad)
    stem = name.split(".")[0]
    assert found.problems[0].id == f"{stem}/0"
    assert found.problems[-1].id == f"{stem}/{count + bad - 1}"
    assert found.problems[0].answer == first
    assert all(p.answer and p.question for p in found.problems)
    assert load_problems(SHARED / name) == found


def test_the_three_formats_may_stand_in_one_file(tmp_path):
    path = _write(
        tmp_path / "mixed.jsonl.gz",
        GSM8K,
        {"problem": "x?", "solution": r"so \boxed{\frac12}.", "level": "Level 3", "idx": 7},
        {"problem": "y?", "solution": "no box", "answer": " 5 ", "unique_id": "test/1"},
        OWN,
        {"id": 12, "question": " 3+4? ", "answer": 7, "tags": ["x"], "flag": True},
        {"id": "g", "question": "How many?", "answer": "many\n#### 1,234"},
    )
    found = load_problems(path).problems
    assert [(p.id, p.question, p.answer) for p in found] == [
        ("mixed/0", "2+2?", "4"),
        ("mixed/1", "x?", r"\frac12"),
        ("mixed/2", "y?", "5"),
        ("a/1", "1+1?", "2"),
        ("12", "3+4?", "7"),
        ("g", "How many?", "1234"),
    ]
    assert found[1].tags == {"level": "Level 3", "idx": 7}
    assert found[2].tags == {"unique_id": "test/1"}
    assert {p.source for p in found} == {"mixed"}


BAD = [
    (b'{"question": "2+2', "row: not JSON"),
    (b"[1]", "row: a JSON list; expected an object"),
    (b"\xff\xfe{}", "row: not UTF-8"),
    (b'{"question": "\\ud800", "answer": "#### 1"}', "row: not UTF-8"),
    (b"[" * 100_000, "row: nested too deep"),
    (b'{"a": ' * 100_000, "row: nested too deep"),
    (b'{"x": ' + b"9" * 5000 + b"}", "row: not JSON"),
    (b" " * MAX_ROW_BYTES + b"{}", "row: longer than"),
    ({"prompt": "x"}, "question: missing, the fields are ['prompt']"),
    ({"question": "x?"}, "answer: missing"),
    ({"question": " ", "answer": "#### 1"}, "question: ' '; expected a string that is not empty"),
    ({"question": None, "answer": "#### 1"}, "question: None; expected"),
    ({"question": "x?", "answer": "five"}, "answer: no gold in 'five'; expected `#### gold`"),
    ({"question": "x?", "answer": "five ####  "}, "answer: no gold after"),
    ({"id": "q", "question": "x?", "answer": 0.5}, "answer: 0.5; expected a string"),
    ({"id": "", "question": "x?", "answer": "1"}, "id: ''; expected"),
    ({"id": True, "question": "x?", "answer": "1"}, "id: True; expected"),
    ({"problem": "x?", "solution": "it is 5"}, "solution: no gold in 'it is 5'"),
    ({"problem": "x?"}, "solution: missing"),
    (OWN, "id: 'a/1' is the id of an earlier row"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_bad_row_is_set_aside_with_its_reason(tmp_path, caplog, bad, reason):
    path = _write(tmp_path / "p.jsonl", OWN, b"", bad, GSM8K)
    quarantine = tmp_path / "new" / "bad.jsonl"
    with caplog.at_level(logging.WARNING):
        found = load_problems(path, quarantine)
    assert [p.id for p in found.problems] == ["a/1", "p/3"]
    assert found.quarantined == 1
    (row,) = map(json.loads, quarantine.read_text().splitlines())
    assert (row["path"], row["line"]) == (str(path), 3)
    assert row["reason"].startswith(reason)
    assert len(row["text"]) <= 2000
    (line,) = caplog.messages
    assert line.startswith(f"{path}:3: {reason}")
    assert "\n" not in line


def test_only_the_first_bad_rows_are_logged(tmp_path, caplog):
    path = _write(tmp_path / "p.jsonl", GSM8K, *[b"{"] * 10)
    assert load_problems(path, tmp_path / "bad.jsonl").quarantined == 10
    assert len(caplog.messages) == 4
    assert caplog.messages[-1] == f"{path}: 10 bad rows in all"
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 10


def test_the_quarantine_is_that_of_the_last_load(tmp_path):
    quarantine = tmp_path / "bad.jsonl"
    path = _write(tmp_path / "p.jsonl", GSM8K, b"{")
    load_problems(path, quarantine)
    first = quarantine.read_bytes()
    load_problems(path, quarantine)
    assert quarantine.read_bytes() == first
    load_problems(_write(path, GSM8K), quarantine)
    assert quarantine.read_bytes() == b""
    with pytest.raises(ProblemError, match="is the problem file"):
        load_problems(path, path)


def test_marks_of_other_systems_do_no_harm(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(OWN).encode() + b"\r\n" + json.dumps(GSM8K).encode()
    )
    assert [p.id for p in load_problems(path).problems] == ["a/1", "p/1"]


def test_a_gzip_is_known_by_its_bytes(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(gzip.compress(json.dumps(OWN).encode()))
    assert load_problems(path).problems[0].id == "a/1"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "no usable row; it is empty"),
        (
            "bad.jsonl",
            b"{\n[]\n",
            "no usable row; all 2 are bad, the first: .*bad.jsonl:1: row: not",
        ),
        ("plain.jsonl.gz", b'{"id": 1}', "broken gzip"),
        ("short.jsonl.gz", gzip.compress(json.dumps(OWN).encode() * 99)[:-20], "broken gzip"),
        ("flipped.jsonl.gz", gzip.compress(b"x" * 99)[:12] + b"\xff" * 20, "broken gzip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_used_is_one_clear_line(tmp_path, name, data, said):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ProblemError, match=said) as error:
        load_problems(tmp_path / name, tmp_path / "q.jsonl")
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_rows_that_are_all_bad_are_still_in_the_quarantine(tmp_path):
    path = _write(tmp_path / "p.jsonl", b"{", b"[]")
    with pytest.raises(ProblemError):
        load_problems(path, tmp_path / "q.jsonl")
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 2


def test_a_folder_and_an_unreadable_file_are_named(tmp_path, monkeypatch):
    with pytest.raises(ProblemError, match="not a file; expected"):
        load_problems(tmp_path)
    path = _write(tmp_path / "p.jsonl", OWN)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mdpo_jax.data.problems._opened", refuse)
    with pytest.raises(ProblemError, match=r"cannot be read \(Permission denied\)"):
        load_problems(path)
    (tmp_path / "file").touch()
    with pytest.raises(ProblemError, match=r"quarantine: .*cannot be written"):
        load_problems(path, tmp_path / "file" / "q.jsonl")


def test_worked_solutions_become_code(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    rows = [
        {"question": "A?", "answer": "48/2 = <<48/2=24>>24.\n48+24 = <<48+24=72>>72\n#### 72"},
        {"question": "B?", "answer": "No annotation.\n#### 1"},
        {"question": "C?", "answer": "<<__import__('os').getpid()=3>>3\n#### 3"},
        {"question": "D?", "answer": "<<2*3=6>>6 and no gold"},
        {"question": "E?", "answer": "$<<(1.5+2)*4=14>>14\n#### 14"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "<< not JSON\n")
    found = [(p.id, p.answer, code) for p, code in worked_solutions(path)]
    assert found == [
        ("gsm8k/0", "72", "print(48/2)\nprint(48+24)"),
        ("gsm8k/4", "14", "print((1.5+2)*4)"),
    ]
