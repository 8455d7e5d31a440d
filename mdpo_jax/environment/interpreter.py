"""The Python tool: one live process a trajectory, in which state persists over its turns."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mdpo_jax.environment.cells import NOTHING
from mdpo_jax.environment.tool import Observation, Status, code_blocks
from mdpo_jax.isolation.forkserver import ForkServer, ForkServerError, Worker, WorkerDied
from mdpo_jax.isolation.sandbox import MIB, Limits

_DEATH_TEXT = {"timeout": "Timeout Error", "killed": "The process was killed"}
_OUTPUT_CHARS = 20_000


class PythonInterpreter:
    """A tool that runs the ```python blocks of an action as notebook cells.

    timeout: seconds of wall clock for the blocks of one action.  workers: actions that run at one
    time (0: twice the cores); idle live processes do not count.  preload: modules that are warm.
    cache: run equal histories of blocks once; only for code whose output depends on nothing else,
    as every trajectory then shares one seed.
    """

    def __init__(
        self,
        *,
        timeout: float = 20.0,
        memory_mb: int = 2048,
        workers: int = 0,
        preload: Sequence[str] = ("math", "numpy", "sympy"),
        cache: bool = False,
    ):
        limits = Limits(address_space_bytes=memory_mb * MIB)
        if "numpy" in preload:
            # numpy loads it at first use, which would be in every single worker: 25 ms each
            preload = (*preload, "numpy.random")
        self._server = ForkServer("mdpo_jax.environment.cells:serve", preload, limits)
        self._pool = ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1), "tool")
        self._timeout = timeout
        self.cache: dict[tuple[str, ...], Observation] | None = {} if cache else None
        self.executed = 0

    def start(self, key: str) -> _Session:
        """A session whose `random` and `numpy` seeds derive from `key`; its process starts late."""
        return _Session(self, "shared" if self.cache is not None else key)

    def close(self) -> None:
        """End all sessions and their processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._server.close()

    def __enter__(self) -> PythonInterpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Session:
    """One trajectory's process: started at its first block, rebuilt by replay when it died."""

    def __init__(self, tool: PythonInterpreter, key: str):
        self._tool, self._key = tool, key
        self._worker: Worker | None = None
        self._history: tuple[str, ...] = ()  # all blocks so far: what the cache goes by
        self._alive: list[str] = []  # blocks that succeeded: what a new process replays
        self._lock = threading.Lock()

    def run(self, action: str) -> Future[Observation]:
        """Run the action's blocks in order; the last one's output is the observation."""
        return self._tool._pool.submit(self._run, code_blocks(action))

    def run_cell(self, code: str) -> Future[Observation]:
        """Run code that stands in no action, as one cell."""
        return self._tool._pool.submit(self._run, [code])

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._drop()

    def _run(self, blocks: list[str]) -> Observation:
        if not blocks:
            return Observation(NOTHING, "refused", 0.0)
        cache = self._tool.cache
        with self._lock:
            self._history += tuple(blocks)
            known = None if cache is None else cache.get(self._history)
            if known is not None:
                # The process, if any, has not run these blocks: the next miss starts anew.
                self._drop()
                observation = known
            else:
                observation = self._execute(blocks)
                # How long a block may run depends on the machine's load, so that is not shared.
                if cache is not None and observation.status not in ("timeout", "killed"):
                    cache[self._history] = observation
            if observation.status in ("ok", "error"):
                self._alive += blocks
            return observation

    def _execute(self, blocks: list[str]) -> Observation:
        start = time.monotonic()
        # A worker may be killed by somebody else (the kernel short of memory, an operator), and the
        # observation must not depend on it: what dies twice died of its own code.
        for attempt in range(2):
            try:
                text, status = self._call(blocks)
            except ForkServerError:
                raise
            except WorkerDied as death:
                self._worker = None
                if death.reason == "killed" and attempt == 0:
                    continue
                text, status = _DEATH_TEXT[death.reason], death.reason
            return Observation(text, status, time.monotonic() - start)  # pyright: ignore
        raise AssertionError("unreachable: the second attempt returns")

    def _call(self, blocks: list[str]) -> tuple[str, Status]:
        if self._worker is None:
            seed = int.from_bytes(hashlib.sha256(self._key.encode()).digest()[:4], "big")
            self._worker = self._tool._server.fork({"seed": seed, "output_chars": _OUTPUT_CHARS})
            if self._alive:
                self._worker.call({"blocks": self._alive}, timeout=self._tool._timeout)
        self._tool.executed += 1
        answer = self._worker.call({"blocks": blocks}, timeout=self._tool._timeout)
        text, status = _checked(answer)
        if text is None:
            self._drop()
            raise WorkerDied("killed")
        return text, status

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _checked(answer: Any) -> tuple[str | None, Status]:
    """Text and status of an answer; no text if it is not one that `cells` gives."""
    if not isinstance(answer, dict):
        return None, "killed"
    text, status = answer.get("text"), answer.get("status")
    if not isinstance(text, str) or status not in ("ok", "error", "memory", "output_limit"):
        return None, "killed"
    # an answer may carry "\\ud800", which JSON allows and UTF-8 does not
    return text.encode("utf-8", "replace").decode("utf-8")[: 2 * _OUTPUT_CHARS], status
