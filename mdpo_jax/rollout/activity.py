"""What an engine did, as sums over time, and the rates that people watch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from mdpo_jax.rollout.calls import Call


@dataclasses.dataclass
class Activity:
    """Sums since the engine was made; a difference of two is what happened between them.

    seconds: in which trajectories were sampled.  decode_seconds: in blocks of decoding, and
    overlap_seconds those of them in which a tool ran.  slot_seconds, tool_seconds: summed over the
    slots that decoded, and over calls.  prefilled, copied, decoded: tokens.  calls: of the tool, and
    `stuck` of them got no answer in time.
    """

    trajectories: int = 0
    prefilled: int = 0
    copied: int = 0
    decoded: int = 0
    calls: int = 0
    stuck: int = 0
    seconds: float = 0.0
    decode_seconds: float = 0.0
    slot_seconds: float = 0.0
    tool_seconds: float = 0.0
    overlap_seconds: float = 0.0

    def __sub__(self, other: Activity) -> Activity:
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Activity(**{name: value - theirs[name] for name, value in mine.items()})

    def copy(self) -> Activity:
        """As it is now."""
        return dataclasses.replace(self)

    def block(self, begun: float, running: int, calls: Sequence[Call]) -> None:
        """A block of decoding from `begun` until now, beside these calls."""
        now = time.monotonic()
        self.decode_seconds += now - begun
        self.slot_seconds += running * (now - begun)
        # All began before the block, so one that ended last covers what the others cover.
        last = max((now if c.ended is None else c.ended for c in calls), default=begun)
        self.overlap_seconds += min(max(0.0, last - begun), now - begun)

    def answered(self, call: Call) -> None:
        """A call was collected."""
        self.calls += 1
        self.stuck += call.stuck
        self.tool_seconds += (call.ended or time.monotonic()) - call.begun

    def report(self) -> dict[str, Any]:
        """The sums that are counts, and rates; 0 where nothing was done."""
        seconds, decoding = max(self.seconds, 1e-9), max(self.decode_seconds, 1e-9)
        return {
            "tokens_prefilled": self.prefilled,
            "tokens_copied": self.copied,
            "tokens_decoded": self.decoded,
            "tool_calls": self.calls,
            "stuck_calls": self.stuck,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.decoded / seconds, 1),
            "trajectories_per_second": round(self.trajectories / seconds, 3),
            "mean_slots_busy": round(self.slot_seconds / decoding, 2),
            "mean_tools_busy": round(self.tool_seconds / seconds, 3),
            "tool_overlap": round(self.overlap_seconds / decoding, 4),
        }


# What passes at the same time on every host, where the rest adds up.
_CLOCKS = ("seconds", "decode_seconds", "overlap_seconds")


def together(hosts: Sequence[Activity]) -> Activity:
    """Of engines that work side by side: what they did is added up, the time they took averaged."""
    rows = [dataclasses.asdict(one) for one in hosts]
    sums: dict[str, Any] = {name: sum(row[name] for row in rows) for name in rows[0]}
    return Activity(**sums | {name: sums[name] / len(rows) for name in _CLOCKS})
