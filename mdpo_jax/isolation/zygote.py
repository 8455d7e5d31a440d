"""The process that forks workers: a warm interpreter that does nothing else.

It is the parent of every worker, so it alone may reap them: until then a worker's id is its own.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import tempfile
from typing import Any

from mdpo_jax.isolation import frames, landlock, sandbox

_PR_SET_CHILD_SUBREAPER = 36


def main(socket_fd: str, options: str) -> None:
    """Serve requests until the parent's end of the socket closes; then leave nothing behind."""
    settings = json.loads(options)
    # What a child needs is imported, and asked of the kernel, here: once, and not in each child.
    for name in settings["preload"]:
        importlib.import_module(name)
    landlock.version()
    sandbox.threads_of_user()
    module, _, function = settings["target"].partition(":")
    make_handler = getattr(importlib.import_module(module), function)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The terminal's and the operator's signals are the parent's to handle; its end is ours.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # children then share the pages of what is loaded
    channel = socket.socket(fileno=int(socket_fd))
    folder = tempfile.mkdtemp(prefix="mdpo-")
    workers: dict[int, str] = {}
    channel.send(json.dumps({"folder": folder}).encode())
    try:
        while _serve(channel, folder, workers, make_handler, settings):
            pass
    finally:
        for pid in list(workers):
            _kill(pid, workers)
        sandbox.remove(folder)


def _serve(channel, folder: str, workers: dict[int, str], make_handler, settings) -> bool:
    fds = array.array("i")
    data, ancillary, _, _ = channel.recvmsg(4096, socket.CMSG_SPACE(2 * fds.itemsize))
    if not data:
        return False
    request = json.loads(data)
    if request["do"] == "fork":
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        os.chmod(folder, 0o700)  # an unfiltered cell of the same user may have closed it
        own = tempfile.mkdtemp(dir=folder)
        pid = os.fork()
        if pid == 0:
            _work(fds[0], fds[1], own, make_handler, request["argument"], settings)
        workers[pid] = own
        for fd in fds:
            os.close(fd)
        channel.send(json.dumps({"pid": pid, "folder": own}).encode())
    elif request["do"] == "kill":
        _kill(request["pid"], workers)
        channel.send(b"{}")
    return True


def _kill(pid: int, workers: dict[int, str]) -> None:
    """End a worker's whole group, reap it, and sweep what escaped into other sessions."""
    folder = workers.pop(pid, None)
    if folder is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # killed before it had its own group
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for stray in _children() - workers.keys():
        with contextlib.suppress(ProcessLookupError):
            os.kill(stray, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(stray, 0)
    sandbox.remove(folder)


def _children() -> set[int]:
    """Our children; orphans of dead workers are among them, as we are their subreaper."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(map(int, file.read().split()))


def _work(request_fd: int, response_fd: int, folder: str, make_handler, argument: Any, settings):
    """The child: confine, then answer requests until the pipe closes.  Never returns."""
    code = 1
    try:
        limits = sandbox.Limits(**settings["limits"])
        protection = sandbox.Protection(**settings["protection"])
        sandbox.apply(limits, folder, (request_fd, response_fd), protection)
        handler = make_handler(argument)
        while True:
            tag, request = frames.read_frame(request_fd)
            frames.write_frame(response_fd, handler(request), tag)
    except frames.FrameError:
        code = 0  # the parent closed the pipe: the trajectory is over
    finally:
        os._exit(code)
