"""The shape of a stage's micro-batches, chosen from its data within what the configuration allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from mdpo_jax.data.batches import Batches
from mdpo_jax.data.bins import Sizes, arrange
from mdpo_jax.data.packing import Layout, pieces

UNIT = 128  # of a row's length: kernels' blocks are multiples of it
_SAMPLED = 64  # steps that are laid out to compare shapes
# What is dearer than its tokens say, as a share of them: each micro-batch of a step (under fsdp the
# weights are gathered for it), and rows by their length (attention of 7 B, 3 % for each 2,048).
_MICRO, _LENGTH = 0.01, 0.03 / 2048


@dataclasses.dataclass(frozen=True)
class Step:
    """Lengths of the groups of a step's loops: its batch, and KTO's stand-ins if it has them."""

    loops: Sequence[Sequence[Sequence[int]]]

    def micros(self, layout: Layout) -> int:
        """How many micro-batches it takes."""
        return sum(len(arrange(groups, *dataclasses.astuple(layout))) for groups in self.loops)

    def least(self, tokens: int) -> int:
        """How many of so many tokens it takes at least."""
        return sum(-(-sum(map(sum, groups)) // tokens) for groups in self.loops)


def fitted(batches: Batches, steps: int, within: Layout, ways: int, longest: int) -> Layout:
    """The layout of fewest padded tokens for these batches; its memory is no more than `within`'s.

    Rows are a multiple of `ways`, what the mesh divides them by; their length is one of `UNIT`, and
    at least `longest`, that of the longest sequence.  Few rows may be longer than those of `within`:
    as long as neither their tokens nor their squares (plain attention's scores) sum to more.  A step
    takes at most one micro-batch more than it would take of `within`, and only where that pays.
    What is compared is how the stage's own batches pack, up to 64 of them.
    """
    numbers = range(0, steps, -(-steps // _SAMPLED))
    sample = [_sizes(batches, number) for number in numbers]
    slots = max(sum(map(len, groups)) for step in sample for groups in step.loops)
    within = dataclasses.replace(within, sequences=slots)
    full = sum(step.micros(within) for step in sample)

    def price(layout: Layout, micros: int) -> float:
        extra = _MICRO * micros / len(sample) + _LENGTH * layout.row_length
        return layout.rows * layout.row_length * micros * (1 + extra)

    def least(layout: Layout) -> float:
        tokens = layout.rows * layout.row_length
        return price(layout, sum(step.least(tokens) for step in sample))

    best, cost = within, price(within, full)
    for bound, _, layout in sorted(
        (least(layout), index, layout)
        for index, layout in enumerate(_candidates(within, ways, longest))
    ):
        if bound >= cost:
            break
        micros = sum(step.micros(layout) for step in sample)
        if micros <= full + len(sample) and price(layout, micros) < cost:
            best, cost = layout, price(layout, micros)
    return best


def _candidates(within: Layout, ways: int, longest: int) -> Iterator[Layout]:
    most = within.rows * within.row_length**2
    for rows in range(max(ways, -(-2 // ways) * ways), within.rows + 1, ways):
        # Two rows hold any pair whose sides fit a row each.
        for length in range(-(-longest // UNIT) * UNIT, math.isqrt(most // rows) + 1, UNIT):
            yield dataclasses.replace(within, rows=rows, row_length=length)
        yield dataclasses.replace(within, rows=rows)


def _sizes(batches: Batches, step: int) -> Step:
    groups = batches[step]
    found = [entry.mismatched for group in groups for entry in group]
    beside: Sizes = [[len(entry.ids)] for entry in found if entry is not None]
    own: Sizes = [pieces(group) for group in groups]
    return Step([own, beside] if beside else [own])
