"""Several HTTP servers as one: balance, timeouts, retries, and a way back for those that failed.

Python's own HTTP client, a connection a request: a connection costs nothing beside a turn's
sampling, and none that the server has closed in the meantime is ever used.  Proxies of the
environment are not asked: servers are on loopback or on the fleet's own network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mdpo_jax.rollout.wire import Malformed, ServerRefused

_log = logging.getLogger(__name__)
T = TypeVar("T")

API_KEY = "MDPO_JAX_API_KEY"  # environment variable: what the servers take as a bearer token
_CONNECT = 10.0  # seconds
_LARGEST = 64 * 2**20  # bytes of an answer
_TRANSIENT = (408, 425, 429)  # and 5xx


class ServersGone(RuntimeError):
    """No server answers; what is on disk is whole, and the same command resumes."""


class _Failed(Exception):
    """One attempt that failed.

    busy: the server works, but has too much to do.  lost: the connection broke, so the process
    behind it may be another one by now.
    """

    def __init__(self, message: str, *, busy: bool = False, lost: bool = False):
        super().__init__(message)
        self.busy, self.lost = busy, lost


@dataclasses.dataclass(frozen=True)
class Patience:
    """Seconds a request may take, retries, and how a failing server is treated.

    A retry waits about `backoff` x 2^n seconds, at most `longest`.  A server that fails `strikes`
    times in a row is left alone for `aside` seconds.
    """

    timeout: float = 600.0
    retries: int = 8
    backoff: float = 0.5
    longest: float = 30.0
    strikes: int = 3
    aside: float = 30.0


@dataclasses.dataclass(eq=False)
class Server:
    """One server and how it is doing.

    model: the name that it serves.  version: of the weights that were loaded into it, None if
    unknown.  ready: it has been prepared, and not been lost since.  kept: whatever `prepare` keeps.
    """

    url: str
    model: str = ""
    version: str | None = None
    ready: bool = False
    outstanding: int = 0
    served: int = 0
    strikes: int = 0
    aside_until: float = 0.0
    error: str = ""
    kept: Any = None
    preparing: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class Servers:
    """Requests balanced over servers; any number of threads may call.

    prepare: brings one server to where it may be asked; raises ServerRefused.  It is called at
    `start`, and again before a server that was lost or set aside is used.
    """

    def __init__(
        self, urls: Sequence[str], patience: Patience, prepare: Callable[[Server], None]
    ) -> None:
        self.all = [Server(url.rstrip("/")) for url in urls]
        self._patience, self._prepare = patience, prepare
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._sockets: set[socket.socket] = set()

    def start(self) -> None:
        """Prepare all anew.  ServerRefused if one is wrong, ServersGone if none answers."""
        self._stopped.clear()
        for server in self.all:
            server.ready, server.strikes, server.aside_until = False, 0, 0.0
        with ThreadPoolExecutor(len(self.all), "prepare") as pool:
            for refusal in list(pool.map(self._first, self.all)):
                if refusal is not None:
                    raise refusal
        if not any(server.ready for server in self.all):
            raise self._gone()

    def call(
        self, path: str, body: Callable[[Server], Any], read: Callable[[Any], T],
        last: Server | None = None,
    ) -> tuple[T, Server]:  # fmt: skip
        """What `read` makes of the answer of the least busy server, and which one that was.

        last: preferred among equals, for it may hold the prefix in its cache.  Raises ServerRefused
        for what another attempt cannot mend, ServersGone when every attempt failed.
        """
        failed: Server | None = None
        for attempt in range(self._patience.retries + 1):
            if attempt:
                self._wait(attempt)
            server = self._pick(last, failed)
            try:
                self._make_ready(server)
                found = _named(server, lambda s=server: read(self.ask(s, path, body(s))))
            except _Failed as error:
                self._failed(server, error)
                failed = server
            else:
                with self._lock:
                    server.strikes = 0
                return found, server
            finally:
                with self._lock:
                    server.outstanding -= 1
        raise self._gone()

    def ask(self, server: Server, path: str, body: Any = None) -> Any:
        """One attempt at one server: the JSON that it answers."""
        deadline = time.monotonic() + self._patience.timeout
        try:
            with self._connected(server) as connection:
                status, data = self._exchange(
                    connection, urlsplit(server.url), path, body, deadline
                )
        except TimeoutError:
            raise _Failed(f"no answer in {self._patience.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise _Failed(what, lost=True) from None
        text = " ".join(data[:300].decode("utf-8", "replace").split())  # errors are one line
        if status >= 500 or status in _TRANSIENT:
            raise _Failed(f"{path} answered {status}: {text}", busy=status == 429)
        if status != 200:
            raise ServerRefused(f"{path} answered {status}: {text}")
        try:
            return json.loads(data)
        except ValueError:
            raise Malformed(f"{path} answered what is not JSON: {text[:80]!r}") from None

    @contextlib.contextmanager
    def abandoned_on_error(self) -> Iterator[None]:
        """If the block is left early, requests in flight are cut off and not tried again."""
        self._stopped.clear()
        try:
            yield
        except BaseException:
            self._stopped.set()
            with self._lock:
                for sock in self._sockets:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
            raise

    @contextlib.contextmanager
    def _connected(self, server: Server) -> Iterator[http.client.HTTPConnection]:
        parts = urlsplit(server.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        seconds = min(_CONNECT, self._patience.timeout)
        connection = kind(parts.hostname or "", parts.port, timeout=seconds)
        sock = None
        try:
            connection.connect()
            sock = connection.sock
            with self._lock:
                self._sockets.add(sock)
            if self._stopped.is_set():
                raise OSError("abandoned")
            yield connection
        finally:
            with self._lock:
                self._sockets.discard(sock)  # pyright: ignore[reportArgumentType]
            connection.close()

    def _exchange(
        self, connection: http.client.HTTPConnection, parts: Any, path: str, body: Any,
        deadline: float,
    ) -> tuple[int, bytes]:  # fmt: skip
        """Status and body; TimeoutError once the deadline has passed, however slowly they drip in."""
        sock = connection.sock

        def hurry() -> None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            sock.settimeout(left)

        headers = {"Accept": "application/json", "Connection": "close"}
        if os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        hurry()
        connection.request("GET" if data is None else "POST", parts.path + path, data, headers)
        hurry()
        response = connection.getresponse()
        chunks, size = [], 0
        while True:
            hurry()
            chunk = response.read1(2**16)
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
            if size > _LARGEST:
                raise http.client.HTTPException(f"an answer of more than {_LARGEST} bytes")
        if response.length:  # closed before the promised end
            raise http.client.IncompleteRead(b"".join(chunks), response.length)
        return response.status, b"".join(chunks)

    def _first(self, server: Server) -> ServerRefused | None:
        """Prepare one; a refusal is returned, a server that does not answer is set aside."""
        for attempt in range(self._patience.retries + 1):
            if attempt:
                self._wait(attempt)
            try:
                _named(server, lambda: self._prepare(server))
            except ServerRefused as refusal:
                return refusal
            except _Failed as error:
                server.error = str(error)
                server.version = None if error.lost else server.version
            else:
                server.ready = True
                return None
        server.aside_until = time.monotonic() + self._patience.aside
        _log.warning("rollout: %s does not answer, set aside: %s", server.url, server.error)
        return None

    def _make_ready(self, server: Server) -> None:
        """Prepare a server that came back.  What refuses now is as if it had not come back."""
        if server.ready:
            return
        with server.preparing:
            if server.ready:
                return
            if server.aside_until > time.monotonic():
                raise _Failed(server.error)
            try:
                _named(server, lambda: self._prepare(server))
            except ServerRefused as refusal:
                server.strikes = self._patience.strikes
                raise _Failed(str(refusal)) from None
            server.ready = True

    def _pick(self, last: Server | None, failed: Server | None) -> Server:
        """The least busy server, one that just failed last; waits while all are set aside."""
        while True:
            now = time.monotonic()
            with self._lock:
                open_ = [s for s in self.all if s.aside_until <= now]
                # One request at a time finds out whether a lost server is back.
                found = [s for s in open_ if s.ready or not s.outstanding] or open_
                if found:
                    best = min(
                        found, key=lambda s: (s is failed, s.outstanding, s is not last, s.served)
                    )
                    best.outstanding += 1
                    best.served += 1
                    return best
                first = min(s.aside_until for s in self.all)
            self._sleep(first - now)

    def _failed(self, server: Server, error: _Failed) -> None:
        with self._lock:
            server.error = str(error)
            if error.lost:
                server.ready, server.version = False, None
            if error.busy:
                return
            server.strikes += 1
            if server.strikes >= self._patience.strikes:
                if server.aside_until <= time.monotonic():
                    _log.warning("rollout: %s set aside: %s", server.url, server.error)
                server.ready = False
                server.aside_until = time.monotonic() + self._patience.aside

    def _wait(self, attempt: int) -> None:
        """Twice as long each time, give or take a half, so that not all come back at once."""
        p = self._patience
        self._sleep(min(p.longest, p.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5))

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(max(seconds, 0.0)):
            raise ServersGone("abandoned")

    def _gone(self) -> ServersGone:
        each = "; ".join(f"{s.url} ({s.error or 'not asked'})" for s in self.all)
        times = self._patience.retries + 1
        return ServersGone(f"rollout.servers: none answered in {times} attempts: {each}")


def _named(server: Server, work: Callable[[], T]) -> T:
    """Refusals and malformed answers with the server's name."""
    try:
        return work()
    except ServerRefused as refusal:
        raise ServerRefused(f"{server.url}: {refusal}") from None
    except Malformed as error:
        raise _Failed(str(error)) from None
