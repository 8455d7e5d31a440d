"""Tensors between files and devices: turned and checked on the host in blocks, by threads.

A plain transposing copy of a large matrix in numpy misses the cache on every element.  Here it goes
16 rows at a time, which fill half a cache line of the turned matrix each:

    stored [rows, columns]   16 x 2048 of them   -->   [columns, rows]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

TILE_ROWS, TILE_COLUMNS = 16, 2048
BLOCK_BYTES = 1 << 23  # one thread's piece of work


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory, aligned so that a CPU device may use it without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def words(x: np.ndarray) -> np.ndarray:
    """The bits as unsigned integers: numpy copies bfloat16 far slower."""
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def blocks(part: np.ndarray) -> Iterator[slice]:
    """Rows of `part` [rows, columns] in pieces for one thread each."""
    row = max(1, part.shape[1] * part.dtype.itemsize)
    step = max(TILE_ROWS, BLOCK_BYTES // row // TILE_ROWS * TILE_ROWS)
    for start in range(0, part.shape[0], step):
        yield slice(start, min(start + step, part.shape[0]))


def copy(out: np.ndarray, part: np.ndarray, rows: slice, turned: bool) -> None:
    """Rows of `part` [rows, columns] into `out`, which is [columns, rows] if `turned`."""
    if not turned:
        out[rows] = part[rows]
        return
    columns = part.shape[1]
    for i in range(rows.start, rows.stop, TILE_ROWS):
        tile = slice(i, min(i + TILE_ROWS, rows.stop))
        for j in range(0, columns, TILE_COLUMNS):
            across = slice(j, min(j + TILE_COLUMNS, columns))
            out[across, tile] = part[tile, across].T


def finite(part: np.ndarray, dtype: Any) -> bool:
    """Whether all of `part` [rows, columns] stay finite as `dtype`.

    Compares bits, of which those of a larger magnitude are the larger integer, NaN's the largest.
    """
    largest = min(float(ml_dtypes.finfo(x).max) for x in (dtype, part.dtype))
    nearest = np.array([largest], part.dtype)
    limit = words(nearest)[0]
    if float(nearest[0]) > largest:  # rounded up: 65504 of float16 is 65536 in bfloat16
        limit -= 1
    bits = words(part)
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    step = max(1, (1 << 19) // max(1, part.shape[1]))
    return all(
        (bits[i : i + step] & magnitude).max(initial=0) <= limit
        for i in range(0, part.shape[0], step)
    )
