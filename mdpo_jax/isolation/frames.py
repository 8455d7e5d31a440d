"""Length-prefixed JSON over a pipe, the same on both sides of a fork."""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import Any

_HEAD = struct.Struct(">I")


class FrameError(Exception):
    """The other side ended, sent what is no frame, or sent more than was allowed."""


def write_frame(fd: int, value: Any) -> None:
    """Send one JSON value; raises OSError if the other side is gone."""
    data = json.dumps(value).encode("ascii")
    view = memoryview(_HEAD.pack(len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def read_frame(fd: int, *, timeout: float | None = None, largest: int = 64 << 20) -> Any:
    """Receive one JSON value.  Raises TimeoutError after `timeout` seconds, FrameError otherwise."""
    deadline = None if timeout is None else time.monotonic() + timeout
    (length,) = _HEAD.unpack(_read(fd, _HEAD.size, deadline))
    if length > largest:
        raise FrameError(f"a frame of {length} bytes; at most {largest} are accepted")
    try:
        return json.loads(_read(fd, length, deadline))
    except ValueError as error:
        raise FrameError(f"not a JSON frame: {error}") from None


def _read(fd: int, count: int, deadline: float | None) -> bytes:
    parts = []
    while count:
        if deadline is not None:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError
        part = os.read(fd, min(count, 1 << 16))
        if not part:
            raise FrameError("the other side has ended")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
