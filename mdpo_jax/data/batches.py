"""The data path of training: epochs into batches of groups, and batches into packed arrays.

    groups ──order of the epoch──> batches of equal totals ──pack, in a thread──> the step's arrays

A batch is a function of its number: it can be made at any time, and a stage goes on at a step by
that step alone.  Every host makes all of every batch: they are small beside a step, no host needs
to hear what the others packed, and all make the same number of steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from mdpo_jax.data.packing import Item, Layout, pack, pieces
from mdpo_jax.types import PackedBatch

Groups = Sequence[Sequence[Item]]

_APART = 0.002  # of a batch's tokens: totals nearer than that are left
_SWAPS = 30  # a batch, at most
_AHEAD = 2  # steps packed before they are asked for


class Batches(Protocol):
    """Groups of each step, by its number from 0; any number of steps."""

    def __getitem__(self, step: int, /) -> Groups: ...


class Fed(NamedTuple):
    """What a step takes.  mismatched: of KTO's reference point, where the items name stand-ins."""

    batch: PackedBatch
    mismatched: PackedBatch | None


class Shuffled:
    """Endless full batches: each epoch a new order, keyed by (seed, epoch), of nearly equal tokens.

    Every group comes once an epoch; the batch in which an epoch ends goes on with the next.  Within
    an epoch few groups change places until no batch is much longer than another: so the rows of
    all are equally full, and which groups meet is left to chance otherwise.
    """

    def __init__(self, groups: Groups, batch: int, seed: int):
        if not groups:
            raise ValueError("training data: no sequence; expected at least one")
        self.groups, self.batch, self.seed = groups, batch, seed
        self._sizes = np.asarray([sum(pieces(group)) for group in groups], np.int64)
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    def __getitem__(self, step: int, /) -> Groups:
        places = range(step * self.batch, (step + 1) * self.batch)
        count = len(self.groups)
        return [self.groups[self._order(p // count)[p % count]] for p in places]

    def _epoch(self, epoch: int) -> Int[np.ndarray, " groups"]:
        count = len(self.groups)
        order = np.random.default_rng((self.seed, epoch)).permutation(count)
        first = -epoch * count % self.batch  # groups that fill up the last epoch's batch
        ends = np.arange(first, count, self.batch)
        return balanced(order, self._sizes, ends[ends > 0])


class Beside:
    """Batches of two kinds of groups, some of each in every batch."""

    def __init__(self, first: Batches, second: Batches):
        self.both = first, second

    def __getitem__(self, step: int, /) -> Groups:
        return [group for batches in self.both for group in batches[step]]


class InTurn:
    """So many batches of each part, and the last part for ever."""

    def __init__(self, parts: Sequence[tuple[int, Batches]]):
        self.parts = parts

    def __getitem__(self, step: int, /) -> Groups:
        for count, batches in self.parts[:-1]:
            if step < count:
                return batches[step]
            step -= count
        return self.parts[-1][1][step]


def balanced(
    order: Int[np.ndarray, " groups"], sizes: Int[np.ndarray, " groups"],
    ends: Int[np.ndarray, " batches"],
) -> Int[np.ndarray, " groups"]:  # fmt: skip
    """`order`, cut before each of `ends`, with groups swapped until the parts' totals are as due.

    A part's due is its share of the groups in the sum of `sizes`.  The parts that are furthest above
    and below swap the two groups that bring them nearest, as long as that helps.
    """
    parts = np.split(order, ends)
    mean = sizes.mean()
    excess = np.asarray([sizes[part].sum() - mean * len(part) for part in parts])
    near = _APART * mean * max(map(len, parts))
    for _ in range(_SWAPS * len(parts)):
        high, low = int(excess.argmax()), int(excess.argmin())
        if max(excess[high], -excess[low]) <= near:
            break
        wanted = (excess[high] - excess[low]) / 2
        moved = sizes[parts[high]][:, None] - sizes[parts[low]][None]
        off = np.abs(moved - wanted)
        i, j = np.unravel_index(off.argmin(), off.shape)
        if off[i, j] >= wanted:
            break
        parts[high][i], parts[low][j] = parts[low][j], parts[high][i]
        excess[high] -= moved[i, j]
        excess[low] += moved[i, j]
    return np.concatenate(parts)


def packed(groups: Groups, layout: Layout) -> Fed:
    """A batch in rows, and the stand-ins of its sequences in rows of their own."""
    found = [entry.mismatched for group in groups for entry in group]
    items = [[entry] for entry in found if entry is not None]
    return Fed(pack(groups, layout), pack(items, layout) if items else None)


def feed(batches: Batches, layout: Layout, steps: int) -> Any:
    """A grain iterator over steps 0 to `steps` - 1 as `Fed`, packed ahead by a thread.

    Its `get_state` is the step that comes next.
    """
    import grain  # brings jax along, which the data room does without

    numbers = grain.MapDataset.range(steps)
    ready = numbers.map(batches.__getitem__).map(functools.partial(packed, layout=layout))
    return iter(ready.to_iter_dataset(grain.ReadOptions(1, _AHEAD)))
