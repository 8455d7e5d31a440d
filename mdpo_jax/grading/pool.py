"""Several workers with math-verify: a pair that is slow or hostile holds nobody else up."""

from __future__ import annotations

import os
import threading
import time
import weakref

from mdpo_jax.isolation.forkserver import ForkServer, Worker, WorkerDied
from mdpo_jax.isolation.sandbox import MIB, Limits

_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


class Pool:
    """Up to `workers` processes, forked when they are first needed and kept.  For any thread.

    A process that inherits a pool by fork starts a fork server of its own: two that write to one
    worker's pipe would read each other's verdicts.
    """

    def __init__(self, timeout: float, workers: int, memory_mb: int):
        self._timeout, self._workers, self._memory_mb = timeout, workers, memory_mb
        self._fresh()
        _pools.add(self)

    def start(self) -> None:
        """Import math-verify now and not within the first pair's time."""
        self._put(self._take())

    def call(self, request: dict[str, str]) -> dict[str, str]:
        """A worker's {"label", "rule"}; `unknown` where it had to be killed."""
        worker = self._take()
        deadline = time.monotonic() + self._timeout
        try:
            for attempt in range(2):
                try:
                    result = worker.call(request, timeout=deadline - time.monotonic())
                except WorkerDied as death:
                    # Somebody else may have killed it; what dies twice died of this pair.
                    if death.reason == "timeout" or attempt:
                        return {"label": "unknown", "rule": death.reason}
                    worker = self._server.fork()
                else:
                    if result["rule"] == "memory":  # what is left of its memory is in pieces
                        worker.close()
                    return result
            raise AssertionError("unreachable: the second attempt returns")
        finally:
            self._put(worker)

    def close(self) -> None:
        """End the workers and their server."""
        self._server.close()

    def after_fork(self) -> None:
        """In the new process: begin anew; a thread of the old one may have held a lock."""
        self._fresh()

    def _fresh(self) -> None:
        limits = Limits(address_space_bytes=self._memory_mb * MIB, cpu_seconds=24 * 3600)
        self._server = ForkServer("mdpo_jax.grading.symbolic:serve", limits=limits)
        self._room = threading.Semaphore(self._workers)
        self._lock = threading.Lock()
        self._idle: list[Worker] = []

    def _take(self) -> Worker:
        self._room.acquire()
        try:
            with self._lock:
                if self._idle:
                    return self._idle.pop()
            return self._server.fork()
        except BaseException:
            self._room.release()
            raise

    def _put(self, worker: Worker) -> None:
        with self._lock:
            if worker.alive:
                self._idle.append(worker)
        self._room.release()


def _after_fork() -> None:
    for pool in list(_pools):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork)
