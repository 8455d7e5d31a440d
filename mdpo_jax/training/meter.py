"""What each step of a training took: seconds, tokens, FLOPs by formula, memory; and a trace of some.

host    |pack|call|  wait for its metrics  |report keep|pack|call|
device            |########### step #######|   idle         |####
              ^ a step begins              ^ and ends
                                           |----- host wait ---|
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdpo_jax.model import flops
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.lora import Lora
from mdpo_jax.training.losses import Objective
from mdpo_jax.types import PackedBatch, Part

# Dense peak of a device in bfloat16, FLOP/s, by what its `device_kind` begins with.  TPU: the pages
# of docs.cloud.google.com/tpu/docs; GPU: NVIDIA's data sheets, half of what they say with sparsity.
# T4: of float16, for it has no bfloat16.
PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12,
    "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12, "NVIDIA H200": 989.4e12,
    "NVIDIA GH200": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989.4e12, "NVIDIA A100": 312e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}  # fmt: skip
TRACED = 3, 5  # the first and the last step of a trace: compiled, and few enough to open


def peak(kind: str) -> float | None:
    """A device's dense bfloat16 FLOP/s by its `device_kind`; None for one that is not known."""
    if kind.startswith("TPU"):
        return PEAKS.get(kind)
    # "NVIDIA A100-SXM4-80GB" is an A100, and "NVIDIA L40" no L4.
    return next((r for name, r in PEAKS.items() if re.match(rf"{name}(?!\w)", kind)), None)


def peak_bytes() -> int | None:
    """Most memory that a device of this process has held so far; None where it does not say (CPU)."""
    found = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    return max((n for n in found if n is not None), default=None)


class Meter:
    """Measures the steps of one training, each from the end of the one before it.

    It asks the device for nothing: a step ends when its metrics are here, as they must be anyway.
    """

    def __init__(
        self, config: ModelConfig, objective: Objective, *, adapter: Lora | None = None,
        reference: bool = False, devices: int = 1, programs: Callable[[], int] = lambda: 0,
    ):  # fmt: skip
        """programs: how many the step has compiled so far; the other arguments are the trainer's."""
        self._config, self._objective = config, objective
        self._adapter, self._reference, self._programs = adapter, reference, programs
        rate = peak(jax.local_devices()[0].device_kind)
        self._peak = None if rate is None else rate * devices
        self._ended = self._began = self._called = time.perf_counter()
        self._before = self._known = programs()

    def begin(self) -> None:
        """The batch is there, and the step about to be called."""
        self._before, self._known = self._ended, self._programs()
        self._began = time.perf_counter()

    def called(self) -> None:
        """The call returned: compiled, if it had to be, and handed to the device."""
        self._called = time.perf_counter()

    def end(self, batch: PackedBatch, mismatched: PackedBatch | None = None) -> dict[str, float]:
        """The step's metrics are here.  Its measures; rates only where nothing was compiled.

        mismatched: the batch of KTO's reference point, of which the FLOPs count and the tokens do not.
        """
        self._ended = time.perf_counter()
        work = self._work(batch, mismatched)
        if self._programs() > self._known:
            return work | {"speed/compile_s": self._called - self._began} | _memory()
        seconds = self._ended - self._before
        found = work | {
            "speed/step_s": seconds,
            "speed/host_s": self._began - self._before,
            "speed/tokens_per_s": work["speed/tokens"] / seconds,
            "speed/slots_per_s": work["speed/slots"] / seconds,
            "speed/tflop_per_s": work["speed/tflop"] / seconds,
        }
        if self._peak is not None:
            found["speed/mfu"] = 1e12 * found["speed/tflop_per_s"] / self._peak
        return found | _memory()

    def _work(self, batch: PackedBatch, mismatched: PackedBatch | None) -> dict[str, float]:
        counted = batch.weights > 0
        if self._objective.observation_ce_weight:
            counted = counted | (batch.parts == Part.OBSERVATION)
        needed = functools.partial(flops.step_flops, self._config, adapter=self._adapter)
        forward = functools.partial(flops.forward_flops, self._config, adapter=self._adapter)
        total = _over(needed, batch, int(counted.sum()))
        if self._reference:
            total += _over(forward, batch, int((batch.weights > 0).sum()))
        if self._objective.kind == "unpaired" and self._objective.kl != "zero":
            # The policy's forward over what KTO's reference point is of, and the reference's.
            of = batch if mismatched is None else mismatched
            total += (1 + self._reference) * _over(forward, of, int((of.weights > 0).sum()))
        tokens = int((batch.segments > 0).sum())
        slots = int(batch.segments[batch.sequence_mask.any(axis=1)].size)
        return {"speed/tokens": tokens, "speed/slots": slots, "speed/tflop": total / 1e12}


def _over(needed: Callable[[list[int], int], float], batch: PackedBatch, scored: int) -> float:
    """FLOPs of all sequences of a batch."""
    used = batch.sequence_mask.any(axis=1)
    begins, ends = _spans(batch.segments[used], batch.positions[used])
    # What goes on from a shared prompt sees it, and leaves out what the prompt itself takes.
    return needed(ends, scored) - needed(begins, 0)


def _spans(segments: np.ndarray, positions: np.ndarray) -> tuple[list[int], list[int]]:
    """Of every segment of micro-batches [M R L]: its first position, and the one after its last."""
    begins, ends = [], []
    for names, places in zip(segments, positions, strict=True):
        end = np.zeros(names.max() + 1, np.int64)
        np.maximum.at(end, names.reshape(-1), places.reshape(-1) + 1)
        begins += (end - np.bincount(names.reshape(-1)))[1:].tolist()
        ends += end[1:].tolist()
    return begins, ends


def _memory() -> dict[str, float]:
    most = peak_bytes()
    return {} if most is None else {"memory/peak_bytes": most}


class Trace:
    """Writes a profiler's trace of a few steps into `folder`, for XProf and Perfetto; None: nothing.

    A context, at whose end a trace that an error left open is closed.
    """

    def __init__(self, folder: Path | None = None):
        self._folder, self._open = folder, False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, index: int, steps: int) -> Iterator[Any]:
        """Around the call of a step and the wait for its metrics; `index` of `steps` from 0."""
        first, last = (min(n, steps - 1) for n in TRACED)
        # The very first one compiles, and a trace of that is large and of nothing else.
        if self._folder is not None and index == first > 0:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a stage that was interrupted
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._open = True
        with jax.profiler.StepTraceAnnotation("step", step_num=index):
            yield
        if index == last:
            self.__exit__()


UNTRACED = Trace()
