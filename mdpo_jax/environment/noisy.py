"""A tool whose observations sometimes start with a warning, as those of real tools do."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future

from mdpo_jax.environment.tool import Observation, Session, Tool


def warning_line(number: int, fraction: int) -> str:
    """The noise: 8 digits and 4 decimals; demonstrations show the same line (data/synthetic.py)."""
    return f"Warning: {number:08d} slow call 0.{fraction:04d} s"


class NoisyTool:
    """Puts a warning line before an observation with the given probability.

    Which one, and its digits, follow from (seed, trajectory key, turn) alone.
    """

    def __init__(self, tool: Tool, probability: float, seed: int):
        if not 0 <= probability <= 1:
            raise ValueError(f"noise: {probability}; expected a probability")
        self._tool, self._probability, self._seed = tool, probability, seed

    def start(self, key: str) -> Session:
        """A session of the tool beneath, with noise."""
        return _Session(self._tool.start(key), self._probability, f"{self._seed}/{key}")

    def close(self) -> None:
        """Close the tool beneath."""
        self._tool.close()


class _Session:
    def __init__(self, session: Session, probability: float, key: str):
        self._session, self._probability, self._key = session, probability, key
        self._turn = 0

    def run(self, action: str) -> Future[Observation]:
        digest = hashlib.sha256(f"{self._key}/{self._turn}".encode()).digest()
        self._turn += 1
        inner = self._session.run(action)
        if int.from_bytes(digest[:4], "big") >= self._probability * 2**32:
            return inner
        number, fraction = (int.from_bytes(digest[i : i + 4], "big") for i in (4, 8))
        warning = warning_line(number % 10**8, fraction % 10**4)
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
            outer.set_result(Observation(f"{warning}\n{seen.text}", seen.status, seen.seconds))

        inner.add_done_callback(pass_on)
        return outer

    def close(self) -> None:
        self._session.close()
