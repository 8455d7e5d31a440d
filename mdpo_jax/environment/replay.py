"""A session brought to where another one stands, by running its actions again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from mdpo_jax.environment.tool import Observation, Session


class Replayed:
    """A session whose first call runs `earlier` actions before its own, in order.

    Their observations are dropped: what a random tool said the first time is in the trajectory.
    """

    def __init__(self, session: Session, earlier: Sequence[str]):
        self._session, self._earlier = session, list(earlier)

    def run(self, action: str) -> Future[Observation]:
        """The observation of `action` alone."""
        actions, self._earlier = [*self._earlier, action], []
        if len(actions) == 1:
            return self._session.run(action)
        outer: Future[Observation] = Future()

        def go(index: int) -> None:
            call = self._session.run(actions[index])
            call.add_done_callback(lambda done: went(index, done))

        def went(index: int, done: Future[Observation]) -> None:
            error = None if done.cancelled() else done.exception()
            if done.cancelled():
                outer.cancel()
            elif error is not None:
                outer.set_exception(error)
            elif index + 1 < len(actions):
                go(index + 1)
            else:
                outer.set_result(done.result())

        go(0)
        return outer

    def close(self) -> None:
        self._session.close()
