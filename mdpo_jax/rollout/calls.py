"""Tool calls in flight: none is waited for beyond a bound, and each knows when it ran."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from mdpo_jax.environment.tool import Observation, Session

STUCK = "Timeout Error"  # what the policy reads, as of a block that ran too long


class Call:
    """One call; `ended` is None while it runs.  patience: seconds, None for any."""

    def __init__(self, guard: Guarded, future: Future[Observation], patience: float | None):
        self.future, self._guard, self._patience = future, guard, patience
        self.begun, self.ended = time.monotonic(), None
        self.stuck = False
        future.add_done_callback(self._end)

    def _end(self, _: Future[Observation]) -> None:
        self.ended = self.ended or time.monotonic()

    @property
    def left(self) -> float | None:
        """Seconds that it may still take."""
        if self._patience is None:
            return None
        return max(0.0, self._patience - (time.monotonic() - self.begun))

    @property
    def ready(self) -> bool:
        """Whether `result` returns at once."""
        return self.future.done() or self.left == 0.0

    def result(self) -> Observation:
        """What the tool said; at the end of the patience, that it timed out."""
        concurrent.futures.wait([self.future], self.left)
        if self.future.done():
            return self.future.result()
        self.future.cancel()
        self.stuck, self.ended = True, time.monotonic()
        self._guard.abandon()
        return Observation(STUCK, "timeout", self.ended - self.begun)


def wait_for_one(calls: Sequence[Call]) -> None:
    """Until one of the calls is ready."""
    futures = [call.future for call in calls]
    concurrent.futures.wait(futures, soonest(calls), return_when=concurrent.futures.FIRST_COMPLETED)


def soonest(calls: Sequence[Call]) -> float | None:
    """Seconds until the first of the calls is out of patience; None if none ever is."""
    return min((left for call in calls if (left := call.left) is not None), default=None)


class Guarded:
    """A session whose calls are bounded.  After one that was stuck the session is not asked again."""

    def __init__(self, session: Session, patience: float | None):
        self._session, self._patience, self._abandoned = session, patience, False

    def run(self, action: str) -> Call:
        """Start a call."""
        if self._abandoned:
            answer: Future[Observation] = Future()
            answer.set_result(Observation(STUCK, "timeout", 0.0))
        else:
            answer = self._session.run(action)
        return Call(self, answer, self._patience)

    def abandon(self) -> None:
        """A call is stuck."""
        self._abandoned = True

    def close(self) -> None:
        """End the session; without waiting for it where a call is stuck."""
        if self._abandoned:
            threading.Thread(target=self._session.close, daemon=True).start()
        else:
            self._session.close()
