"""Length-prefixed JSON over a pipe, the same on both sides of a fork.

A request carries a tag that its answer must repeat: bytes that a cell wrote to the pipe before it
was asked, or blindly, are then no answer and shift no later one.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from collections.abc import Sequence
from typing import Any

_HEAD = struct.Struct(">8sI")
# Held here: a cell shares the worker's modules, and may have put something else in their place.
_pieces, _loads, _read_fd, _write_fd = json.JSONEncoder().iterencode, json.loads, os.read, os.write
NO_TAG = bytes(8)


class FrameError(Exception):
    """The other side ended, sent what is no frame, or sent more than was allowed."""


def write_frame(fd: int, value: Any, tag: bytes = NO_TAG, *, timeout: float | None = None) -> None:
    """Send one JSON value.

    Raises OSError if the other side is gone, and TimeoutError (for which `fd` must not block) if it
    has not read all of it after `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    data = "".join(_pieces(value)).encode("ascii")
    view = memoryview(_HEAD.pack(tag, len(data)) + data)
    while view:
        if deadline is not None:
            _await(fd, select.POLLOUT, deadline)
        view = view[_write_fd(fd, view) :]


def read_frame(
    fd: int, *, timeout: float | None = None, largest: int = 64 << 20
) -> tuple[bytes, Any]:
    """A frame's tag and JSON value.  TimeoutError after `timeout` seconds, FrameError otherwise."""
    deadline = None if timeout is None else time.monotonic() + timeout
    tag, length = _HEAD.unpack(_read(fd, _HEAD.size, deadline))
    if length > largest:
        raise FrameError(f"a frame of {length} bytes; at most {largest} are accepted")
    try:
        return tag, _loads(_read(fd, length, deadline))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not a JSON frame: {error}") from None


def ready(fds: Sequence[int], seconds: float) -> list[int]:
    """Those of the descriptors that have something to read, or have ended, within so many seconds."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(_milliseconds(seconds))]


def drain(fd: int) -> None:
    """Throw away what is there to read; FrameError if the other side has ended."""
    while ready((fd,), 0):
        if not _read_fd(fd, 1 << 16):
            raise FrameError("the other side has ended")


def _read(fd: int, count: int, deadline: float | None) -> bytes:
    parts = []
    while count:
        if deadline is not None:
            _await(fd, select.POLLIN, deadline)
        part = _read_fd(fd, min(count, 1 << 16))
        if not part:
            raise FrameError("the other side has ended")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _await(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(_milliseconds(left)):
        raise TimeoutError


def _milliseconds(seconds: float) -> float:
    return min(max(0.0, seconds) * 1000, 1e9)  # poll takes an int of 32 bits
