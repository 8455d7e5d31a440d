"""Files of grader cases: JSON lines in, the same rows with their verdicts out."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from mdpo_jax.grading.extract import ALTERNATIVE
from mdpo_jax.grading.verdict import FORMS, Grader

_AHEAD = 256  # rows read before their turn
_KEPT_TEXT = 2000


class CaseError(ValueError):
    """A file of cases that cannot be read, or without one good row."""


def grade_file(grader: Grader, cases: Path, out: Path, threads: int = 2) -> Counter[str]:
    """Grade every row of `cases` into `out`, in order; counts of the verdicts.

    A row has `gold` (a string, or a list of accepted ones), `pred` and `form`; it is returned with
    `verdict`, `rule`, `answer` and `seconds`.  Bad rows are counted as `quarantined` and go to
    `{out}.quarantine` with line, reason and text.  Both files appear whole.
    """
    counts: Counter[str] = Counter()
    kept, aside = Path(f"{out}.partial"), Path(f"{out}.quarantine.partial")
    first = ""
    try:
        with (
            open(kept, "w", encoding="utf-8") as good,
            open(aside, "w", encoding="utf-8") as bad,
            ThreadPoolExecutor(threads) as pool,
        ):
            for row, reason in _in_order(pool, _rows(cases), grader):
                counts["quarantined" if reason else row["verdict"]] += 1
                first = first or (f"line {row['line']}: {reason}" if reason else "")
                print(json.dumps(row), file=bad if reason else good)
            if not counts.total() - counts["quarantined"]:
                raise CaseError(f"{cases}: no usable row; {first or 'it is empty'}")
            for file in (good, bad):
                _sync(file)
        os.replace(kept, out)
        os.replace(aside, f"{out}.quarantine")
    finally:
        kept.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)
    if not counts["quarantined"]:
        Path(f"{out}.quarantine").unlink()
    return counts


def _in_order(
    pool: ThreadPoolExecutor, rows: Iterator[tuple[dict[str, Any], str]], grader: Grader
) -> Iterator[tuple[dict[str, Any], str]]:
    waiting, started = [], False
    for row, reason in rows:
        if not reason and not started:
            grader.start()  # no row's seconds shall count the import of math-verify
            started = True
        waiting.append(pool.submit(_graded, grader, row, reason))
        if len(waiting) >= _AHEAD:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _graded(grader: Grader, row: dict[str, Any], reason: str) -> tuple[dict[str, Any], str]:
    if reason:
        return row, reason
    gold = row["gold"] if isinstance(row["gold"], str) else ALTERNATIVE.join(row["gold"])
    start = time.monotonic()
    verdict = grader.judge(gold, row["pred"], row["form"])
    seconds = round(time.monotonic() - start, 6)
    found = {"verdict": verdict.label, "rule": verdict.rule, "answer": verdict.answer}
    return row | found | {"seconds": seconds}, ""


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row with "", or what is known of a bad one with its reason."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row: Any = json.loads(line)
                    reason = _fault(row)
                except (ValueError, RecursionError) as error:
                    row, reason = None, f"not JSON ({error})"
                if reason:
                    text = line.decode(errors="replace").rstrip("\r\n")[:_KEPT_TEXT]
                    row = {"line": number, "reason": reason, "text": text}
                yield row, reason
    except (EOFError, gzip.BadGzipFile) as error:
        raise CaseError(f"{path}: not a whole gzip file ({error})") from None


def _fault(row: Any) -> str:
    if not isinstance(row, dict):
        return f"{_short(row)}: not an object; expected gold, pred and form"
    gold = row.get("gold")
    golds = gold if isinstance(gold, list) and gold else [gold]
    if not all(isinstance(g, str) for g in golds):
        return f"gold: {_short(gold)}; expected a string or a list of accepted ones"
    if not isinstance(row.get("pred"), str):
        return f"pred: {_short(row.get('pred'))}; expected a string"
    if row.get("form") not in FORMS:
        return f"form: {_short(row.get('form'))}; expected one of {', '.join(FORMS)}"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _sync(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())
