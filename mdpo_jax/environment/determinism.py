"""Whether the tool says the same twice: M-DPO is exact only if it does (docs/theory.md)."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
from concurrent.futures import CancelledError, Future

from mdpo_jax.environment.tool import Observation

_KEPT = 20  # differing calls that are kept to be shown
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Calls that were run again in a fresh process, those whose output then differed, and examples.

    An example has `call`, `first` and `second`.
    """

    checked: int = 0
    disagreed: int = 0
    examples: tuple[dict[str, str], ...] = ()

    @property
    def rate(self) -> float | None:
        """Share of checked calls that disagreed; None if none was checked."""
        return self.disagreed / self.checked if self.checked else None


class Checks:
    """Counts re-runs; for any thread.  share: of the calls, those to run again."""

    def __init__(self, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"check_determinism: {share}; expected a share from 0 to 1")
        self.share = share
        self._lock = threading.Lock()
        self._under_way: set[Future[None]] = set()
        self._found = Agreement()

    def expect(self, check: Future[None]) -> None:
        """A re-run that will `tell`."""
        with self._lock:
            self._under_way.add(check)
        check.add_done_callback(self._done)

    def tell(self, call: str, first: Observation, text: str, status: str) -> None:
        """What the second run of a call gave."""
        same = (first.text, first.status) == (text, status)
        with self._lock:
            found = self._found
            examples = found.examples
            if not same and len(examples) < _KEPT:
                second = text if status == first.status else f"[{status}] {text}"
                examples += ({"call": call, "first": first.text, "second": second},)
            self._found = Agreement(found.checked + 1, found.disagreed + (not same), examples)
        if not same and found.disagreed == 0:
            log.warning("tool: %s said %.80r and then %.80r", call, first.text, text)

    def result(self) -> Agreement:
        """The counts, once every re-run has ended.  Raises what a re-run raised."""
        while True:
            with self._lock:
                waiting = list(self._under_way)
            if not waiting:
                return self._found
            for check in waiting:
                try:
                    check.result()
                except CancelledError:  # the tool was closed: it is not counted
                    continue
                finally:
                    self._done(check)

    def _done(self, check: Future[None]) -> None:
        if check.cancelled() or check.exception() is None:
            with self._lock:
                self._under_way.discard(check)


def chosen(call: str, share: float) -> bool:
    """Whether a call is among the share that is run again: by its name, not by chance."""
    digest = hashlib.sha256(f"again/{call}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32
