"""Which request begins next, and which slot it can copy its first tokens from.

slot 0 | prompt A | action ...        A's second sample copies the prompt from slot 0, also when
slot 1 | prompt A | action ....       that has gone on: what lies behind it is masked
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple


class Beginning(NamedTuple):
    """How admitted slots get their first tokens, in this order; pairs are (from, to)."""

    copied: list[tuple[int, int]]
    read: list[int]
    copied_after: list[tuple[int, int]]


class Queue:
    """Requests by the length of what they begin with, longest first; equal beginnings together.

    starts: of each request something hashable that equal beginnings share, and its length.
    remembered: tokens that a slot may have written and still hold its first ones in every layer.
    """

    def __init__(self, starts: Sequence[tuple[Hashable, int]], remembered: int):
        first: dict[Hashable, int] = {}
        self._kinds = [first.setdefault(start, i) for i, (start, _) in enumerate(starts)]
        self._lengths = [length for _, length in starts]
        order = sorted(range(len(starts)), key=lambda i: (-self._lengths[i], self._kinds[i], i))
        self._waiting, self._remembered = deque(order), remembered
        self._held: dict[int, int] = {}  # slot -> kind of what its cache begins with
        self._written: dict[int, int] = {}  # slot -> tokens that its cache was given

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def next(self) -> int:
        """The place of the request that begins next."""
        return self._waiting.popleft()

    def wrote(self, slot: int, length: int) -> None:
        """A slot's cache was written up to here, whatever is taken back."""
        self._written[slot] = max(self._written[slot], length)

    def begin(self, admitted: Mapping[int, int]) -> Beginning:
        """slot -> place of those that begin now: each beginning is read once, or not at all."""
        sources: dict[int, int] = {}
        for slot in sorted(self._held):
            if self._written[slot] <= self._remembered:
                sources.setdefault(self._held[slot], slot)
        plan, leaders = Beginning([], [], []), dict[int, int]()
        for slot, place in admitted.items():
            kind = self._kinds[place]
            if kind in sources:
                plan.copied.append((sources[kind], slot))
            elif leaders.setdefault(kind, slot) == slot:
                plan.read.append(slot)
            else:
                plan.copied_after.append((leaders[kind], slot))
        for slot, place in admitted.items():
            self._held[slot], self._written[slot] = self._kinds[place], self._lengths[place]
        return plan
