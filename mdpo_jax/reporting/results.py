"""Rows of results.json, gathered into one line a (split, stage, iteration) for tables and plots.

A row of results.json is one evaluation: stage, iteration, split, decoding (`greedy` or `sampled`),
accuracy with low and high, n, mean_turns, tool_error_rate, and optionally pass_at_8 and kl.  Rates
are shares in [0, 1]; any number may be missing or null.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

MISSING = "-"
STAGE_NAMES = {
    "sft": "SFT",
    "raft": "RAFT",
    "dpo": "DPO",
    "kto": "KTO",
    "mdpo_fixed_ref": "M-DPO, fixed ref",
    "mdpo": "M-DPO",
    "mkto": "M-KTO",
    "mdpo_nll": "M-DPO + NLL",
}
_STAGE_ORDER = {name: place for place, name in enumerate(STAGE_NAMES)}
_SPLIT_ORDER = {"train": 0, "dev": 1, "test": 2}


@dataclasses.dataclass(frozen=True)
class ResultLine:
    """One policy on one split: its evaluations side by side, ready to print."""

    split: str
    stage: str
    iteration: int
    greedy: Row
    sampled: Row

    @property
    def policy(self) -> str:
        name = stage_name(self.stage)
        return name if self.stage == "sft" and not self.iteration else f"{name} {self.iteration}"

    @property
    def cells(self) -> dict[str, str]:
        """Text of each column; turns and tool errors are the greedy run's where there is one."""
        return {
            "greedy": interval(self.greedy),
            "sampled": interval(self.sampled),
            "pass_at_8": percent(self._first("pass_at_8", self.sampled, self.greedy)),
            "mean_turns": decimals(self._first("mean_turns", self.greedy, self.sampled), 2),
            "tool_error_rate": percent(self._first("tool_error_rate", self.greedy, self.sampled)),
            "kl": decimals(self._first("kl", self.sampled, self.greedy), 1),
        }

    @staticmethod
    def _first(field: str, *rows: Row) -> float | None:
        return next((v for row in rows if (v := number(row.get(field))) is not None), None)


def gather(rows: Iterable[Row]) -> list[ResultLine]:
    """Lines in reading order: by split, then stage, then iteration; a later row replaces one alike."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        key = (str(row.get("split", "")), str(row.get("stage", "")), int(row.get("iteration") or 0))
        found.setdefault(key, {})[str(row.get("decoding", "greedy"))] = row
    lines = [
        ResultLine(*key, greedy=by.get("greedy", {}), sampled=by.get("sampled", {}))
        for key, by in found.items()
    ]
    return sorted(lines, key=_reading_order)


def _reading_order(line: ResultLine) -> tuple[int, str, int, str, int]:
    split, stage = line.split, line.stage
    return (_SPLIT_ORDER.get(split, 9), split, _STAGE_ORDER.get(stage, 9), stage, line.iteration)


def stage_name(stage: str) -> str:
    """How a stage is written for people."""
    return STAGE_NAMES.get(stage, stage)


def number(value: Any) -> float | None:
    """`value` as a finite float, None for all else: what a table or a plot can show."""
    if isinstance(value, bool | str) or value is None:
        return None
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def percent(share: float | None) -> str:
    """A share in percent, one decimal."""
    # "100" rather than "100.0": two such in an interval would push a table over 80 columns.
    return MISSING if share is None else f"{100 * share:.1f}".replace("100.0", "100")


def decimals(value: float | None, places: int) -> str:
    """A number with so many decimals, or the mark of a missing one."""
    return MISSING if value is None else f"{value:.{places}f}"


def interval(row: Row) -> str:
    """`83.1 [81.0, 85.2]`, in percent; without the brackets where the row has no interval."""
    accuracy, low, high = (number(row.get(field)) for field in ("accuracy", "low", "high"))
    if accuracy is None or low is None or high is None:
        return percent(accuracy)
    return f"{percent(accuracy)} [{percent(low)}, {percent(high)}]"
