"""Chips by their published figures, and topologies of them that need not be there.

v5e:4x4 | v5e-16     TPU by libtpu's compiler: `pip install 'mdpo_jax[tpu]'`, no TPU needed
h100:8 | h200:1      GPU by XLA's: jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc
cpu:4                fake devices of this machine, to try the tool out
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

GIB = 2**30


class PlanError(ValueError):
    """What was asked for cannot be planned; one line that says what can."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: bfloat16 peak a second.  hbm: usable bytes, as the compiler counts them.  hbm_rate,
    ici, dcn: bytes a second of the memory, of one ring of the interconnect both ways, and of the
    data centre's network.  host: chips of one process.  source: of the figures.
    """

    name: str
    flops: float
    hbm: float
    hbm_rate: float
    ici: float
    dcn: float
    host: int
    source: str


_TPU = "docs.cloud.google.com/tpu/docs"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 100e9, 3.125e9, 4, f"{_TPU}/v5e"),
        Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 200e9, 6.25e9, 4, f"{_TPU}/v5p"),
        Chip("v6e", 918e12, 31.25 * GIB, 1600e9, 200e9, 12.5e9, 4, f"{_TPU}/v6e"),
        Chip("h100", 989e12, 79.6 * GIB, 3350e9, 450e9, 50e9, 8, "nvidia.com/data-center/h100"),
        Chip("h200", 989e12, 140.0 * GIB, 4800e9, 450e9, 50e9, 8, "nvidia.com/data-center/h200"),
        Chip("cpu", 1e11, 16 * GIB, 2e10, 1e10, 1e9, 1, "made up: a machine to try the tool on"),
    )
}
# The names that people buy by, v5p's being of cores, two a chip.
SLICES = {
    "v5e-1": "v5e:1x1", "v5e-4": "v5e:2x2", "v5e-8": "v5e:2x4", "v5e-16": "v5e:4x4",
    "v5e-32": "v5e:4x8", "v5e-64": "v5e:8x8", "v5e-128": "v5e:8x16", "v5e-256": "v5e:16x16",
    "v6e-1": "v6e:1x1", "v6e-4": "v6e:2x2", "v6e-8": "v6e:2x4", "v6e-16": "v6e:4x4",
    "v6e-32": "v6e:4x8", "v6e-64": "v6e:8x8", "v6e-128": "v6e:8x16", "v6e-256": "v6e:16x16",
    "v5p-2": "v5p:1x1x1", "v5p-8": "v5p:2x2x1", "v5p-16": "v5p:2x2x2", "v5p-32": "v5p:2x2x4",
    "v5p-64": "v5p:2x4x4", "v5p-128": "v5p:4x4x4", "v5p-256": "v5p:4x4x8",
    "v5p-512": "v5p:4x8x8",
}  # fmt: skip
_KNOWN = f"{', '.join(SLICES)}, or v5e:4x4, v5p:2x2x1, h100:8, h200:1, cpu:4 and the like"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A chip, the grid as its compiler takes it, and how many slices of that."""

    name: str
    chip: Chip
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        count = self.slices
        for side in self.grid:
            count *= side
        return count

    @property
    def label(self) -> str:
        """As people buy it."""
        short = {full: name for name, full in SLICES.items()}.get(self.name, self.name)
        return short if self.slices == 1 else f"{self.slices} x {short}"


def topology(name: str, slices: int = 1) -> Topology:
    """Of a name.  Raises PlanError for one that is not known."""
    full = SLICES.get(name, name)
    kind, _, grid = full.partition(":")
    sides = r"\d+x\d+x\d+" if kind == "v5p" else r"\d+x\d+" if kind.startswith("v") else r"\d+"
    if kind not in CHIPS or not re.fullmatch(sides, grid) or "0" in grid.split("x"):
        raise PlanError(f"--topology={name}: unknown; known: {_KNOWN}")
    if slices < 1 or (slices > 1 and not kind.startswith("v")):
        raise PlanError(f"--slices={slices} of {name}: expected 1, or more slices of TPUs")
    return Topology(full, CHIPS[kind], tuple(int(side) for side in grid.split("x")), slices)


def prepare(wanted: Topology) -> None:
    """The environment that the compiler wants, before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if wanted.chip.name.startswith("v"):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # of none that is here
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # none is driven: no lock
    elif wanted.chip.name == "cpu":
        flag = f"--xla_force_host_platform_device_count={wanted.chips}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


def devices(wanted: Topology) -> list[Any]:
    """Descriptions of its chips.  Raises PlanError where the compiler is not installed."""
    import jax
    from jax.experimental import topologies

    kind = wanted.chip.name
    if kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < wanted.chips:
            raise PlanError(f"--topology={wanted.name}: this process has {len(found)} CPU devices")
        return found[: wanted.chips]
    try:
        if kind.startswith("v"):
            return _tpu(wanted)
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=f"1x1x{wanted.chips}",
            target_config=_target(wanted.chip),
        )  # fmt: skip
        return list(described.devices)
    except PlanError:
        raise
    except Exception as error:  # a plugin's own kinds
        line = " ".join(str(error).split())[:300]
        need = (
            "pip install 'mdpo_jax[tpu]' (libtpu)"
            if kind.startswith("v")
            else "pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc of jax's version"
        )
        raise PlanError(
            f"--topology={wanted.name}: its compiler gave {type(error).__name__}: {line}; "
            f"it needs {need}"
        ) from error


def _tpu(wanted: Topology) -> list[Any]:
    from importlib.util import find_spec

    from jax.experimental import topologies

    if find_spec("libtpu") is None:
        raise PlanError(
            f"--topology={wanted.name}: libtpu, the TPU's compiler, is not installed; "
            "pip install 'mdpo_jax[tpu]' (no TPU is needed)"
        )
    # libtpu describes no part of a host: one chip is the first of the smallest grid.
    smallest = "2x2x1" if len(wanted.grid) == 3 else "2x2"
    whole = f"{wanted.chip.name}:{smallest}" if wanted.chips == 1 else wanted.name
    options = {"num_slices": wanted.slices} if wanted.slices > 1 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=whole, **options)
    return list(described.devices)[: wanted.chips]


# A card as XLA's GPU compiler wants it: what it asks of a device, from NVIDIA's data sheets.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {rate} device_memory_size: {size}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def _target(chip: Chip) -> str:
    return _TARGET.format(rate=int(chip.hbm_rate), size=int(chip.hbm), name=chip.name.upper())
