"""Many blocks in a row: what the Python tool holds must not grow.  One table, and a verdict.

    python tools/soak_executor.py --blocks 20000

Sessions of ten blocks, 16 under way: most are cheap, some raise, some end their process, a few run
out of their 0.3 s.  Every 1,000 blocks, with no session open, it counts processes, and for us and the
fork servers (all of them together) open files, threads and resident memory.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench_executor import descendants

from mdpo_jax.data.reruns import rerun
from mdpo_jax.environment.interpreter import PythonInterpreter
from mdpo_jax.rows import Row, in_order

SESSION, STRIDE = 10, 1000
MOST_GROWTH_MB = 8  # of resident memory, over the most in the first half


def main() -> None:
    """Run, print a row every 1,000 blocks, and say whether the last exceeds the first half."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--sandbox", default="hardened")
    options = parser.parse_args()
    samples, statuses = [], Counter()
    with PythonInterpreter(timeout=0.3, sandbox=options.sandbox) as tool:
        for first in range(0, options.blocks, STRIDE):
            start = time.monotonic()
            sessions = [
                Row(_session(n)) for n in range(first // SESSION, (first + STRIDE) // SESSION)
            ]
            for row in in_order(lambda row: rerun(tool, row), sessions, 16):
                statuses.update(block["status"] for block in row.value["blocks"])
            samples.append(_sample())
            if first == 0:
                print(f"| blocks | seconds | {' | '.join(samples[0])} |")
                print("|---" * (len(samples[0]) + 2) + "|")
            cells = [first + STRIDE, f"{time.monotonic() - start:.1f}", *samples[-1].values()]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(", ".join(f"{n} {status}" for status, n in sorted(statuses.items())))
    early, last = samples[: (len(samples) + 1) // 2], samples[-1]
    most = {name: max(sample[name] for sample in early) for name in last}
    grown = [
        f"{name} {most[name]} -> {value}"
        for name, value in last.items()
        if value - most[name] > (MOST_GROWTH_MB if name.endswith("MB") else 0)
    ]
    if grown:
        raise SystemExit(f"not flat: {', '.join(grown)}")
    print("flat")


def _session(number: int) -> dict[str, Any]:
    cells = ["import sympy\nx = sympy.symbols('x')"]
    cells += [f"sympy.expand((x + {k})**2)" for k in range(SESSION - 3)]
    cells.append("1 / 0" if number % 3 == 0 else "print('x' * 100)")
    cells.append("x")
    if number % 20 == 7:
        cells[4] = "import os\nos._exit(3)"
    if number % 100 == 50:
        cells[5] = "while True: pass"
    return {"id": number, "segments": [{"role": "code", "content": cell} for cell in cells]}


def _sample() -> dict[str, int]:
    below = descendants()
    held = {"processes": len(below)}
    for name, pids in (("own", [os.getpid()]), ("servers'", below)):
        held |= {f"{name} files": 0, f"{name} threads": 0, f"{name} MB": 0}
        for proc in (Path(f"/proc/{pid}") for pid in pids):
            lines = (proc / "status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines if ":" in line)
            held[f"{name} files"] += len(list((proc / "fd").iterdir()))
            held[f"{name} threads"] += int(status["Threads"])
            held[f"{name} MB"] += int(status["VmRSS"].split()[0]) // 1024
    return held


if __name__ == "__main__":
    main()
