"""Problem files: JSON lines, plain or gzipped, read row by row into `Problem`s.

The format of a row is told by its fields, never by the file's name:

    GSM8K   question, answer              gold: the text after the last `####` of the answer
    MATH    problem, solution or answer   gold: the answer, else the \\boxed{} of the solution
    own     id, question, answer          gold: the answer as it stands

Every other string or whole number of a row (level, type, idx, ...) becomes a tag.  A row that
cannot be used is set aside with its reason and counted; it never stops a run that has other rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO, cast

from mdpo_jax.types import Problem

_log = logging.getLogger(__name__)

MAX_ROW_BYTES = 1 << 20  # the longest MATH row has 16 KiB; a line without end must not fill memory
_LOGGED = 3
_CALCULATION = re.compile(r"<<([^<>=]*)=[^<>]*>>")
_ARITHMETIC = re.compile(r"[-+*/(). \d]+")
_KEPT_TEXT = 2000
_ACCEPTED = (
    "expected GSM8K (question, answer with `#### gold`), MATH (problem, solution with \\boxed{} "
    "or answer) or own rows (id, question, answer)"
)


class ProblemError(ValueError):
    """A problem file that cannot be read, or that holds no good row; one line that says why."""


class _BadRowError(ValueError):
    """What is wrong with one row: the field, its value, and what would be accepted."""


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """The good rows of a file, in its order, and how many others were set aside."""

    problems: tuple[Problem, ...]
    quarantined: int


def load_problems(
    path: str | os.PathLike[str], quarantine: str | os.PathLike[str] | None = None
) -> ProblemSet:
    """Read a problem file.

    Ids are a row's own `id`, else `{stem}/{line index}` with the index counted from 0 over all lines
    of the file, bad and blank ones too; a second row with an id is bad.  Bad rows go to
    `quarantine`, one file a load, written whole and replaced (empty where every row is good): path,
    line (from 1), reason, text.  The first few are logged.

    Errors: `ProblemError` for a file that is missing, unreadable, a broken gzip or without one good
    row.
    """
    path = Path(path)
    stem = Path(path.name.removesuffix(".gz")).stem
    problems: dict[str, Problem] = {}
    with _Quarantine(path, Path(quarantine) if quarantine is not None else None) as bad:
        for index, line in enumerate(_lines(path)):
            if not line.strip():
                continue
            try:
                problem = _problem(line, stem, index)
                if problem.id in problems:
                    raise _BadRowError(
                        f"id: {problem.id!r} is the id of an earlier row; expected one of its own"
                    )
            except _BadRowError as reason:
                bad.add(index + 1, str(reason), line)
            else:
                problems[problem.id] = problem
    if not problems:
        why = f"all {bad.count} are bad, the first: {bad.first}" if bad.count else "it is empty"
        raise ProblemError(f"{path}: no usable row; {why}; {_ACCEPTED}")
    return ProblemSet(tuple(problems.values()), bad.count)


def worked_solutions(path: str | os.PathLike[str]) -> Iterator[tuple[Problem, str]]:
    """(problem, Python code) of the rows whose solution has GSM8K's calculator annotations.

        48/2 = <<48/2=24>>24 clips      ->      print(48/2)

    Rows with an annotation that is no plain arithmetic, and bad rows, are passed over.
    """
    path = Path(path)
    stem = Path(path.name.removesuffix(".gz")).stem
    for index, line in enumerate(_lines(path)):
        if b"<<" not in line:
            continue
        with contextlib.suppress(_BadRowError):
            problem = _problem(line, stem, index)
            found = _CALCULATION.findall(_text(_parsed(line), "answer"))
            if found and all(_ARITHMETIC.fullmatch(expression) for expression in found):
                yield problem, "\n".join(f"print({expression.strip()})" for expression in found)


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or gzipped file, each cut at one byte over `MAX_ROW_BYTES`."""
    if not path.exists():
        raise ProblemError(f"{path}: no such file; expected a .jsonl or .jsonl.gz file")
    if not path.is_file():
        raise ProblemError(f"{path}: not a file; expected a .jsonl or .jsonl.gz file")
    try:
        with _opened(path) as file:
            first = True
            while line := file.readline(MAX_ROW_BYTES + 1):
                rest = line
                while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_ROW_BYTES + 1)
                yield line.removeprefix(b"\xef\xbb\xbf") if first else line
                first = False
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ProblemError(f"{path}: broken gzip ({error}); expected a whole .gz file") from error
    except OSError as error:
        raise ProblemError(f"{path}: cannot be read ({error.strerror or error})") from error


def _opened(path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if zipped or path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb")


def _problem(line: bytes, stem: str, index: int) -> Problem:
    row = _parsed(line)
    if "problem" in row:
        question, answer = _text(row, "problem"), _math_gold(row)
    elif "question" in row:
        question, answer = _text(row, "question"), _own_or_gsm8k_gold(row)
    else:
        raise _BadRowError(f"question: missing, the fields are {_short(list(row))}; {_ACCEPTED}")
    known = {"id", "question", "problem", "answer", "solution"}
    tags = {
        name: value
        for name, value in row.items()
        if name not in known and isinstance(value, str | int) and not isinstance(value, bool)
    }
    return Problem(_id(row, stem, index), question, answer, source=stem, tags=tags)


def _parsed(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise _BadRowError(f"row: longer than {MAX_ROW_BYTES} bytes; expected one problem a line")
    try:
        row = json.loads(line.decode())
        # Lone surrogates are legal JSON escapes and no text: they would fail in the tokenizer.
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise _BadRowError(f"row: not UTF-8 text ({error.reason}); {_ACCEPTED}") from error
    except RecursionError as error:
        raise _BadRowError(f"row: nested too deep; {_ACCEPTED}") from error
    except ValueError as error:
        raise _BadRowError(f"row: not JSON ({error}); {_ACCEPTED}") from error
    if not isinstance(row, dict):
        raise _BadRowError(f"row: a JSON {type(row).__name__}; expected an object: {_ACCEPTED}")
    return row


def _text(row: dict[str, Any], field: str) -> str:
    """The field as text that is not blank; a whole number counts as text."""
    if field not in row:
        raise _BadRowError(f"{field}: missing; {_ACCEPTED}")
    value = row[field]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise _BadRowError(f"{field}: {_short(value)}; expected a string that is not empty")
    return value.strip()


def _id(row: dict[str, Any], stem: str, index: int) -> str:
    return _text(row, "id") if "id" in row else f"{stem}/{index}"


def _own_or_gsm8k_gold(row: dict[str, Any]) -> str:
    answer = _text(row, "answer")
    _, mark, gold = answer.rpartition("####")
    if mark:
        # Thousands separators go, as in the data set's own grader: "1,234" is no pair of numbers.
        gold = gold.strip().replace(",", "")
        if not gold:
            raise _BadRowError(f"answer: no gold after `####` in {_short(answer[-40:])}")
        return gold
    if "id" in row:
        return answer
    raise _BadRowError(
        f"answer: no gold in {_short(answer[-40:])}; expected `#### gold` at its end, "
        "or a row with an id and the bare answer"
    )


def _math_gold(row: dict[str, Any]) -> str:
    # Imported here: SymPy behind it takes a second that `--help` need not wait for.
    from mdpo_jax.grading.extract import extract_gold

    if "answer" in row:
        return _text(row, "answer")
    solution = _text(row, "solution")
    gold = extract_gold(solution)
    if gold is None or not gold.strip():
        raise _BadRowError(
            f"solution: no gold in {_short(solution[-60:])}; expected a \\boxed{{}} that holds it"
        )
    return gold.strip()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class _Quarantine(contextlib.AbstractContextManager["_Quarantine"]):
    """Counts, logs and, where a file is named, writes bad rows; the file appears whole on leaving."""

    def __init__(self, source: Path, target: Path | None) -> None:
        self.count, self.first = 0, ""
        self._source, self._target = source, target
        self._file: TextIO | None = None

    def __enter__(self) -> _Quarantine:
        if self._target is None:
            return self
        if self._target.resolve() == self._source.resolve():
            raise ProblemError(f"quarantine: {self._target} is the problem file; expected another")
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._partial, "w", encoding="utf-8")
        except OSError as error:
            raise ProblemError(
                f"quarantine: {self._target} cannot be written ({error.strerror})"
            ) from error
        return self

    @property
    def _partial(self) -> Path:
        assert self._target is not None
        return self._target.with_name(self._target.name + ".partial")

    def add(self, line: int, reason: str, text: bytes) -> None:
        self.count += 1
        self.first = self.first or f"{self._source}:{line}: {reason}"
        if self.count <= _LOGGED:
            _log.warning("%s:%d: %s", self._source, line, reason)
        if self._file:
            shown = text.decode(errors="replace").rstrip("\r\n")[:_KEPT_TEXT]
            row = {"path": str(self._source), "line": line, "reason": reason, "text": shown}
            self._file.write(json.dumps(row) + "\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.count > _LOGGED:
            _log.warning("%s: %d bad rows in all", self._source, self.count)
        if self._file is None or self._target is None:
            return
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if error is None:
            os.replace(self._partial, self._target)
        else:
            self._partial.unlink(missing_ok=True)
