"""A random tool: now and then its observations come with a warning, or with a wrong number."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import Future

from mdpo_jax.environment.tool import Observation, Session, Tool


def warning_line(number: int, fraction: int) -> str:
    """The noise: 8 digits and 4 decimals; demonstrations show the same line (data/synthetic.py)."""
    return f"Warning: {number:08d} slow call 0.{fraction:04d} s"


def with_warning(text: str, number: int, fraction: int) -> str:
    """The text behind a warning line."""
    return f"{warning_line(number % 10**8, fraction % 10**4)}\n{text}"


def with_wrong_number(text: str, number: int, fraction: int) -> str:
    """The text with its last integer off by 1 to 9, and never below 0; else as it is."""
    *_, last = [None, *re.finditer(r"\d+", text)]
    if last is None:
        return text
    value, off = int(last.group()), 1 + number % 9
    wrong = value - off if fraction % 2 and value >= off else value + off
    return f"{text[: last.start()]}{wrong}{text[last.end() :]}"


class NoisyTool:
    """Alters an observation with the given probability; by default with a warning line before it.

    Which one, and how, follow from (seed, trajectory key, turn) alone.  alter: of the text and two
    random 32-bit numbers.
    """

    def __init__(
        self, tool: Tool, probability: float, seed: int | str,
        alter: Callable[[str, int, int], str] = with_warning,
    ):  # fmt: skip
        if not 0 <= probability <= 1:
            raise ValueError(f"noise: {probability}; expected a probability")
        self._tool, self._probability, self._seed = tool, probability, seed
        self._alter = alter

    def start(self, key: str) -> Session:
        """A session of the tool beneath, with noise."""
        inner = self._tool.start(key)
        return _Session(inner, self._probability, f"{self._seed}/{key}", self._alter)

    def close(self) -> None:
        """Close the tool beneath."""
        self._tool.close()


class _Session:
    def __init__(
        self, session: Session, probability: float, key: str,
        alter: Callable[[str, int, int], str],
    ):  # fmt: skip
        self._session, self._probability, self._key = session, probability, key
        self._alter, self._turn = alter, 0

    def run(self, action: str) -> Future[Observation]:
        digest = hashlib.sha256(f"{self._key}/{self._turn}".encode()).digest()
        self._turn += 1
        inner = self._session.run(action)
        if int.from_bytes(digest[:4], "big") >= self._probability * 2**32:
            return inner
        number, fraction = (int.from_bytes(digest[i : i + 4], "big") for i in (4, 8))
        outer: Future[Observation] = Future()

        def pass_on(done: Future[Observation]) -> None:
            if done.cancelled():
                outer.cancel()
                return
            error = done.exception()
            if error is not None:
                outer.set_exception(error)
                return
            seen = done.result()
            text = self._alter(seen.text, number, fraction)
            outer.set_result(Observation(text, seen.status, seen.seconds))

        inner.add_done_callback(pass_on)
        return outer

    def close(self) -> None:
        self._session.close()
