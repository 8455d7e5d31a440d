"""What glibc does with a step's temporaries: asked of a process of its own."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from mdpo_jax import host_memory
if sys.argv[1] == "kept":
    assert host_memory.keep_freed()
import jax, jax.numpy as jnp
# In a loop, and backwards, for what is written in place or fused with the sum needs no temporary.
step = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda _, y: y[::-1] * x, x).sum())
x = jnp.ones((3500, 3500))  # 49 MB, as its temporaries: from 32 on glibc maps every block apart
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Where a step asks before the last one's blocks are free, as under load, it gets new ones once more.
print(min(faults() for _ in range(20)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_step_touches_no_new_pages_once_freed_memory_is_kept():
    def least(name):
        command = [sys.executable, "-c", FAULTS, name]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    kept, returned = least("kept"), least("returned")
    assert kept < returned / 10


def test_a_host_with_an_accelerator_is_left_alone(monkeypatch):
    from mdpo_jax import host_memory

    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: object())
    assert not host_memory.keep_freed()


LARGE = """
import ctypes, pathlib
from mdpo_jax import host_memory
assert host_memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def pages():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[0])
block = libc.malloc(3 * 2**30)  # never written to: it takes addresses and no memory
held = pages()
libc.free(block)
print(held - pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_more_than_2_gib_of_freed_memory_is_kept_too():
    command = [sys.executable, "-c", LARGE]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(found) == 0
