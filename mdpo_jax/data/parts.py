"""What each token of a trajectory is to the metrics: text, code or answer of an action."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from mdpo_jax.chat import Chat
from mdpo_jax.types import PART_OF_ROLE, Part, Trajectory


def parts_of(trajectory: Trajectory, chat: Chat) -> Int[np.ndarray, " length"]:
    """[length] int32 of `Part`.

    A closed ```python block is code, fences included; from the last `\\boxed` of the last action on
    it is the answer, end of turn included; all else that the policy wrote is text.  A token across
    an edge belongs to the inner part.
    """
    parts = PART_OF_ROLE[trajectory.roles]
    actions = trajectory.actions
    for span in actions:
        ids = trajectory.ids[span]
        text = chat.decode(ids)
        for start, end in _code(text):
            _mark(parts[span], ids, chat, start, end, Part.CODE)
        answer = text.rfind("\\boxed")
        if span == actions[-1] and answer >= 0:
            first = _token(ids, chat, answer)
            parts[span][first:] = Part.ANSWER
    return parts


def _code(text: str) -> Iterator[tuple[int, int]]:
    """[start, end) characters of the closed blocks, as `environment.tool.code_blocks` finds them."""
    place, start = 0, None
    for line in text.split("\n"):
        if start is None:
            start = place + line.index("```python") if "```python" in line else None
        elif line.strip().startswith("```"):
            yield start, place + len(line)
            start = None
        place += len(line) + 1


def _mark(parts: np.ndarray, ids: np.ndarray, chat: Chat, start: int, end: int, part: Part) -> None:
    parts[_token(ids, chat, start) : _token(ids, chat, end - 1) + 1] = part


def _token(ids: np.ndarray, chat: Chat, character: int) -> int:
    """The token that holds a character of the decoded ids."""

    def characters(count: int) -> int:
        # A character of several tokens is not there, but as U+FFFD, until its last one is.
        return len(chat.decode(ids[:count]).rstrip("\ufffd"))

    return bisect.bisect_right(range(1, len(ids) + 1), character, key=characters)
