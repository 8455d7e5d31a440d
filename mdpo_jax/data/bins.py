"""Which row each sequence of a step gets: few micro-batches, each with little room left.

    groups ──longest first, to the lightest──> micro-batches ──subsets that sum to a row──> rows

A group (a pair) stays in one micro-batch, where its sequences may lie in any rows.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

_TRIES = 8  # splits into so many micro-batches before one more is taken
_SUBSETS = 64  # sets of groups that are tried for a micro-batch

Sizes = Sequence[Sequence[int]]
# Of one micro-batch: a group's number, and its sequences' rows.
Places = list[tuple[int, list[int]]]


def arrange(groups: Sizes, rows: int, length: int, slots: int) -> list[Places]:
    """A place for every sequence of every group, by their lengths; the same for the same lengths.

    rows, length, slots: of a micro-batch; as few of them as are found to hold all.  Raises
    ValueError for a sequence longer than a row and a group that no empty micro-batch can hold.
    """
    _check(groups, rows, length, slots)
    total, sequences = sum(map(sum, groups)), sum(map(len, groups))
    count = max(1, -(-total // (rows * length)), -(-sequences // slots))
    level = _level(groups, count, rows, length, slots, 0)
    if level is None:
        full = _one_by_one(groups, rows, length, slots)
        tries = ((n, attempt) for n in range(count, len(full)) for attempt in range(_TRIES))
        found = (_level(groups, n, rows, length, slots, attempt) for n, attempt in tries)
        level = next((places for places in found if places is not None), full)
    return [sorted(places) for places in level if places]


def fit_rows(sizes: Sequence[int], rows: int, length: int) -> list[int] | None:
    """The row of each sequence, or None where they are not found to fit.

    A sequence of 0 tokens is within another one's.  Each row takes the longest sequence left and, with
    it, those that fill the row best: an exact subset sum, which of equals prefers few and long ones
    (minimum bin slack, Gupta & Ho 1999).
    """
    left = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: (-sizes[i], i))
    place = [0] * len(sizes)
    for row in range(rows):
        if not left:
            break
        first, rest = left[0], left[1:]
        taken = {first, *_fullest(sizes, rest, length - sizes[first])}
        for i in taken:
            place[i] = row
        left = [i for i in rest if i not in taken]
    return None if left else place


def _fullest(sizes: Sequence[int], candidates: Sequence[int], room: int) -> list[int]:
    """Of sequences, longest first, those whose lengths sum to the most that `room` holds."""
    return next(_subsets(sizes, candidates, room))


def _subsets(sizes: Sequence[int], candidates: Sequence[int], room: int) -> Iterator[list[int]]:
    """A subset for each sum that `room` holds, the largest sum first."""
    within = (1 << (room + 1)) - 1
    sums = [1]  # bit s of sums[k]: some of the first k candidates sum to s
    for i in candidates:
        sums.append((sums[-1] | sums[-1] << sizes[i]) & within)
    reached = sums[-1]
    while reached:
        left, taken = reached.bit_length() - 1, []
        reached ^= 1 << left
        for k in range(len(candidates), 0, -1):
            if not sums[k - 1] >> left & 1:
                taken.append(candidates[k - 1])
                left -= sizes[candidates[k - 1]]
        yield taken


def _one_by_one(groups: Sizes, rows: int, length: int, slots: int) -> list[Places]:
    """Micro-batches each as full as is found: the longest group left, and those that fit beside."""
    sizes = [sum(g) for g in groups]
    left = sorted(range(len(groups)), key=lambda g: (-sizes[g], g))
    found = []
    while left:
        first, rest = left[0], left[1:]
        subsets = _subsets(sizes, rest, rows * length - sizes[first])
        several = itertools.chain(itertools.islice(subsets, _SUBSETS), [[]])
        tried = (_placed(groups, [first, *more], rows, length, slots) for more in several)
        places = next(places for places in tried if places is not None)
        if len(places) == 1:
            for g in rest:
                more = _placed(groups, [*(h for h, _ in places), g], rows, length, slots)
                places = places if more is None else more
        found.append(places)
        taken = {g for g, _ in places}
        left = [g for g in left if g not in taken]
    return found


def _placed(
    groups: Sizes, members: Sequence[int], rows: int, length: int, slots: int
) -> Places | None:
    """Groups in one micro-batch, or None where they are not found to fit."""
    sizes = [size for g in members for size in groups[g]]
    place = fit_rows(sizes, rows, length) if len(sizes) <= slots else None
    if place is None:
        return None
    at = iter(place)
    return [(g, [next(at) for _ in groups[g]]) for g in members]


def _level(
    groups: Sizes, count: int, rows: int, length: int, slots: int, attempt: int
) -> list[Places] | None:
    """Micro-batches of nearly equal totals; later attempts deal the groups a little otherwise."""
    chance, noise = random.Random(attempt), 0.2 * (attempt > 0)
    weight = [sum(g) * (1 + noise * chance.random()) for g in groups]
    members: list[list[int]] = [[] for _ in range(count)]
    totals, used = [0] * count, [0] * count
    for g in sorted(range(len(groups)), key=lambda g: (-weight[g], g)):
        free = [m for m in range(count) if used[m] + len(groups[g]) <= slots]
        if not free:
            return None
        to = min(free, key=lambda m: (totals[m], m))
        members[to].append(g)
        totals[to] += sum(groups[g])
        used[to] += len(groups[g])
    if max(totals) > rows * length:
        return None
    found = []
    for some in members:
        places = _placed(groups, some, rows, length, slots)
        if places is None:
            return None
        found.append(places)
    return found


def _check(groups: Sizes, rows: int, length: int, slots: int) -> None:
    for sizes in groups:
        alone = max(sizes) <= length and fit_rows(sizes, rows, length) is not None
        if not alone or len(sizes) > slots:
            raise ValueError(
                f"packing: sequences of {list(sizes)} tokens do not fit into {rows} rows of "
                f"{length} tokens; drop them or raise train.row_length"
            )
