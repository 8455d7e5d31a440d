"""Files of grader cases: JSON lines in, the same rows with their verdicts out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdpo_jax.grading.extract import ALTERNATIVE
from mdpo_jax.grading.verdict import FORMS, Grader
from mdpo_jax.rows import Row, in_order, read_rows, short, write_rows


def grade_file(grader: Grader, cases: Path, out: Path, threads: int = 2) -> Counter[str]:
    """Grade every row of `cases` into `out`, in order; counts of the verdicts.

    A row has `gold` (a string, or a list of accepted ones), `pred` and `form`; it is returned with
    `verdict`, `rule`, `answer` and `seconds`.  Bad rows are counted as `quarantined` and go to
    `{out}.quarantine` with line, reason and text.  Both files appear whole.
    """
    counts: Counter[str] = Counter()

    def graded() -> Iterator[Row]:
        rows = _started(grader, read_rows(cases, _fault))
        for row in in_order(lambda case: _graded(grader, case), rows, threads):
            counts["quarantined" if row.reason else row.value["verdict"]] += 1
            yield row

    write_rows(graded(), cases, out)
    return counts


def _started(grader: Grader, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; no row's seconds shall count the import of math-verify, nor a file without one."""
    started = False
    for row in rows:
        if not row.reason and not started:
            grader.start()
            started = True
        yield row


def _graded(grader: Grader, case: dict[str, Any]) -> dict[str, Any]:
    gold = case["gold"] if isinstance(case["gold"], str) else ALTERNATIVE.join(case["gold"])
    start = time.monotonic()
    verdict = grader.judge(gold, case["pred"], case["form"])
    seconds = round(time.monotonic() - start, 6)
    found = {"verdict": verdict.label, "rule": verdict.rule, "answer": verdict.answer}
    return case | found | {"seconds": seconds}


def _fault(case: Any) -> str:
    if not isinstance(case, dict):
        return f"{short(case)}: not an object; expected gold, pred and form"
    gold = case.get("gold")
    golds = gold if isinstance(gold, list) and gold else [gold]
    if not all(isinstance(g, str) for g in golds):
        return f"gold: {short(gold)}; expected a string or a list of accepted ones"
    if not isinstance(case.get("pred"), str):
        return f"pred: {short(case.get('pred'))}; expected a string"
    if case.get("form") not in FORMS:
        return f"form: {short(case.get('form'))}; expected one of {', '.join(FORMS)}"
    return ""
