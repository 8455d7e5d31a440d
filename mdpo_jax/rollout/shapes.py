"""Static sizes of the jitted functions, and how calls of any size are put into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

LONGEST_STOP = 32  # bytes of a stop string, and so tokens


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Slots, cache length, block; the buckets that rows and widths of new tokens are rounded up to.

    reaches: how many of the cache's tokens a block of decoding reads; the last is all of it.
    """

    slots: int
    context: int
    block: int
    row_buckets: tuple[int, ...]
    width_buckets: tuple[int, ...]
    reaches: tuple[int, ...]

    @property
    def slack(self) -> int:
        """Tokens that a stop string takes back at most: a block, and those the string began in."""
        return self.block + LONGEST_STOP

    @classmethod
    def make(cls, slots: int, context: int, block: int, *, fine: bool = False) -> Shapes:
        """Powers of four for rows, of two for widths, and steps between those for reaches.

        fine: steps between them for widths too: less padding, and half as many programs again.
        """
        rows = {slots, *(4**i for i in range(1, 12) if 4**i < slots)}
        steps = (2, 3) if fine else (2,)
        widths = {context, *(n * 2**i for i in range(4, 20) for n in steps if n * 2**i < context)}
        # A block reads a part of the cache in a copy of its own: that must be worth it.
        reaches = {r for i in range(8, 20) for r in (2**i, 3 * 2 ** (i - 1)) if 4 * r < 3 * context}
        parts = (tuple(sorted(part)) for part in (rows, widths, reaches | {context}))
        return cls(slots, context, block, *parts)

    def width(self, longest: int) -> int:
        """The bucket of `longest` new tokens."""
        return _bucket(self.width_buckets, longest)

    def copied(self, longest: int) -> int:
        """The bucket of `longest` tokens to copy: powers of two, for padding costs little there."""
        return _bucket((*(b for b in self.width_buckets if not b & (b - 1)), self.context), longest)

    def rows(self, count: int) -> int:
        """The bucket of so many rows."""
        return _bucket(self.row_buckets, count)

    def reach(self, length: int) -> int:
        """How much of the cache a block reads when its longest row will have `length` tokens."""
        return _bucket(self.reaches, length)

    def groups(self, lengths: Sequence[int], overhead: int) -> list[list[int]]:
        """Indices of rows that are extended together, for the least padding.

            longest |##########|          16 x 256 + 4 x 64, where all in one call
                    |#######   |          would be 64 x 256
                    |###|

        overhead: what a call costs beside its tokens, in tokens.
        """
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        count = len(order)
        # best[i]: the cost of the rows from the i-th on, and how many the first call takes.  A call
        # takes as many as its bucket holds: rows that are shorter are free.
        best: list[tuple[int, int]] = [(0, 0)] * (count + 1)
        for i in reversed(range(count)):
            width = self.width(lengths[order[i]])
            best[i] = min(
                (rows * width + overhead + best[min(count, i + rows)][0], rows)
                for rows in self.row_buckets
            )
        found, i = [], 0
        while i < count:
            found.append(order[i : i + best[i][1]])
            i += best[i][1]
        return found


def _bucket(buckets: tuple[int, ...], size: int) -> int:
    return next((b for b in buckets if b >= size), buckets[-1])
