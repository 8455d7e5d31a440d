"""Sequences into fixed rows: one `PackedBatch` an optimiser step.

    row 0 | seq 1 seq 1 seq 1 seq 1 | seq 3 seq 3 | 0 0 |      segments of one micro-batch, unique
    row 1 | seq 2 seq 2 seq 2 | seq 4 seq 4 seq 4 | 0 0 |      over its rows; 0 is padding

A pair's two sides lie anywhere in one micro-batch and are addressed by their sequence slot, so no
pair needs a row of its own.  Over-long sequences are the caller's to drop and count.

With `shared_prompts` a pair's prompt is there once, and both sides go on from it in one row:

    | prompt prompt | seq 1 seq 1 seq 1 | seq 2 seq 2 |      seq 2 sees the prompt and itself
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mdpo_jax.data.bins import arrange
from mdpo_jax.types import PART_OF_ROLE, MaskName, PackedBatch, Pair, Trajectory, loss_mask

FEWEST_MICROS = 4
_PER_TOKEN = ("tokens", "weights", "reference", "turns", "parts")


class Item(NamedTuple):
    """One sequence to pack; all arrays are [length], as in PackedBatch.

    correct: the grader's verdict.  term_c: (C) of equation 13, in logits; the margin of a pair is
    the rejected one's minus the chosen one's.  mismatched: the sequence that stands in for this one
    in KTO's reference point.
    """

    ids: np.ndarray
    weights: np.ndarray
    reference: np.ndarray
    turns: np.ndarray | int = 0
    parts: np.ndarray | int = 0
    correct: bool = False
    term_c: float = 0.0
    mismatched: Item | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fixed shape of a micro-batch: rows of row_length tokens, and slots for sequences.

    shared_prompts: a pair's sides go on from one prompt where they fit into one row.
    """

    rows: int
    row_length: int
    sequences: int
    shared_prompts: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.row_length, self.sequences) < 1:
            raise ValueError(f"packing layout {self}: every number must be positive")


def item(
    trajectory: Trajectory,
    mask: MaskName,
    *,
    observations: bool = False,
    observation_weight: float = 0.0,
    reference: np.ndarray | None = None,
    parts: np.ndarray | None = None,
) -> Item:
    """A trajectory with its loss weights.

    `observations` counts everything after the prompt (single-turn DPO: the whole completion is one
    action); `observation_weight` gives observation tokens a weight of their own.  parts: [length] of
    `Part`; without it all of an action is text.
    """
    weights = loss_mask(trajectory.roles, mask, observations=observations).astype(np.float32)
    if observation_weight:
        everything = loss_mask(trajectory.roles, mask, observations=True)
        weights = np.where(everything & (weights == 0), observation_weight, weights)
    zeros = np.zeros(len(trajectory.ids), np.float32)
    return Item(
        trajectory.ids,
        weights.astype(np.float32),
        zeros if reference is None else reference,
        trajectory.turn_numbers,
        PART_OF_ROLE[trajectory.roles] if parts is None else parts,
    )


def pair_items(pair: Pair, mask: MaskName, **options: Any) -> tuple[Item, Item]:
    """Both sides of a pair, chosen first, with their stored reference log-probs; options of `item`."""
    chosen = item(pair.chosen, mask, reference=pair.chosen_reference, **options)
    rejected = item(pair.rejected, mask, reference=pair.rejected_reference, **options)
    return chosen._replace(correct=True), rejected


def mismatched(prompt: Trajectory, completion: Trajectory, length: int) -> Trajectory:
    """The one's prompt with the other's completion, cut at `length` tokens: for KTO's z_0."""
    cut, start = int(prompt.actions[0].start), int(completion.actions[0].start)
    ids = np.concatenate([prompt.ids[:cut], completion.ids[start:]])[:length]
    roles = np.concatenate([prompt.roles[:cut], completion.roles[start:]])[:length]
    return Trajectory(
        problem_id=f"{prompt.problem_id}+{completion.problem_id}",
        sample=completion.sample,
        policy="",
        ids=ids,
        roles=roles,
        log_probs=np.zeros(len(ids), np.float32),
    )


def pack(groups: Sequence[Sequence[Item]], layout: Layout) -> PackedBatch:
    """Pack groups that must share a micro-batch: pairs as (chosen, rejected), or single sequences.

    Where each sequence lies is `bins.arrange`'s; the micro-batch axis is padded (`padded_micros`), and
    the step skips empty ones.  Raises ValueError for a sequence
    longer than a row or a group that no empty micro-batch can hold.
    """
    sizes = [pieces(group, layout) for group in groups]
    found = arrange(sizes, layout.rows, layout.row_length, layout.sequences)
    micros = [_Micro(layout) for _ in range(padded_micros(len(found)))]
    for micro, places in zip(micros, found, strict=False):
        for g, rows in places:
            micro.add(groups[g], rows)
    return PackedBatch(
        **{
            field.name: np.stack([getattr(micro, field.name) for micro in micros])
            for field in dataclasses.fields(PackedBatch)
        }
    )


def padded_micros(filled: int) -> int:
    """Micro-batches of a batch that fills so many: a power of two, 4 at least, for few shapes."""
    return max(FEWEST_MICROS, 1 << (max(1, filled) - 1).bit_length())


def pieces(group: Sequence[Item], layout: Layout | None = None) -> list[int]:
    """Tokens that each sequence of a group needs in a row; of two that go on from a prompt, the first
    needs what both do, and the second none.  layout: none shares no prompt."""
    sizes = [len(entry.ids) for entry in group]
    common = 0 if layout is None else _common(group, layout)
    return [sum(sizes) - common, 0] if common else sizes


def _common(group: Sequence[Item], layout: Layout) -> int:
    """Tokens of the prompt that a pair shares in this layout; 0 where it has two."""
    if not layout.shared_prompts or len(group) != 2:
        return 0
    common = shared_prompt(*group)
    return common if sum(pieces(group)) - common <= layout.row_length else 0


def longest(groups: Sequence[Sequence[Item]]) -> int:
    """Tokens of the longest sequence, stand-ins included; what a row must hold."""
    entries = [entry for group in groups for entry in group]
    beside = [entry.mismatched for entry in entries if entry.mismatched is not None]
    return max(len(entry.ids) for entry in (*entries, *beside))


def unpack(values: np.ndarray, batch: PackedBatch) -> dict[int, np.ndarray]:
    """Per-token values [M R L] of a packed batch by global sequence slot (micro * S + slot), without
    those of shared prompts."""
    slots = batch.sequence_mask.shape[1]
    out = {}
    for m in range(len(batch.tokens)):
        rows, columns = np.nonzero(batch.segments[m])
        segment = batch.segments[m, rows, columns]
        for s in np.unique(segment[segment <= slots]):
            here = segment == s
            out[m * slots + int(s) - 1] = values[m, rows[here], columns[here]]
    return out


def shared_prompt(chosen: Item, rejected: Item) -> int:
    """How many first tokens of both sides can be there once: all of the common prompt but its last.

    None of them counts in a loss; the last stays in either side, for the next token is predicted from
    its state, and these differ.
    """
    count = min(len(chosen.ids), len(rejected.ids))
    differs = chosen.ids[:count] != rejected.ids[:count]
    for side in (chosen, rejected):
        differs |= side.weights[:count] != 0
        differs |= np.broadcast_to(side.turns, side.ids.shape)[:count] != 0
    same = int(np.argmax(differs)) if differs.any() else count
    return max(0, same - 1)


class _Piece(NamedTuple):
    """Tokens `start` to `stop` of an item, of one segment; prefix: how many pieces before, in its
    block, is what it goes on from, 0 for nothing."""

    entry: Item
    segment: int
    start: int
    stop: int
    prefix: int = 0


class _Micro:
    """One micro-batch under construction."""

    def __init__(self, layout: Layout):
        shape = (layout.rows, layout.row_length)
        self._layout = layout
        self.prefixes = np.zeros((*shape, 2), np.int32)
        self.tokens, self.segments, self.positions = (np.zeros(shape, np.int32) for _ in range(3))
        self.turns, self.parts = (np.zeros(shape, np.int32) for _ in range(2))
        self.weights, self.reference = (np.zeros(shape, np.float32) for _ in range(2))
        pairs = max(1, layout.sequences // 2)
        self.chosen, self.rejected = (np.zeros(pairs, np.int32) for _ in range(2))
        self.pair_mask, self.margin = (np.zeros(pairs, np.float32) for _ in range(2))
        self.correct, self.sequence_mask = (
            np.zeros(layout.sequences, np.float32) for _ in range(2)
        )
        self._used = np.zeros(layout.rows, np.int64)

    def add(self, group: Sequence[Item], rows: Sequence[int]) -> None:
        """Place a group, each sequence behind what is in its row."""
        first = int(self.sequence_mask.sum())
        whole = [_Piece(entry, first + i + 1, 0, len(entry.ids)) for i, entry in enumerate(group)]
        if common := _common(group, self._layout):
            prompt = _Piece(group[0], len(self.sequence_mask) + first + 1, 0, common)
            sides = [piece._replace(start=common, prefix=i) for i, piece in enumerate(whole, 1)]
            self._write([prompt, *sides], rows[0])
        else:
            for piece, row in zip(whole, rows, strict=True):
                self._write([piece], row)
        for slot, entry in enumerate(group, first):
            self.sequence_mask[slot], self.correct[slot] = 1, entry.correct
        if len(group) == 2:
            pair = int(self.pair_mask.sum())
            self.chosen[pair], self.rejected[pair], self.pair_mask[pair] = first, first + 1, 1
            self.margin[pair] = group[1].term_c - group[0].term_c

    def _write(self, block: Sequence[_Piece], row: int) -> None:
        """Pieces beside each other, behind what is in the row."""
        start, written = int(self._used[row]), []
        for piece in block:
            entry, cut = piece.entry, slice(piece.start, piece.stop)
            stop = start + piece.stop - piece.start
            here = (row, slice(start, stop))
            self.segments[here] = piece.segment
            self.positions[here] = np.arange(piece.start, piece.stop)
            per_token = entry.ids, entry.weights, entry.reference, entry.turns, entry.parts
            for name, values in zip(_PER_TOKEN, per_token, strict=True):
                getattr(self, name)[here] = values if isinstance(values, int) else values[cut]
            if piece.prefix:
                self.prefixes[here] = written[-piece.prefix]
            written.append((start, stop))
            start = stop
        self._used[row] = start
