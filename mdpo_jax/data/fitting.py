"""The shape of a stage's micro-batches, chosen from its data within what the configuration allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mdpo_jax.data.batches import Batches, Groups
from mdpo_jax.data.bins import arrange
from mdpo_jax.data.packing import Item, Layout, pieces, shared_prompt

UNIT = 128  # of a row's length: kernels' blocks are multiples of it
_LONGEST = 16_384  # rows beyond this fall from cuDNN to plain attention (model/kernels.py)
_SAMPLED = 64  # steps that are laid out to compare shapes
# What is dearer than its tokens say, as a share of them: each micro-batch of a step (under fsdp the
# weights are gathered for it), and rows by their length (attention of 7 B, 3 % for each 2,048).
_MICRO, _LENGTH = 0.01, 0.03 / 2048


class Need(NamedTuple):
    """Lengths of a group's sequences, and of all of it in one row with a shared prompt; 0 without."""

    apart: list[int]
    joint: int = 0

    def pieces(self, length: int) -> list[int]:
        """As `packing.pieces` has them, in rows of `length`."""
        return [self.joint, 0] if 0 < self.joint <= length else self.apart


@dataclasses.dataclass(frozen=True)
class Step:
    """What the groups of a step's loops need: its batch, and KTO's stand-ins if it has them."""

    loops: Sequence[Sequence[Need]]

    def micros(self, layout: Layout) -> int:
        """How many micro-batches it takes."""
        length = layout.row_length
        return sum(
            len(arrange([n.pieces(length) for n in needs], layout.rows, length, layout.sequences))
            for needs in self.loops
        )

    def least(self, tokens: int) -> int:
        """How many of so many tokens it takes at least."""
        totals = (sum(n.joint or sum(n.apart) for n in needs) for needs in self.loops)
        return sum(-(-total // tokens) for total in totals)


def fitted(batches: Batches, steps: int, within: Layout, ways: int, longest: int) -> Layout:
    """The layout of fewest padded tokens for these batches; its memory is no more than `within`'s.

    Rows are a multiple of `ways`, what the mesh divides them by; their length is one of `UNIT`, and
    at least `longest`, that of the longest sequence.  Few rows may be longer than those of `within`:
    as long as neither their tokens nor their squares (plain attention's scores) sum to more.  A step
    takes at most one micro-batch more than it would take of `within`, and only where that pays.
    What is compared is how the stage's own batches pack, up to 64 of them.
    """
    numbers = range(0, steps, -(-steps // _SAMPLED))
    sample = [_needs(batches[number], within.shared_prompts) for number in numbers]
    slots = max(sum(len(n.apart) for n in needs) for step in sample for needs in step.loops)
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
        top = max(within.row_length, min(math.isqrt(most // rows), _LONGEST))
        for length in range(-(-longest // UNIT) * UNIT, top + 1, UNIT):
            yield dataclasses.replace(within, rows=rows, row_length=length)
        yield dataclasses.replace(within, rows=rows)


def _needs(groups: Groups, shared: bool) -> Step:
    found = [entry.mismatched for group in groups for entry in group]
    beside = [Need([len(entry.ids)]) for entry in found if entry is not None]
    own = [Need(pieces(g), _joint(g) if shared and len(g) == 2 else 0) for g in groups]
    return Step([own, beside] if beside else [own])


def _joint(pair: Sequence[Item]) -> int:
    common = shared_prompt(*pair)
    return sum(pieces(pair)) - common if common else 0


def best_length(groups: Groups, layout: Layout, lengths: Sequence[int]) -> Layout:
    """The layout, with the one of these row lengths by which the groups take the fewest tokens with
    padding; of equal ones the shortest.  Raises ValueError, as `pack`, if none holds them."""
    step, found, refused = _needs(groups, layout.shared_prompts), [], None
    for length in sorted(lengths):
        shape = dataclasses.replace(layout, row_length=length)
        try:
            found.append((step.micros(shape) * length, length, shape))
        except ValueError as error:
            refused = error
    if refused is not None and not found:
        raise refused
    return min(found)[2]
