"""Landlock (Linux 5.13 on): a process gives up every file but those it names, for good.

Through plain system calls, since the C library has none; see landlock(7).  A process so confined
cannot trace, or look through /proc into, one that is not.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import stat
import struct
from collections.abc import Sequence

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
QUERY_VERSION, PATH_BENEATH = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
MAKE_SYM, REFER, TRUNCATE = 1 << 12, 1 << 13, 1 << 14
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = (
    READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
)
# Rights that a kernel knows, and so takes away, by the version of its interface: up to creating
# files (1), moving between folders (2), truncation (3), ioctl on devices (5).
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
BIND_TCP, CONNECT_TCP = 1, 2  # from version 4
ABSTRACT_SOCKETS, SIGNALS = 1, 2  # to processes outside, from version 6


@functools.cache
def version() -> int:
    """The kernel's version of the interface; 0 where there is none."""
    if platform.system() != "Linux":
        return 0
    return max(0, _call(ctypes.CDLL(None, use_errno=True), CREATE_RULESET, None, 0, QUERY_VERSION))


def restrict(libc: ctypes.CDLL, readable: Sequence[str], writable: Sequence[str]) -> None:
    """Leave this process the files beneath these paths; NO_NEW_PRIVS must be set.  Raises OSError.

    A path that does not exist is left out.
    """
    known = version()
    rights = (1 << _RIGHTS[min(known, max(_RIGHTS))]) - 1
    fields = [rights]
    if known >= 4:
        fields.append(BIND_TCP | CONNECT_TCP)
    if known >= 6:
        fields.append(ABSTRACT_SOCKETS | SIGNALS)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _checked(_call(libc, CREATE_RULESET, attributes, len(attributes), 0))
    try:
        for paths, allowed in ((readable, READ), (writable, WRITE)):
            for path in paths:
                _allow(libc, ruleset, path, allowed & rights)
        _checked(_call(libc, RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, allowed: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(beneath).st_mode):
            allowed &= OF_A_FILE
        rule = struct.pack("=Qi", allowed, beneath)
        _checked(_call(libc, ADD_RULE, ruleset, PATH_BENEATH, rule, 0))
    finally:
        os.close(beneath)


def _call(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    wide = [ctypes.c_size_t(a) if isinstance(a, int) else a for a in arguments]
    return libc.syscall(ctypes.c_long(number), *wide)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "landlock failed")
    return result
