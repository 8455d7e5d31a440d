"""Freed memory that stays with the process, for training on a CPU.

XLA asks malloc for a step's temporaries anew in each step.  glibc maps so large a block and unmaps it
when it is freed, so every step touches new pages, which the kernel has to clear: a sixth of the
time of the micro benchmark's step (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys

# Of glibc's malloc.h, mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1  # any other number is a bound, of less than 2 GiB
_ACCELERATORS = ("libtpu", "jax_plugins")


def keep_freed() -> bool:
    """Let glibc keep what is freed, and map nothing apart; whether it was so set.

    Only on Linux with glibc and without an accelerator's plugin, whose host has better use for its
    memory.  To be called before jax starts its threads: a thread keeps the arena that it has.  The
    process stays as large as it once was.
    """
    if sys.platform != "linux" or any(map(importlib.util.find_spec, _ACCELERATORS)):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
    return all(mallopt(name, value) for name, value in settings)
