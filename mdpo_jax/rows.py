"""Files of rows for the doors: JSON lines in, a result a row out, in order; bad rows are set aside."""

from __future__ import annotations

import collections
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROW_FILES = (".partial", ".quarantine", ".quarantine.partial")  # that lie beside an output
_AHEAD = 256  # rows read before their turn
_KEPT_TEXT = 2000


class RowsError(ValueError):
    """A file of rows that cannot be read, or without one good row."""


class Row(NamedTuple):
    """A row; or, with the reason why it is bad, its line, that reason and its text."""

    value: dict[str, Any]
    reason: str = ""


def read_rows(path: Path, fault: Callable[[Any], str]) -> Iterator[Row]:
    """Each row of JSON lines, plain or .gz; `fault` says what is wrong with a value, or ""."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    value: Any = json.loads(line)
                    reason = fault(value)
                except (ValueError, RecursionError) as error:
                    value, reason = None, f"not JSON ({error})"
                if reason:
                    text = line.decode(errors="replace").rstrip("\r\n")[:_KEPT_TEXT]
                    value = {"line": number, "reason": reason, "text": text}
                yield Row(value, reason)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RowsError(f"{path}: not a whole gzip file ({error})") from None


def in_order(
    work: Callable[[dict[str, Any]], dict[str, Any]], rows: Iterable[Row], threads: int
) -> Iterator[Row]:
    """`work` of each good row, on `threads` threads, in the rows' order; bad rows pass."""
    pool = ThreadPoolExecutor(threads)
    waiting: collections.deque[Future[Row]] = collections.deque()
    try:
        for row in rows:
            waiting.append(pool.submit(_worked, work, row))
            if len(waiting) >= max(_AHEAD, 2 * threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # After an error nobody waits: what still runs ends with the tool or grader that it uses.
        pool.shutdown(wait=not waiting, cancel_futures=True)


def write_rows(rows: Iterable[Row], source: Path, out: Path) -> None:
    """The good rows into `out`, the others into `{out}.quarantine`, if any; both appear whole.

    Errors: `RowsError` where no row is good; neither file is then touched.
    """
    kept, aside = Path(f"{out}.partial"), Path(f"{out}.quarantine.partial")
    count, first = 0, ""
    try:
        with open(kept, "w", encoding="utf-8") as good, open(aside, "w", encoding="utf-8") as bad:
            for value, reason in rows:
                count += not reason
                first = first or (f"line {value['line']}: {reason}" if reason else "")
                print(json.dumps(value), file=bad if reason else good)
            if not count:
                raise RowsError(f"{source}: no usable row; {first or 'it is empty'}")
            for file in (good, bad):
                _sync(file)
        os.replace(kept, out)
        os.replace(aside, f"{out}.quarantine")
    finally:
        kept.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)
    if not first:
        Path(f"{out}.quarantine").unlink()


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _worked(work: Callable[[dict[str, Any]], dict[str, Any]], row: Row) -> Row:
    return row if row.reason else Row(work(row.value))


def _sync(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())
