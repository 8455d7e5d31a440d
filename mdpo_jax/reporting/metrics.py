"""Numbers of a run: an append-only JSONL of metrics, and the statistics that results are given with."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float, Int

_RESAMPLED_AT_ONCE = 1 << 21  # indices drawn per block: 16 MiB whatever the number of problems


class MetricsError(ValueError):
    """A metrics file or a metric that cannot be used; the message names the place and the value."""


class PairedInterval(NamedTuple):
    """Mean of `a - b` over problems with its bootstrap interval."""

    difference: float
    low: float
    high: float


class MetricsWriter:
    """Appends one JSON object a line to `path`; a line is in the kernel's hands when `write` returns.

    A last line torn by a SIGKILL of an earlier writer is cut off on opening, so that the file stays
    readable.  Usable from several threads, and as a context manager.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_tail(self.path)
        self._lock = threading.Lock()
        # Unbuffered: one write(2) a line, and nothing of ours is lost with the process.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, **fields: Any) -> None:
        """Append one line.

        Numpy and other array scalars become numbers.  A float that is not finite becomes null and
        its name (dotted when nested) goes into the line's "non_finite" list.
        """
        if "non_finite" in fields:
            raise MetricsError("non_finite: this name is kept for the writer; choose another")
        non_finite: list[str] = []
        row = {name: _plain(value, name, non_finite) for name, value in fields.items()}
        if non_finite:
            row["non_finite"] = non_finite
        line = memoryview((json.dumps(row, allow_nan=False) + "\n").encode())
        with self._lock:
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a metrics file, in order.

    A last line that is not a JSON object is what a killed writer leaves and is left out; one
    anywhere else raises `MetricsError` with its line number.
    """
    return list(iterate_metrics(path))


def iterate_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The same one by one, for a file that is larger than memory."""
    bad: tuple[int, bytes] | None = None
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if bad is not None:
                raise MetricsError(f"{path}:{bad[0]}: {bad[1][:80]!r} is not a JSON object")
            row = _row(line)
            if row is None:
                bad = number, line.rstrip(b"\n")
            else:
                yield row


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _mend_tail(path: Path) -> None:
    """Cut a torn last line off, or end a whole one that lacks only its newline."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "r+b") as file:
        start, tail = _last_line(file)
        if _row(tail) is None:
            file.truncate(start)
        elif not tail.endswith(b"\n"):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _last_line(file: BinaryIO, step: int = 1 << 16) -> tuple[int, bytes]:
    """Where the last line begins, newlines behind it not counted, and all from there on."""
    at, tail = file.seek(0, os.SEEK_END), b""
    while at:
        size = min(step, at)
        at = file.seek(at - size)
        tail = file.read(size) + tail
        cut = tail.rstrip(b"\n").rfind(b"\n") + 1
        if cut:
            return at + cut, tail[cut:]
    return 0, tail


def _plain(value: Any, name: str, non_finite: list[str]) -> Any:
    """`value` as JSON can hold it; notes the names of floats that are not finite."""
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        non_finite.append(name)
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}.{k}", non_finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{name}.{i}", non_finite) for i, v in enumerate(value)]
    raise MetricsError(
        f"{name}: {value!r} is a {type(value).__name__}; "
        "expected a number, a string, a bool, None, an array, a list or a dict of these"
    )


def pass_at_k_by_problem(
    correct: Int[np.ndarray, " problems"], n: int, k: int
) -> Float[np.ndarray, " problems"]:
    """Unbiased chance that at least one of k samples is right, for each problem.

    `correct` counts the right ones among the n samples of each problem.  1 - C(n-c, k) / C(n, k) of
    Chen et al. 2021 (arXiv 2107.03374, eq. 1), as the product of (1 - k/i) for i = n-c+1 .. n, which
    holds no large number.
    """
    counts = np.asarray(correct)
    if not 1 <= k <= n:
        raise MetricsError(f"k: {k} of n = {n} samples; expected 1 <= k <= n")
    if counts.size and not (np.issubdtype(counts.dtype, np.integer) and counts.ndim == 1):
        raise MetricsError(f"correct: {counts.dtype}{counts.shape}; expected integers [problems]")
    if counts.size and (counts.min() < 0 or counts.max() > n):
        raise MetricsError(
            f"correct: counts from {counts.min()} to {counts.max()}; expected 0 to n = {n}"
        )
    # missed[c] = C(n-c, k) / C(n, k).  A factor with i < k would be negative, but the one at i = k
    # before it is already 0.
    factors = np.maximum(1.0 - k / np.arange(n, 0, -1), 0.0)
    missed = np.concatenate([[1.0], np.cumprod(factors)])
    return 1.0 - missed[counts.astype(np.int64)]


def pass_at_k(correct: Int[np.ndarray, " problems"], n: int, k: int) -> float:
    """Mean of `pass_at_k_by_problem` over the problems, in [0, 1]; nan without a problem."""
    values = pass_at_k_by_problem(correct, n, k)
    return float(values.mean()) if values.size else math.nan


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927, JASA 22:209), as (low, high) in [0, 1].

    Holds its level near 0 and 1, where the normal interval does not; (0, 1) when n is 0.  Successes
    need not be whole: of problems that are right now and then.
    """
    if not 0 <= successes <= n:
        raise MetricsError(f"successes: {successes} of n = {n}; expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    share, scale = successes / n, 1.0 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exact at the ends, where rounding would leave 1e-17 outside or inside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def bootstrap_interval(
    values: Float[np.ndarray, " problems"], seed: int, samples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap of the mean over problems (Efron 1979, Ann. Statist. 7:1), (low, high).

    Problems are resampled, not the samples within one: the interval is about other problems of the
    same kind.  The same arguments give the same interval.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not data.size or not np.isfinite(data).all():
        raise MetricsError(f"values: shape {data.shape}; expected finite numbers [problems], >= 1")
    if samples < 1 or not 0 < level < 1:
        raise MetricsError(f"samples {samples}, level {level}; expected >= 1 and within (0, 1)")
    means = [data[rows].mean(axis=1) for rows in _resampled(data.size, seed, samples)]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(
    right: Float[np.ndarray, " problems"], of: Float[np.ndarray, " problems"], seed: int
) -> tuple[float, float]:
    """95 % interval of sum(right) / sum(of), each right[i] from 0 to of[i], over problems.

    The percentile bootstrap of the ratio: a problem is drawn with all that was sampled on it.  Where
    all problems have one share (nothing is right, say, or there is one problem), each resample says
    the same and the bootstrap would claim to be certain; there it is Wilson's interval of as many
    trials as there are problems with of[i] > 0.
    """
    parts, wholes = np.asarray(right, np.float64), np.asarray(of, np.float64)
    parts, wholes = parts[wholes > 0], wholes[wholes > 0]
    if not wholes.size:
        return 0.0, 1.0
    each = parts / wholes
    if (each == each[0]).all():
        return wilson_interval(len(each) if each[0] == 1 else float(each.sum()), len(each))
    shares = [
        parts[rows].sum(axis=1) / wholes[rows].sum(axis=1)
        for rows in _resampled(parts.size, seed, 2000)
    ]
    low, high = np.quantile(np.concatenate(shares), [0.025, 0.975])
    return float(low), float(high)


def _resampled(size: int, seed: int, samples: int) -> Iterator[Int[np.ndarray, "some size"]]:
    """Indices drawn with replacement, `samples` rows of them in blocks that fit in memory."""
    rng, block = np.random.default_rng(seed), max(1, _RESAMPLED_AT_ONCE // size)
    for at in range(0, samples, block):
        yield rng.integers(size, size=(min(block, samples - at), size))


def paired_interval(
    a: Float[np.ndarray, " problems"],
    b: Float[np.ndarray, " problems"],
    seed: int,
    samples: int = 2000,
    level: float = 0.95,
) -> PairedInterval:
    """Mean of a - b on the same problems with its bootstrap interval over problems.

    Paired: what makes a problem hard for both cancels, so the interval is narrower than two
    separate ones suggest (Efron & Tibshirani 1993, ch. 8).  Where every problem has one difference,
    no resample has another: there the interval reaches as far to both sides as Wilson's does from 0.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise MetricsError(
            f"a, b: shapes {left.shape} and {right.shape}; expected one value a problem in both, "
            "in the same order"
        )
    difference = left - right
    low, high = bootstrap_interval(difference, seed, samples, level)
    if (difference == difference[0]).all():
        reach = wilson_interval(0, difference.size)[1]
        low, high = max(-1.0, low - reach), min(1.0, high + reach)
    return PairedInterval(float(difference.mean()), low, high)
