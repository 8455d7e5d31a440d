"""Whether the tool says the same twice: M-DPO is exact only if it does (docs/theory.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from mdpo_jax.environment.tool import Observation

_KEPT = 20  # differing calls that are kept to be shown
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rechecks:
    """Calls that were run again in a fresh process, those whose output then differed, and examples.

    An example has `call`, `first` and `second`.  A second run that did not end in time is not counted.
    """

    checked: int = 0
    differed: int = 0
    examples: tuple[dict[str, str], ...] = ()

    @property
    def rate(self) -> float | None:
        """Share of checked calls that differed; None if none was checked."""
        return self.differed / self.checked if self.checked else None


class Checks:
    """Runs calls again, on a thread of its own, so that no trajectory waits.  For any thread.

    share: of the calls, those to run again.
    """

    def __init__(self, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"check_determinism: {share}; expected a share from 0 to 1")
        self.share = share
        self._pool = ThreadPoolExecutor(1, "recheck") if share else None
        self._under_way: deque[Future[None]] = deque()
        self._found = Rechecks()

    def submit(
        self, call: str, first: Observation, again: Callable[[], tuple[str, str] | None]
    ) -> None:
        """Run a call again: `again` gives its second text and status, or None if it says nothing."""
        if self._pool is not None:
            # After `close` nobody asks for the result.
            with contextlib.suppress(RuntimeError):
                self._under_way.append(self._pool.submit(self._compare, call, first, again))

    def result(self) -> Rechecks:
        """The counts, once every re-run has ended.  Raises what a re-run raised."""
        while self._under_way:
            self._under_way[0].result()
            self._under_way.popleft()
        return self._found

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _compare(
        self, call: str, first: Observation, again: Callable[[], tuple[str, str] | None]
    ) -> None:
        second = again()
        if second is None:
            return
        text, status = second
        found, same = self._found, (first.text, first.status) == (text, status)
        examples = found.examples
        if not same and len(examples) < _KEPT:
            shown = text if status == first.status else f"[{status}] {text}"
            examples += ({"call": call, "first": first.text, "second": shown},)
        if not same and not found.differed:
            log.warning("tool: %s said %.80r and then %.80r", call, first.text, text)
        self._found = Rechecks(found.checked + 1, found.differed + (not same), examples)


def chosen(call: str, share: float) -> bool:
    """Whether a call is among the share that is run again: by its name, not by chance."""
    digest = hashlib.sha256(f"again/{call}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32
