"""What a rollout knows of a tool: action text in, observation out."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from typing import Literal, Protocol

Status = Literal["ok", "error", "timeout", "memory", "output_limit", "killed", "refused"]


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the policy gets to read, how the call ended, and how long it took in seconds."""

    text: str
    status: Status
    seconds: float


class Session(Protocol):
    """The tool's state for one trajectory."""

    def run(self, action: str) -> Future[Observation]:
        """Run an action; a failure is the observation's status, never an exception."""
        ...

    def close(self) -> None:
        """The trajectory is over."""
        ...


class Tool(Protocol):
    """A source of sessions."""

    def start(self, key: str) -> Session:
        """A session for the trajectory `key`, from which the tool's randomness derives."""
        ...

    def close(self) -> None:
        """End everything the tool started."""
        ...


def code_blocks(action: str) -> list[str]:
    """The closed ```python blocks of an action, in order; an unterminated one is dropped."""
    blocks: list[str] = []
    lines: list[str] | None = None
    for line in action.split("\n"):
        if lines is None:
            lines = [] if "```python" in line else None
        elif line.strip().startswith("```"):
            blocks.append("\n".join(lines))
            lines = None
        else:
            lines.append(line)
    return blocks


def wants_tool(action: str) -> bool:
    """Whether a turn runs code: it holds a ```python fence and no `boxed`, which has priority."""
    return "```python" in action and "boxed" not in action
