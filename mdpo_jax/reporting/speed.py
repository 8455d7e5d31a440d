"""How fast the trainings of a run were: a summary of their metrics, and a table of the summaries."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from mdpo_jax.reporting.results import MISSING, decimals
from mdpo_jax.reporting.sheets import Sheet

_MEDIANS = ("step_s", "host_s", "tokens_per_s", "slots_per_s", "tflop_per_s", "mfu")
_CAPTION = (
    "Medians over steps that compiled nothing. Useful tokens are those of sequences; slots are all "
    "positions computed, padding included. TFLOP/s counts by formula what the step needs, without "
    "what is computed again; MFU is its share of the devices' bfloat16 peak, where that is known. "
    "Host: from the end of a step to the call of the next. Memory: the most that a device of the "
    "process had held by then."
)


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Medians of the `speed/` metrics, of `fill`, seconds of compilation in sum, and the peak memory.

    Without a figure that no row has: medians where every step compiled, MFU and memory where the
    device does not tell.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("speed/", "memory/")) or name == "fill":
                found.setdefault(name.split("/")[-1], []).append(value)
    out = {n: statistics.median(found[n]) for n in (*_MEDIANS, "fill") if n in found}
    if "compile_s" in found:
        out["compile_s"] = sum(found["compile_s"])
    if "peak_bytes" in found:
        out["peak_bytes"] = max(found["peak_bytes"])
    return out


def sheet(stages: Mapping[str, Mapping[str, float]]) -> Sheet:
    """A row a training, of the summary in its stage's done.json."""
    columns = (
        ("step, s", "step_s", 1, 3), ("compiling, s", "compile_s", 1, 1),
        ("host, ms", "host_s", 1e3, 1), ("useful tokens/s", "tokens_per_s", 1, 0),
        ("slots/s", "slots_per_s", 1, 0), ("fill, %", "fill", 100, 1),
        ("TFLOP/s", "tflop_per_s", 1, 3), ("MFU, %", "mfu", 100, 1),
        ("memory, GiB", "peak_bytes", 2**-30, 2),
    )  # fmt: skip
    told = [c for c in columns if any(c[1] in of for of in stages.values())]
    rows = [
        [name, *(decimals(of[f] * scale, n) if f in of else MISSING for _, f, scale, n in told)]
        for name, of in stages.items()
    ]
    return Sheet("Speed of training", ["training", *(c[0] for c in told)], rows, _CAPTION)
