"""Recorded tool-using trajectories: their code blocks, and whether a re-run says the same.

A row's format is told by its fields:

    ToRA        code        [text]; ```python blocks in the text, each with what an ```output block
                            behind it recorded
    MathCoder   segments    [{role, content}]; `code` segments, each with what an `execution`
                            segment right behind it recorded
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from mdpo_jax.environment.cells import NOTHING
from mdpo_jax.rows import short

_ACCEPTED = "expected ToRA (code: [text]) or MathCoder (segments: [{role, content}])"
_LOCATION = re.compile(r"\s*(?:Cell In\[\d+\], line \d+|File .+, line \d+)\n")
_ERROR_LINE = re.compile(r"\s*[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Iteration)(?::.*)?")


class Block(NamedTuple):
    """A code block and the output that was recorded for it; None where there is none."""

    code: str
    recorded: str | None


Agreement = Literal[
    "value equal", "value different",
    "error equal", "error same line", "error different",
    "unrecorded",
]  # fmt: skip


def fault(row: Any) -> str:
    """What keeps a row from being a recorded trajectory: field, value, what is accepted; or ""."""
    if not isinstance(row, dict):
        return f"{short(row)}: not an object; {_ACCEPTED}"
    if not isinstance(identity(row), str | int | None):
        return f"id: {short(identity(row))}; expected a string or a number"
    if "segments" in row:
        segments = row["segments"]
        if isinstance(segments, list) and all(map(_is_segment, segments)):
            return ""
        return f"segments: {short(segments)}; expected a list of {{role, content}}"
    if "code" in row:
        texts = row["code"]
        if isinstance(texts, list) and len(texts) == 1 and isinstance(texts[0], str):
            return ""
        return f"code: {short(texts)}; expected a list of one text"
    return f"segments: missing, the fields are {short(list(row))}; {_ACCEPTED}"


def identity(row: dict[str, Any]) -> str | int | None:
    """The row's own id: `id` or `idx`, else `file_row` (MathCoder's `mathematics` has no more)."""
    return next((row[n] for n in ("id", "idx", "file_row") if row.get(n) is not None), None)


def blocks_of(row: dict[str, Any]) -> list[Block]:
    """The code blocks of a row without `fault`, in order."""
    if "segments" not in row:
        return list(_in_text(row["code"][0]))
    closed = [*row["segments"], {"role": "end", "content": ""}]
    return [
        Block(this["content"], after["content"] if after["role"] == "execution" else None)
        for this, after in itertools.pairwise(closed)
        if this["role"] == "code"
    ]


def agreement(recorded: str | None, output: str) -> Agreement:
    """How a re-run's output compares with the recording.

    Outer blank space does not count (recordings have been stripped of it), nor how it is said that
    there was no output: an empty recording equals `Result is not defined`.  A `value` is a recording
    that is no error report.  Of an error a notebook records the whole traceback where we say
    `Name: message`, so one is `error same line` if its last line is all that we say.
    """
    if recorded is None:
        return "unrecorded"
    theirs, ours = recorded.strip() or NOTHING, output.strip()
    if not is_error_report(recorded):
        return "value equal" if ours == theirs else "value different"
    if ours == theirs:
        return "error equal"
    same = ours == theirs.splitlines()[-1].strip()
    return "error same line" if same else "error different"


def is_error_report(recorded: str) -> bool:
    """Whether a recording says that the block failed rather than what it gave.

    Three forms: a traceback (also behind what the block printed, or a warning); a syntax error
    (`Cell In[2], line 2`, the source line, a caret, `SyntaxError: ...`); and the bare last line
    of either (`NameError: name 'x' is not defined`).
    """
    lines = recorded.strip().splitlines()
    if not lines:
        return False
    last_is_error = bool(_ERROR_LINE.fullmatch(lines[-1]))
    if "Traceback (most recent call last)" in recorded:
        return True
    return last_is_error and (len(lines) == 1 or bool(_LOCATION.match(recorded)))


def _in_text(text: str) -> Iterator[Block]:
    """Blocks of ToRA's text; an unterminated one is dropped, as the tool would not have run it."""
    code: str | None = None  # of a block whose output may follow
    inside, lines = "", []
    for line in text.split("\n"):
        if inside:
            if not line.strip().startswith("```"):
                lines.append(line)
                continue
            if inside == "output":
                yield Block(code or "", "\n".join(lines))
                code = None
            else:
                code = "\n".join(lines)
            inside, lines = "", []
        elif "```python" in line:
            if code is not None:
                yield Block(code, None)
            code, inside = None, "python"
        elif line.strip().startswith("```output") and code is not None:
            inside = "output"
    if code is not None:
        yield Block(code, "\n".join(lines) if inside == "output" and lines else None)


def _is_segment(segment: Any) -> bool:
    return isinstance(segment, dict) and all(
        isinstance(segment.get(name), str) for name in ("role", "content")
    )
