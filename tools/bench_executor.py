"""Speed of the Python tool against a restatement of the official executor, interleaved in one run.

    python tools/bench_executor.py --data ../shared/data --repeats 3 --json executor.json

W2c: MathCoder-7B's MATH trajectories without a block over 2 s; the official one in lockstep at batch
64, ours in sessions, 64 under way.  W1: ToRA's GSM8K blocks, one a trajectory.  Every figure comes
from a process of its own, after a warm-up; CPU is that of the whole process tree.  Needs the `bench`
extra (IPython, pebble).  Prints a table in markdown, medians with (least to most).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mdpo_jax.data.recorded import agreement, blocks_of
from mdpo_jax.data.reruns import rerun
from mdpo_jax.environment.interpreter import PythonInterpreter
from mdpo_jax.isolation.sandbox import Level
from mdpo_jax.rows import Row, in_order

SANDBOXES = ("none", "limits", "hardened")
SYMPY = "import sympy\nx = sympy.symbols('x')\nsympy.expand((x + 1)**3)"
FILES = {"W1": "tora_trajectories_dev.jsonl.gz", "W2c": "mathcoder_trajectories_dev.jsonl.gz"}
Figures = dict[str, float]


def main() -> None:
    """Print the table; or, with --one, measure one executor and print its figures."""
    options = _options()
    if options.one:
        print(json.dumps(_measure(options.one, json.loads(options.rows.read_text()), options)))
        return
    runs = [("W2c", name, 64) for name in ("official", "official, sympy imported", *SANDBOXES)]
    runs += [("W1", "hardened", 1), ("W1", "hardened", 64), ("call", "official", 1)]
    runs += [("call", name, 1) for name in SANDBOXES]
    found: dict[tuple[str, str, int], list[Figures]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("W1", "W2c", "call")}
        for name, rows in (*_workloads(options), ("call", [])):
            files[name].write_text(json.dumps(rows))
        for repeat in range(options.repeats):
            for run in runs if repeat % 2 == 0 else reversed(runs):
                found[run].append(_apart(run, files[run[0]], options))
                print(repeat, *run, found[run][-1], file=sys.stderr)
    table = {", ".join(map(str, run)): _spread(figures) for run, figures in found.items()}
    print(_machine(), _table(table), _targets(table), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps({"machine": _machine(), "figures": table}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--trajectories", type=int, default=96, help="of W2c")
    parser.add_argument("--blocks", type=int, default=640, help="of W1")
    parser.add_argument("--calls", type=int, default=100, help="single calls, fresh and live")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=64, help=argparse.SUPPRESS)
    return parser.parse_args()


def _workloads(options: argparse.Namespace) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    yield "W1", _lines(options.data / FILES["W1"])[: options.blocks]
    rows = _lines(options.data / FILES["W2c"])
    rows = [r for r in rows if r["dataset"] == "math/test" and blocks_of(r)]
    quick: list[dict[str, Any]] = []
    with PythonInterpreter(timeout=10, workers=2) as tool:
        for row in rows:
            if len(quick) < options.trajectories:
                done = rerun(tool, row)["blocks"]
                quick += [row] if all(block["seconds"] <= 2 for block in done) else []
    yield "W2c", quick


def _lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return list(map(json.loads, lines))


def _apart(run: tuple[str, str, int], rows: Path, options: argparse.Namespace) -> Figures:
    """The figures of one executor, from a process of its own."""
    command = [sys.executable, __file__, "--one", run[1], "--rows", str(rows)]
    command += ["--batch", str(run[2]), "--calls", str(options.calls)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> Figures:
    """Rates over the rows; without rows, latencies of single calls."""
    if name.startswith("official"):
        import official_replay

        if "sympy" in name:
            import sympy  # noqa: F401 - its workers are forked from this process

        official_replay.run_batch([["1"]])
        if not rows:
            return _latencies("fresh", [lambda: official_replay.run_batch([[SYMPY]])] * 5)
        cells = [[block.code for block in blocks_of(row)] for row in rows]
        return _rates(rows, lambda: official_replay.lockstep(cells, options.batch))
    with PythonInterpreter(timeout=20, sandbox=cast(Level, name)) as tool:
        rerun(tool, {"idx": 0, "code": [f"```python\n{SYMPY}\n```"]})
        if not rows:
            return _calls(tool, options.calls)

        def all_rows() -> list[list[str]]:
            done = in_order(lambda row: rerun(tool, row), map(Row, rows), options.batch)
            return [[block["output"] for block in row.value["blocks"]] for row in done]

        return _rates(rows, all_rows)


def _rates(rows: list[dict[str, Any]], work: Callable[[], list[list[str]]]) -> Figures:
    start, before = time.perf_counter(), tree_cpu_s()
    said = work()
    wall, cpu = time.perf_counter() - start, tree_cpu_s() - before
    recorded = [block.recorded for row in rows for block in blocks_of(row)]
    pairs = zip(recorded, [text for row in said for text in row], strict=True)
    kinds = [agreement(*pair) for pair in pairs]
    same = kinds.count("value equal") / max(1, sum(kind.startswith("value") for kind in kinds))
    n = len(kinds)
    return {"blocks": n, "blocks/s": n / wall, "CPU ms/block": 1e3 * cpu / n, "values": same}


def _calls(tool: PythonInterpreter, count: int) -> Figures:
    """One call in a session of its own, and one call after another in a live session."""
    live = tool.start("live")

    def fresh() -> Callable[[], None]:
        session = tool.start("fresh")
        session.run_cell(SYMPY).result()
        return session.close

    live.run_cell(SYMPY).result()
    found = _latencies("fresh", [fresh] * count)
    found |= _latencies("live", [lambda: live.run_cell(SYMPY).result()] * count)
    live.close()
    return found


def _latencies(name: str, calls: Sequence[Callable[[], Any]]) -> Figures:
    times, before = [], tree_cpu_s()
    for call in calls:
        start = time.perf_counter()
        after = call()
        times.append(1e3 * (time.perf_counter() - start))
        if callable(after):  # no caller waits for the end of a session
            after()
    cpu = 1e3 * (tree_cpu_s() - before) / len(calls)
    half, high = np.percentile(times, [50, 99])
    return {f"{name} p50 ms": float(half), f"{name} p99 ms": float(high), f"{name} CPU ms": cpu}


def tree_cpu_s() -> float:
    """CPU seconds of this process, of the children it has reaped, and of its live descendants.

    The zygote reaps its workers: what they used is in its own `cutime`, once their sessions closed.
    """
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + used.ru_utime + used.ru_stime
    for pid in descendants():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def descendants(pid: int | None = None) -> list[int]:
    """The live processes below one, ours by default."""
    found = []
    for task in Path(f"/proc/{pid or os.getpid()}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:
            continue
    return found + [below for child in found for below in descendants(child)]


def _spread(figures: list[Figures]) -> dict[str, list[float]]:
    """Each figure's median, least and most."""
    columns = {name: [f[name] for f in figures] for name in figures[0]}
    return {n: [statistics.median(v), min(v), max(v)] for n, v in columns.items()}


def _table(table: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| workload, executor, batch | figures |", "|---|---|"]
    for name, figures in table.items():
        cells = [f"{n} {m:.4g} ({low:.4g} to {high:.4g})" for n, (m, low, high) in figures.items()]
        lines.append(f"| {name} | {'; '.join(cells)} |")
    return "\n".join(lines)


def _targets(table: dict[str, dict[str, list[float]]]) -> str:
    """Ratios of medians beside what was aimed at."""

    def of(run: str, figure: str) -> float:
        return table[run][figure][0]

    lines = []
    for base in ("official", "official, sympy imported"):
        rate, cpu = (
            of("W2c, hardened, 64", figure) / of(f"W2c, {base}, 64", figure)
            for figure in ("blocks/s", "CPU ms/block")
        )
        lines.append(f"W2c over {base}: {rate:.2f}x the rate (>= 4), {cpu:.2f}x the CPU (<= 0.33)")
    cost = "CPU ms/block"
    for less in ("none", "limits"):
        more = of("W2c, hardened, 64", cost) / of(f"W2c, {less}, 64", cost) - 1
        lines.append(f"hardened over {less}: {100 * more:+.1f} % CPU (<= +10)")
    p50 = of("call, hardened, 1", "fresh p50 ms"), of("call, hardened, 1", "live p50 ms")
    lines.append(
        f"single call with sympy, p50: fresh {p50[0]:.1f} ms, live {p50[1]:.1f} ms (<= 15)"
    )
    return "\n".join(f"- {line}" for line in lines)


def _machine() -> str:
    from importlib.metadata import version

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("sympy", "numpy", "ipython", "pebble")
    )
    return (
        f"{os.cpu_count()} x {cpu}, Linux {platform.release()}, Python {platform.python_version()}, "
        f"{packages}, load average {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
