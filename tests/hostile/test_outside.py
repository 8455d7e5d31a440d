"""The blocks of outside_blocks.py, all in one crowd: each ends with a status and harms nobody."""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from outside_blocks import BLOCKS

from mdpo_jax.environment.interpreter import PythonInterpreter
from mdpo_jax.isolation import landlock, seccomp

TIMEOUT = 2.0
PATIENCE = 30.0  # for what ends by its memory, which a busy machine may take seconds to hand out
hardened = seccomp.supported() and landlock.version() > 0


@pytest.fixture(scope="module")
def crowd():
    """(observation, seconds, what a bystander then answered) of every block; then what is left."""

    def interpreter(timeout):
        return PythonInterpreter(timeout=timeout, memory_mb=1024, workers=16)

    with interpreter(TIMEOUT) as quick, interpreter(PATIENCE) as patient:
        for tool in (quick, patient):
            tool.start("warm").run_cell("import sympy, numpy").result(timeout=120)

        def attack(block):
            tool = patient if block.expected == "memory" else quick
            victim, attacker = tool.start(f"{block.name}/victim"), tool.start(block.name)
            victim.run_cell("x = 40").result(timeout=120)
            start = time.monotonic()
            seen = attacker.run_cell(block.code).result(timeout=120)
            seconds = time.monotonic() - start
            answer = victim.run_cell("x + 2").result(timeout=120).text
            attacker.run_cell("1").result(timeout=120)  # what it left running gets another turn
            attacker.close()
            victim.close()
            return seen, seconds, answer

        with ThreadPoolExecutor(3) as pool:
            found = dict(zip((b.name for b in BLOCKS), pool.map(attack, BLOCKS), strict=True))
        names = _process_names()
    return found, names


def _process_names():
    """Command lines and names of every process and thread."""
    found = []
    for pattern in ("*/cmdline", "*/task/*/comm"):
        for path in Path("/proc").glob(f"[0-9]{pattern}"):
            with contextlib.suppress(OSError):  # it has ended while we looked
                found.append(path.read_text(errors="replace"))
    return "\n".join(found)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.name)
def test_it_ends_and_harms_nobody(crowd, block):
    seen, seconds, bystander = crowd[0][block.name]
    assert bystander == "42"
    assert seconds < 60  # far above the limit: it hangs or it does not
    if block.name == "forge-then-hang":  # what it wrote is no answer
        assert seen.status in ("timeout", "killed")
    if hardened and block.expected != "any":
        assert seen.status == block.expected, seen.text
    if hardened and block.leaves:
        assert not os.path.lexists(block.leaves)
    if block.marker:
        assert block.marker not in crowd[1]


def test_the_list_is_not_a_short_one():
    assert len({b.name for b in BLOCKS}) == len(BLOCKS) >= 30
