"""Safetensors files: headers checked, tensors mapped one at a time, files written as a stream.

8 bytes   length of the header, little-endian
header    JSON, name -> dtype, shape, [start, stop) in the data; padded with spaces
data      the tensors, back to back
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
# The limit of the reference implementation.
LONGEST_HEADER = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it says it is; one line, naming file or tensor."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies: `start` counts bytes from the beginning of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def map(self) -> np.ndarray:
        """The tensor, read from the file where it is touched; unmapped when it is dropped.

        A map of the whole file would keep every page that was read in this process's memory.
        """
        mapped = np.memmap(self.file, np.uint8, "r", self.start, (self.nbytes,))
        return np.asarray(mapped).view(FLOATS[self.dtype]).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(FLOATS[self.dtype]).itemsize


def read_header(file: Path) -> dict[str, Stored]:
    """Tensors of a safetensors file by name.

    Raises CheckpointError if the file is absent, cut, of another format, or holds more or fewer
    bytes than its header says.
    """
    try:
        with open(file, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            length = int.from_bytes(source.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise _broken(file, f"{size} bytes cannot hold a header of {length}")
            header = json.loads(source.read(length))
            data = 8 + length
            tensors = {
                name: Stored(name, file, t["dtype"], tuple(t["shape"]), data + t["data_offsets"][0])
                for name, t in header.items()
                if name != "__metadata__"
            }
            spans = [t["data_offsets"] for n, t in header.items() if n != "__metadata__"]
            stop = data + max((span[1] for span in spans), default=0)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise _broken(file, f"no header of a safetensors file: {type(error).__name__}") from None
    if stop != size:
        raise _broken(file, f"{size} bytes, its header says {stop}")
    for tensor, (start, end) in zip(tensors.values(), spans, strict=True):
        if start < 0 or (tensor.dtype in FLOATS and end - start != tensor.nbytes):
            raise _broken(file, f"tensor {tensor.name} lies at {start} to {end}")
    place = 0
    for start, end in sorted(map(tuple, spans)):
        if start != place:
            raise _broken(file, f"tensors overlap or leave a gap at {min(start, place)}")
        place = end
    return tensors


def _broken(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: truncated or corrupt: {why}")


def write_file(
    file: Path,
    plan: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterator[np.ndarray],
) -> None:
    """Writes a safetensors file, taking one tensor at a time.

    plan: name -> (dtype as in `FLOATS`, shape), in the order of `tensors`, of which no more are
    taken.  Raises ValueError for a tensor that is not as planned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, (dtype, shape) in plan.items():
        start, stop = stop, stop + math.prod(shape) * np.dtype(FLOATS[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in plan.items():
            x = next(tensors)
            if x.shape != shape or x.dtype != FLOATS[dtype]:
                raise ValueError(
                    f"{name}: {x.dtype} {list(x.shape)}; planned {dtype} {list(shape)}"
                )
            out.write(np.ascontiguousarray(x).view(np.uint8).data if x.ndim else x.tobytes())


def to_name(dtype: Any) -> str:
    """`F32` of float32, and so on."""
    return next(name for name, kind in FLOATS.items() if np.dtype(kind) == np.dtype(dtype))
