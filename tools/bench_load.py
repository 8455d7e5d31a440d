"""How fast a checkpoint loads and is written again, and what memory it takes: one JSON line.

    python tools/bench_load.py DIR [--repeat 3] [--dtype bfloat16] [--fsdp F --tensor T] [--export TMP]

Each load is timed next to plain reads of the same files, into one small buffer and into new memory,
and runs in a process of its own.  `peak_factor` is that
peak, less what the process had before, over the bytes of the parameters; on a CPU these are in it.
Files are read once before, so all readings are from the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from pathlib import Path
from typing import Any

CHUNK = 1 << 24


def memory() -> int:
    """Bytes of this process that lie in memory, pages of mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class Peak:
    """The largest `memory` while it is entered, looked at every 5 ms, less that at the start."""

    def __enter__(self) -> Peak:
        self.start, self.bytes, self._stop = memory(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, memory() - self.start)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, memory() - self.start)


def plain_read(folder: Path) -> tuple[int, float]:
    """(bytes, seconds) of the weights' files read into one small buffer."""
    buffer, total = bytearray(CHUNK), 0
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as source:
            while count := source.readinto(buffer):
                total += count
    return total, time.perf_counter() - start


def read_into_memory(folder: Path) -> float:
    """Seconds to read the files into new memory of their size: what any loader must at least do."""
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        file.read_bytes()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, export: bool) -> dict[str, Any]:
    """One load, and one export if asked, in this process."""
    import jax

    from mdpo_jax.model import policy, sharding, weights

    mesh = None
    if options.fsdp * options.tensor > 1:
        jax.config.update("jax_num_cpu_devices", options.fsdp * options.tensor)
        mesh = sharding.make_mesh(fsdp=options.fsdp, tensor=options.tensor)
    described = policy.describe_policy(options.folder)
    jax.block_until_ready(jax.numpy.zeros(1))
    bytes_read, read_seconds = plain_read(options.folder)
    memory_seconds = read_into_memory(options.folder)
    cpu = time.process_time()
    with Peak() as peak:
        start = time.perf_counter()
        params = weights.read_params(options.folder, described.config, mesh, options.dtype)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - start
    held = [
        sum(
            s.data.nbytes
            for x in jax.tree.leaves(params)
            for s in x.addressable_shards
            if s.device == d
        )
        for d in jax.devices()
    ]
    out = {
        "bytes": bytes_read, "read_s": read_seconds, "load_s": seconds,
        "memory_s": memory_seconds,
        "load_cpu_s": time.process_time() - cpu, "peak_bytes": peak.bytes,
        "param_bytes": sum(x.nbytes for x in jax.tree.leaves(params)), "device_bytes": held,
    }  # fmt: skip
    if export:
        start = time.perf_counter()
        with Peak() as peak:
            import dataclasses

            dataclasses.replace(described, params=params).save(options.export)
        out |= {"export_s": time.perf_counter() - start, "export_peak_bytes": peak.bytes}
    return out


def _child(options: argparse.Namespace, export: bool, pipe: Any) -> None:
    pipe.send(measure(options, export))


def main() -> None:
    """Repeat in fresh processes and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--export", type=Path, help="write it here, once, timed; must not exist")
    options = parser.parse_args()
    plain_read(options.folder)
    runs = []
    for i in range(options.repeat):
        ours, theirs = multiprocessing.Pipe()
        last = options.export is not None and i == options.repeat - 1
        child = multiprocessing.get_context("spawn").Process(
            target=_child, args=(options, last, theirs)
        )
        child.start()
        runs.append(ours.recv())
        child.join()
    median = {
        key: statistics.median(run[key] for run in runs) for key in runs[0] if "device" not in key
    }
    size = median["bytes"]
    line = {
        "bench": "load", "folder": options.folder.name, "bytes": size, "dtype": options.dtype,
        "load_s": median["load_s"], "load_cpu_s": median["load_cpu_s"],
        "load_gb_s": size / median["load_s"] / 1e9, "read_gb_s": size / median["read_s"] / 1e9,
        "read_into_memory_gb_s": size / median["memory_s"] / 1e9,
        "peak_factor": max(run["peak_bytes"] / run["param_bytes"] for run in runs),
        "device_share": [held / median["param_bytes"] for held in runs[0]["device_bytes"]],
        "repeat": options.repeat, "all_load_s": [run["load_s"] for run in runs],
    }  # fmt: skip
    if options.export:
        seconds = runs[-1]["export_s"]
        line |= {"export_s": seconds, "export_gb_s": size / seconds / 1e9}
        line["export_peak_beyond_params"] = runs[-1]["export_peak_bytes"] / runs[-1]["param_bytes"]
    print(json.dumps(line))


if __name__ == "__main__":
    main()
