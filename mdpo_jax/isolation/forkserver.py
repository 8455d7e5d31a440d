"""Workers that can always be killed: forked from a warm process, supervised from outside.

    our process --socket--> zygote (warm, single-threaded) --fork--> worker, worker, ...
         \\______________ request / response pipes __________________/

Any thread may start, call and close workers.  When our process dies, by SIGKILL too, the socket
closes and the zygote takes all workers with it.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdpo_jax.isolation import frames, zygote
from mdpo_jax.isolation.sandbox import Level, Limits, Protection, overfull, probe

_MOST_RESTARTS = 3
_LARGEST_ANSWER = 1 << 20
_LOOK = 0.25  # seconds between looks at a busy worker's folder
_TRANSFER = 1.0  # seconds that an answer which has begun may take to arrive
log = logging.getLogger(__name__)


class ForkServerError(RuntimeError):
    """The zygote could not be started, or died again and again."""


class WorkerDied(Exception):
    """A worker ended, was killed at its deadline, or answered with what is no frame.

    reason: `timeout`, `killed`, or `output_limit` where it filled its folder.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Interrupted(Exception):
    """A worker stopped what it did at its deadline, and lives."""


class ForkServer:
    """Forks workers that run `target` ("module:function").

    The function takes the argument given to `fork` and returns the handler that answers requests;
    both travel as JSON.  `preload`: modules imported once, before the first fork.  sandbox: what
    confines a worker (sandbox.probe); raises SandboxError for one that is required and not there.
    """

    def __init__(
        self, target: str, preload: Sequence[str] = (), limits: Limits | None = None,
        sandbox: Level = "hardened",
    ):  # fmt: skip
        self.protection: Protection = probe(sandbox)
        self.limits = limits or Limits()
        self._options = json.dumps(
            {
                "target": target,
                "preload": list(preload),
                "limits": dataclasses.asdict(self.limits),
                "protection": dataclasses.asdict(self.protection),
            }
        )
        self._lock = threading.RLock()
        self._process: subprocess.Popen | None = None
        self._channel: socket.socket | None = None
        self._failures = 0
        self._closed = False
        self._workers: set[Worker] = set()  # held: one dropped unclosed keeps its pipes

    def fork(self, argument: Any = None) -> Worker:
        """A fresh worker.  Raises ForkServerError if the zygote cannot be had."""
        with self._lock:
            while True:
                try:
                    worker = self._fork(argument)
                except (OSError, ValueError) as error:
                    self._failed(error)
                else:
                    self._failures = 0
                    return worker

    def close(self) -> None:
        """End the zygote and every worker; harmless when repeated."""
        with self._lock:
            self._closed = True
            self._stop()
            for worker in list(self._workers):
                worker.close()

    def abandon(self) -> None:
        """In a process forked from ours: let go of our zygote and workers without a word to them."""
        self._closed = True
        if self._channel is not None:
            self._channel.close()
        self._channel = self._process = None
        for worker in self._workers:
            worker.abandon()
        self._workers.clear()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The zygote's process id, None before the first fork."""
        return None if self._process is None else self._process.pid

    def forget(self, worker: Worker) -> None:
        """End a worker and all it started; a worker of a zygote that is gone is dead already."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._workers.discard(worker)
            if self._channel is not None:
                self._ask({"do": "kill", "pid": worker.pid})

    def _fork(self, argument: Any) -> Worker:
        if self._channel is None:
            self._start()
        assert self._channel is not None
        request_read, request_write = os.pipe()
        response_read, response_write = os.pipe()
        os.set_blocking(request_write, False)  # a worker that does not read must not hold us
        try:
            fds = array.array("i", [request_read, response_write])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
            message = json.dumps({"do": "fork", "argument": argument}).encode()
            self._channel.sendmsg([message], rights)
            answer = self._answer()
        except (OSError, ValueError):
            os.close(request_write)
            os.close(response_read)
            raise
        finally:
            os.close(request_read)
            os.close(response_write)
        try:
            worker = Worker(self, answer["pid"], answer["folder"], request_write, response_read)
        except OSError:  # the zygote has just ended, and its workers with it
            os.close(request_write)
            os.close(response_read)
            raise
        self._workers.add(worker)
        return worker

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._channel is not None
        self._channel.send(json.dumps(request).encode())
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._channel is not None
        data = self._channel.recv(4096)
        if not data:
            raise ConnectionError("the fork server has ended")
        return json.loads(data)

    def _start(self) -> None:
        if self._closed:
            raise ForkServerError("fork server: already closed")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(60)  # importing sympy on a loaded machine takes seconds, not a minute
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-s", zygote.__file__, root, str(theirs.fileno()), self._options]
        # An interpreter outside the system's places may need the second to find its own library.
        kept = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH") if k in os.environ}
        environment = kept | {"PYTHONHASHSEED": "0"}
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        self._channel = ours
        self._answer()

    def _stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._stop()
        if self._failures > _MOST_RESTARTS:
            raise ForkServerError(
                f"tool: the fork server ended {self._failures} times in a row ({error}); "
                "is the machine out of memory or processes?"
            )
        log.warning("tool: the fork server has ended (%s); starting a new one", error)


class Worker:
    """One forked process.  Not for two threads at a time."""

    def __init__(
        self, server: ForkServer, pid: int, folder: str, request_fd: int, response_fd: int
    ):  # fmt: skip
        self._server, self.pid, self._folder = server, pid, folder
        self._fds: tuple[int, ...] | None = (request_fd, response_fd)
        # Its pipes stay open as long as anything it started lives: this tells when it itself ends.
        # The zygote reaps it only when we ask, so the id is still its own.
        self._fds += (os.pidfd_open(pid),)

    def call(self, request: Any, *, timeout: float, grace: float = 0.0) -> Any:
        """The worker's answer within `timeout` seconds.

        With `grace`, a worker that is late gets a SIGINT and so many seconds more; if it then
        answers, Interrupted is raised and it can be called again.  Else raises WorkerDied; the worker
        is then gone, whatever it did.
        """
        if self._fds is None:
            raise WorkerDied("killed")
        request_fd, response_fd, pidfd = self._fds
        try:
            tag, deadline = os.urandom(8), time.monotonic() + timeout
            frames.write_frame(request_fd, request, tag, timeout=timeout)
            late = not self._answers(deadline - time.monotonic())
            if late:
                if grace:
                    signal.pidfd_send_signal(pidfd, signal.SIGINT)
                if not self._answers(grace):
                    raise TimeoutError
            left = max(_TRANSFER, deadline - time.monotonic())
            echo, value = frames.read_frame(response_fd, timeout=left, largest=_LARGEST_ANSWER)
            if echo != tag:
                raise frames.FrameError("an answer to no request")
        except TimeoutError:
            self.close()
            raise WorkerDied("timeout") from None
        except (OSError, frames.FrameError):
            self.close()
            raise WorkerDied("killed") from None
        if late:
            raise Interrupted
        return value

    def _answers(self, seconds: float) -> bool:
        """Whether an answer begins to come so soon.

        Raises FrameError if the process has ended, WorkerDied if its folder is too full.
        """
        assert self._fds is not None
        _, response_fd, pidfd = self._fds
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            ready = frames.readable((response_fd, pidfd), min(left, _LOOK))
            # What it wrote before it ended is still in the pipe.
            if ready == [pidfd] and not frames.readable((response_fd,), 0):
                raise frames.FrameError("the worker has ended")
            if ready or left <= _LOOK:
                return bool(ready)
            if overfull(self._folder, self._server.limits):
                self.close()
                raise WorkerDied("output_limit")

    @property
    def alive(self) -> bool:
        """False once it was closed or found dead."""
        return self._fds is not None

    def abandon(self) -> None:
        """Close our ends of its pipes; the process is somebody else's."""
        for fd in self._fds or ():
            os.close(fd)
        self._fds = None

    def close(self) -> None:
        """End the process and all it started; harmless when repeated."""
        if self._fds is not None:
            self.abandon()
            self._server.forget(self)
