"""The final answer in a text: the last box, or GSM8K's mark."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{)?")
_GSM8K = re.compile(r"####\s*(.+)")


def extract_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}`; None if there is none or it is open."""
    matches = list(_BOX.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    if match.group(1) is None:  # \boxed 5
        bare = text[match.end() :].split("$")[0].split("\n")[0].strip()
        return bare or None
    depth = 1
    for index in range(match.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[match.end() : index].strip()
    return None


def extract_gsm8k(text: str) -> str | None:
    """The gold of a GSM8K solution: what follows `####`, thousands commas removed."""
    match = _GSM8K.search(text)
    return match.group(1).strip().replace(",", "") if match else None
