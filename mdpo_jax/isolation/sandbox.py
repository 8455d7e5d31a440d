"""What a forked child gives up before it runs anything: limits, environment, session, files."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import glob
import itertools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Collection
from typing import Literal

from mdpo_jax.isolation import landlock, seccomp

Level = Literal["none", "limits", "hardened", "required"]
LEVELS: tuple[Level, ...] = ("none", "limits", "hardened", "required")

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 1, 38, 4
_CAPABILITY_VERSION_3 = 0x20080522
MIB = 1 << 20
# What an interpreter reads beside its own folders: shared libraries, time zones, random numbers.
# Not /etc or /proc as a whole, nor the folder that this package lies in: a checkout has runs in it.
_SYSTEM = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types",
    "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip


class SandboxError(ValueError):
    """The level that was required cannot be had on this machine."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one child: bytes of address space and of a file, CPU seconds, files, processes.

    folder_bytes, folder_entries: of all that it may keep in its folder; the supervisor looks.
    cpu_seconds: over all its calls; a last resort, for each call has its own deadline.
    processes: that an ordinary user may have beside those that were there, where no filter refuses
    to fork; the kernel counts threads, and all of the user's.
    """

    address_space_bytes: int = 2048 * MIB
    file_bytes: int = 16 * MIB
    folder_bytes: int = 256 * MIB
    folder_entries: int = 20_000
    cpu_seconds: int = 3600
    open_files: int = 64
    processes: int = 64


@dataclasses.dataclass(frozen=True)
class Protection:
    """What confines a child here: a level, whether the filter is on, Landlock's version (0: off)."""

    level: Literal["none", "limits", "hardened"]
    seccomp: bool = False
    landlock: int = 0

    def __str__(self) -> str:
        if self.level != "hardened":
            return self.level
        files = f"Landlock {self.landlock}" if self.landlock else "no Landlock"
        return f"hardened ({'seccomp' if self.seccomp else 'no seccomp'}, {files})"


def probe(level: Level) -> Protection:
    """What `level` is on this machine.  Raises SandboxError if it is `required` and not to be had.

    `none` supervises and confines nothing; `limits` adds rlimits, an empty environment and folder
    and no privileges; `hardened` adds seccomp and Landlock where the kernel has them; `required` is
    `hardened` with both.
    """
    if level not in LEVELS:
        raise SandboxError(f"sandbox: {level!r}; expected one of {', '.join(LEVELS)}")
    if level in ("none", "limits"):
        return Protection(level)
    found = Protection("hardened", seccomp.supported(), landlock.version())
    if level == "required" and not (found.seccomp and found.landlock):
        raise SandboxError(
            f"sandbox: 'required', but this machine gives {found}; expected a kernel with both "
            "seccomp and Landlock, or `hardened`, which takes what there is"
        )
    return found


def apply(limits: Limits, folder: str, keep: Collection[int], protection: Protection) -> None:
    """Confine this process, for good: call it in the child, right after the fork.

    At every level an own session (so that a group kill reaches what it starts), death with the
    parent, /dev/null as standard streams, `folder` as working folder and no inherited file but
    `keep`.  From `limits` on no new privileges, none of root's capabilities (which closes /proc of
    processes that have them), rlimits, and an environment of four variables.  `hardened`: no fork,
    exec, socket or signal to others, no file outside `folder` but Python's own.
    """
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    edges = [2, *sorted(keep), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
    for low, high in itertools.pairwise(edges):
        os.closerange(low + 1, high)
    os.chdir(folder)
    if protection.level == "none":
        return
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.environ.clear()
    os.environ.update(HOME=folder, PATH="/usr/bin:/bin", LANG="C.UTF-8", TMPDIR=folder)
    _bound(limits, count_processes=not protection.seccomp)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")
    if protection.landlock:
        landlock.restrict(libc, readable(), [folder, os.devnull])
    if protection.seccomp:
        seccomp.install(libc)


def overfull(folder: str, limits: Limits) -> bool:
    """Whether a child's folder holds more than it may, or hides what it holds."""
    size, count, waiting = 0, 0, [folder]
    try:
        while waiting and size <= limits.folder_bytes and count <= limits.folder_entries:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    count += 1
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    except PermissionError:
        return True
    except OSError:  # it is being emptied, or so deep that a path cannot name it
        return False
    return size > limits.folder_bytes or count > limits.folder_entries


def readable() -> list[str]:
    """Paths that a hardened child may read: the interpreter's, the system's libraries, this package."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [*dict.fromkeys((sys.prefix, sys.base_prefix, package, *_SYSTEM))]


def remove(folder: str) -> None:
    """Delete what a child left; shutil's own walk would overflow on a deep enough tree."""
    try:
        os.rmdir(folder)  # mostly it is empty
    except FileNotFoundError:
        return
    except OSError:
        for command in (["/bin/rm", "-rf"], ["/bin/chmod", "-R", "u+rwx"], ["/bin/rm", "-rf"]):
            if os.path.lexists(folder):
                subprocess.run([*command, folder], check=False, stderr=subprocess.DEVNULL)


@functools.cache
def threads_of_user() -> int:
    """How many threads this user has now: what RLIMIT_NPROC counts."""
    count = 0
    for tasks in glob.iglob("/proc/[0-9]*/task"):
        with contextlib.suppress(OSError):  # it has ended while we looked
            if os.stat(tasks).st_uid == os.getuid():
                count += len(os.listdir(tasks))
    return count


def _bound(limits: Limits, *, count_processes: bool) -> None:
    bounds = {
        resource.RLIMIT_AS: limits.address_space_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
    }
    if count_processes:
        bounds[resource.RLIMIT_NPROC] = threads_of_user() + limits.processes
    for kind, value in bounds.items():
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))
