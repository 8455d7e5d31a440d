"""What a forked child gives up before it runs anything: limits, environment, session, files."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
import resource
import signal
from collections.abc import Collection

from mdpo_jax.isolation import seccomp

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 1, 38, 4
_CAPABILITY_VERSION_3 = 0x20080522
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one child: bytes of address space and of a file, CPU seconds, files, processes."""

    address_space_bytes: int = 2048 * MIB
    file_bytes: int = 16 * MIB
    cpu_seconds: int = 120
    open_files: int = 64
    processes: int = 64


def apply(limits: Limits, folder: str, keep: Collection[int]) -> None:
    """Confine this process, for good: call it in the child, right after the fork.

    An own session (so that a group kill reaches what it starts), death with the parent, no new
    privileges, rlimits, an environment of three variables, `folder` as working folder, /dev/null as
    standard streams, no inherited file but `keep`, and none of root's capabilities, which closes
    /proc of processes that have them.  Where the machine has seccomp: no fork, exec, socket or
    signal to others.  RLIMIT_NPROC binds ordinary users only.
    """
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    edges = [2, *sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
    for low, high in itertools.pairwise(edges):
        os.closerange(low + 1, high)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(HOME=folder, PATH="/usr/bin:/bin", LANG="C.UTF-8")
    for kind, value in (
        (resource.RLIMIT_AS, limits.address_space_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    nothing = (ctypes.c_uint32 * 6)()
    if libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")
    if seccomp.supported():
        seccomp.install(libc)
