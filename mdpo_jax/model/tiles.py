"""Kernels once more in tiles of 64 columns, for products of few rows on a CPU.

    kernel [D, F]  |aabbccdd|      tiles [F / 64, D, 64]  |aa| |bb| |cc| |dd|
                   |aabbccdd|                             |aa| |bb| |cc| |dd|

XLA's library for CPUs packs a product's right operand into such tiles in each call.  Over many rows
that is nothing; for 8 it takes as long as the product itself, in every step of decoding.  A batch of
products over ready tiles reads each weight once, as it lies.

The tiles of a leaf NAME lie beside it as NAME_tiles; calls of many rows read NAME as ever.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

COLUMNS = 64
ROWS = 32  # from 64 on the plain product is the faster one
SMALLEST = 2**17  # entries of a kernel: to pack what the core's own cache holds costs little

# Projections, and how many of a kernel's axes are contracted.
_INPUTS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
UNEMBEDDING = "unembedding_tiles"


def add(unstacked_params: dict[str, Any]) -> dict[str, Any]:
    """Decoding parameters and the tiles of every float32 kernel that is large enough."""
    made = {name: _beside(part) for name, part in unstacked_params.items()}
    table_VD = made["head" if "head" in made else "embedder"]["table"]
    tiles = _cut(table_VD.T)
    return made if tiles is None else {**made, UNEMBEDDING: tiles}


def product(x: jax.Array, tiles: jax.Array | None) -> jax.Array | None:
    """x [..., D] @ kernel as [..., F]; None where there are no tiles, or too many rows for them."""
    if tiles is None or x.size > ROWS * x.shape[-1]:
        return None
    x_RD = x.reshape(-1, x.shape[-1])
    x_NRD = jnp.broadcast_to(x_RD, (len(tiles), *x_RD.shape))
    y_NRC = jnp.einsum("nrd,ndc->nrc", x_NRD, tiles)
    return y_NRC.transpose(1, 0, 2).reshape(*x.shape[:-1], -1)


def _beside(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    found = {name: _beside(leaf) for name, leaf in part.items()}
    for name, inputs in _INPUTS.items():
        if name in part:
            kernel = part[name]
            tiles = _cut(kernel.reshape(math.prod(kernel.shape[:inputs]), -1))
            if tiles is not None:
                found[f"{name}_tiles"] = tiles
    return found


def _cut(kernel_DF: jax.Array) -> jax.Array | None:
    inputs, outputs = kernel_DF.shape
    large = kernel_DF.size >= SMALLEST and outputs % COLUMNS == 0
    if not large or kernel_DF.dtype != jnp.float32:
        return None
    return kernel_DF.reshape(inputs, -1, COLUMNS).transpose(1, 0, 2)
