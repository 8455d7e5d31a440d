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
import errno
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mdpo_jax.isolation import frames
from mdpo_jax.isolation.sandbox import Level, Limits, Protection, overfull, probe, remove

_MOST_RESTARTS = 3
_LARGEST_ANSWER = 1 << 20
_LOOK = 0.25  # seconds between looks at a busy worker's folder
_TRANSFER = 1.0  # seconds that an answer which has begun may take to arrive
_MOST_FILES = 8192  # descriptors that we let ourselves have, if we may: a worker takes three
_SERVE = (
    "import sys; sys.path.insert(0, sys.argv[1]); from mdpo_jax.isolation import zygote; "
    "zygote.main(*sys.argv[2:])"
)
_servers: weakref.WeakSet[ForkServer] = weakref.WeakSet()
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
        self._folder: str | None = None
        self._workers: set[Worker] = set()  # held: one dropped unclosed keeps its pipes
        _servers.add(self)

    def fork(self, argument: Any = None) -> Worker:
        """A fresh worker.  Raises ForkServerError if the zygote, or a pipe, cannot be had."""
        with self._lock:
            while True:
                if self._closed:
                    raise ForkServerError("fork server: already closed")
                try:
                    worker = self._fork(argument, *_pipes())
                except (OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                        raise _no_descriptors(error) from None
                    self._failed(error)
                else:
                    self._failures = 0
                    return worker

    def kill(self) -> None:
        """For good: no more forks, and every call that is running ends as killed."""
        self._closed = True
        with self._lock:
            for worker in self._workers:
                worker.kill()

    def close(self) -> None:
        """End the zygote and every worker; harmless when repeated.  No call may be running."""
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
        self._channel = self._process = self._folder = None
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

    def _fork(self, argument: Any, requests: tuple[int, int], responses: tuple[int, int]) -> Worker:
        """A worker at the other ends of two pipes, (read, write) each; closes them if it fails."""
        ours, theirs = (requests[1], responses[0]), (requests[0], responses[1])
        try:
            if self._channel is None:
                self._start()
            assert self._channel is not None
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", theirs))]
            message = json.dumps({"do": "fork", "argument": argument}).encode()
            self._channel.sendmsg([message], rights)
            answer = self._answer()
            # Its pipes stay open as long as anything it started lives: this tells when it itself
            # ends.  The zygote reaps it only when we ask, so the id is still its own.
            pidfd = os.pidfd_open(answer["pid"])
        except BaseException:
            _close(ours)
            raise
        finally:
            _close(theirs)
        worker = Worker(self, answer["pid"], answer["folder"], (*ours, pidfd))
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
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < min(hard, _MOST_FILES):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _MOST_FILES), hard))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(60)  # importing sympy on a loaded machine takes seconds, not a minute
        root = str(Path(__file__).parents[2])
        # Neither the user's own packages nor the working folder shall stand in for what is meant.
        command = [sys.executable, "-s", "-P", "-c", _SERVE, root, str(theirs.fileno())]
        command.append(self._options)
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
        self._folder = self._answer()["folder"]

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
        if self._folder is not None:  # it has removed it, unless it was killed
            remove(self._folder)
            self._folder = None

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

    def __init__(self, server: ForkServer, pid: int, folder: str, fds: tuple[int, int, int]):
        self._server, self.pid, self._folder = server, pid, folder
        self._fds: tuple[int, int, int] | None = fds  # requests, responses, pidfd
        self._closing = threading.Lock()  # nobody signals through a descriptor that was closed

    def call(self, request: Any, *, timeout: float, grace: float = 0.0) -> Any:
        """The worker's answer within `timeout` seconds.

        With `grace`, a worker that is late gets a SIGINT and so many seconds more; if it then
        answers, Interrupted is raised and it can be called again.  Else raises WorkerDied; the worker
        is then gone, whatever it did.  Between calls it is stopped: what a call left running in it
        takes no time, and writes nothing, while nobody looks.
        """
        if self._fds is None:
            raise WorkerDied("killed")
        request_fd, response_fd, _ = self._fds
        late = False
        try:
            tag, deadline = os.urandom(8), time.monotonic() + timeout
            frames.drain(response_fd)
            self._signal(signal.SIGCONT)
            frames.write_frame(request_fd, request, tag, timeout=timeout)
            late = not self._answers(deadline - time.monotonic())
            if late:
                if grace:
                    self._signal(signal.SIGINT)
                if not self._answers(grace):
                    raise TimeoutError
            left = max(_TRANSFER, deadline - time.monotonic())
            echo, value = frames.read_frame(response_fd, timeout=left, largest=_LARGEST_ANSWER)
            if echo != tag:
                raise frames.FrameError("an answer to no request")
            self._signal(signal.SIGSTOP)
            self._look()
        except TimeoutError:
            self.close()
            raise WorkerDied("timeout") from None
        except (OSError, frames.FrameError):
            self.close()
            raise WorkerDied("timeout" if late else "killed") from None
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
            ready = frames.ready((response_fd, pidfd), min(left, _LOOK))
            # What it wrote before it ended is still in the pipe.
            if ready == [pidfd] and not frames.ready((response_fd,), 0):
                raise frames.FrameError("the worker has ended")
            if ready or left <= _LOOK:
                return bool(ready)
            self._look()

    def _look(self) -> None:
        """Raises WorkerDied if its folder is too full."""
        if overfull(self._folder, self._server.limits):
            self.close()
            raise WorkerDied("output_limit")

    def _signal(self, number: signal.Signals) -> None:
        with self._closing:
            if self._fds is not None:
                signal.pidfd_send_signal(self._fds[2], number)

    def kill(self) -> None:
        """End the process, also while another thread calls it: that call ends as killed."""
        with contextlib.suppress(OSError):
            self._signal(signal.SIGKILL)

    @property
    def alive(self) -> bool:
        """False once it was closed, found dead, or has ended by itself."""
        return self._fds is not None and not frames.ready(self._fds[2:], 0)

    def abandon(self) -> None:
        """Close our ends of its pipes; the process is somebody else's.

        Takes no lock: in a forked process nobody would let go of one that was held.
        """
        fds, self._fds = self._fds, None
        _close(fds or ())

    def close(self) -> None:
        """End the process and all it started; harmless when repeated."""
        with self._closing:
            gone = self._fds is None
            self.abandon()
        if not gone:
            self._server.forget(self)


def _pipes() -> tuple[tuple[int, int], tuple[int, int]]:
    """Two pipes (read, write); the second of four ends does not block."""
    fds: list[int] = []
    try:
        for _ in range(2):
            fds += os.pipe()
        os.set_blocking(fds[1], False)  # a worker that does not read must not hold us
    except OSError as error:
        _close(fds)
        raise _no_descriptors(error) from None
    return (fds[0], fds[1]), (fds[2], fds[3])


def _no_descriptors(error: OSError) -> ForkServerError:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ForkServerError(
        f"tool: no pipes for another process ({error.strerror}); each takes three descriptors, of "
        f"which this process may have {most} (`ulimit -n`)"
    )


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _after_fork() -> None:
    # A child that kept our ends of the pipes would keep the zygote alive after us.
    for server in list(_servers):
        server.abandon()


os.register_at_fork(after_in_child=_after_fork)
