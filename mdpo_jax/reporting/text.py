"""Text of models and files made fit to show: on a page, in a plot, on one line of a terminal."""

from __future__ import annotations

import re

LONGEST = 20_000  # characters; a page with megabytes of one sample helps nobody

# C0 but tab and newline, DEL and C1, zero-width and bidirectional controls, lone surrogates.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` with control characters as escapes, cut to a length that a page can bear."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}\n[{len(text) - LONGEST} more characters]"
    return _INVISIBLE.sub(_sign, text)


def one_line(text: str, longest: int = 110) -> str:
    """`text` on one line of at most `longest` characters, control characters as escapes."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
