"""A seccomp filter in plain BPF: no exec, no fork, no sockets, no signal to anyone else, no memory
or priority that the other limits do not count, no change of a file's mode, owner or times.

Threads stay allowed, and so does a signal to oneself (abort needs it).  x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct

PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
RET_ALLOW = 0x7FFF0000
RET_KILL = 0x80000000
RET_EPERM = 0x00050000 | errno.EPERM
RET_ENOSYS = 0x00050000 | errno.ENOSYS
RET_NOTHING = 0x00050000  # the call says that it has worked, and has done nothing
AUDIT_ARCH_X86_64 = 0xC000003E
X32_BIT = 0x40000000

LOAD, JUMP_EQ, JUMP_GE, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NR, ARCH = 0, 4  # offsets in struct seccomp_data; argument i starts at 16 + 8 * i

REFUSED = {
    "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "sendmsg": 46, "bind": 49,
    "listen": 50, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322,
    "ptrace": 101, "setpgid": 109, "setsid": 112, "setrlimit": 160, "chroot": 161, "mount": 165,
    "umount2": 166, "unshare": 272, "setns": 308, "tkill": 200, "rt_sigqueueinfo": 129,
    "rt_tgsigqueueinfo": 297, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
    "add_key": 248, "request_key": 249, "keyctl": 250, "perf_event_open": 298, "bpf": 321,
    "userfaultfd": 323, "process_vm_readv": 310, "process_vm_writev": 311,
    "open_by_handle_at": 304, "pidfd_send_signal": 424, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "pidfd_open": 434, "pidfd_getfd": 438,
    "memfd_create": 319, "memfd_secret": 447, "inotify_init1": 294, "fanotify_init": 300,
    "sched_setscheduler": 144, "sched_setattr": 314, "ioprio_set": 251,
    "setpriority": 141, "kexec_load": 246, "sched_setaffinity": 203, "sched_setparam": 142,
    "migrate_pages": 256, "move_pages": 279,
}  # fmt: skip
# Landlock lets these through for any file, outside the folder too.  They are not refused, since a
# copy of a file that the cell may well make sets modes and times.
IGNORED = {
    "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93,
    "lchown": 94, "fchownat": 260, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
    "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "setxattrat": 463,
    "removexattrat": 466, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
    "file_setattr": 469,
}  # fmt: skip
CLONE, CLONE3, KILL, TGKILL, FCNTL, PRCTL, PRLIMIT64 = 56, 435, 62, 234, 72, 157, 302
CLONE_THREAD = 0x00010000
F_SETOWN, F_SETOWN_EX = 8, 15  # with O_ASYNC they make the kernel signal another process
PR_SET_PDEATHSIG = 1


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


@functools.cache
def supported() -> bool:
    """True where the filter below fits the machine and the kernel filters at all."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail") as file:
            return "errno" in file.read()
    except OSError:
        return False


def install(libc: ctypes.CDLL) -> None:
    """Put the filter on this process for good; NO_NEW_PRIVS must be set. Raises OSError."""
    code = program(os.getpid())
    holder = _Program(len(code) // 8, code)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(holder), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP) failed")


def program(pid: int) -> bytes:
    """The BPF code for the process `pid`: 8 bytes an instruction."""
    rules = b"".join(_when(number, _ret(RET_EPERM)) for number in REFUSED.values())
    rules += b"".join(_when(number, _ret(RET_NOTHING)) for number in IGNORED.values())
    not_thread = _op(JUMP_SET, CLONE_THREAD, 1, 0) + _ret(RET_EPERM) + _ret(RET_ALLOW)
    only_self = _op(JUMP_EQ, pid, 1, 0) + _ret(RET_EPERM) + _ret(RET_ALLOW)
    no_owner = _op(JUMP_EQ, F_SETOWN, 1, 0) + _op(JUMP_EQ, F_SETOWN_EX, 0, 1)
    no_orphan = _op(JUMP_EQ, PR_SET_PDEATHSIG, 0, 1)
    read_only = (  # the pointer to the new limit must be null, both halves of it
        _op(JUMP_EQ, 0, 0, 2) + _load(20 + 8 * 2) + _op(JUMP_EQ, 0, 1, 0)
        + _ret(RET_EPERM) + _ret(RET_ALLOW)
    )  # fmt: skip
    return b"".join(
        (
            _load(ARCH),
            _op(JUMP_EQ, AUDIT_ARCH_X86_64, 1, 0) + _ret(RET_KILL),
            _load(NR),
            _op(JUMP_GE, X32_BIT, 0, 1) + _ret(RET_EPERM),
            rules,
            _when(CLONE3, _ret(RET_ENOSYS)),  # the C library then falls back to clone
            _when(CLONE, _load(16) + not_thread),
            _when(KILL, _load(16) + only_self),
            _when(TGKILL, _load(16) + only_self),
            _when(FCNTL, _load(24) + no_owner + _ret(RET_EPERM) + _ret(RET_ALLOW)),
            _when(PRCTL, _load(16) + no_orphan + _ret(RET_EPERM) + _ret(RET_ALLOW)),
            _when(PRLIMIT64, _load(16 + 8 * 2) + read_only),
            _ret(RET_ALLOW),
        )
    )


def _op(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, value)


def _load(offset: int) -> bytes:
    return _op(LOAD, offset)


def _ret(action: int) -> bytes:
    return _op(RETURN, action)


def _when(number: int, then: bytes) -> bytes:
    """`then` (which must return) if the loaded system call number is `number`."""
    return _op(JUMP_EQ, number, 0, len(then) // 8) + then
