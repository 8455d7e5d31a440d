"""From an iteration's files to what its steps take: groups of items, plan and objective."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mdpo_jax.config import StepZeroError
from mdpo_jax.data import packing, pairs, store
from mdpo_jax.data.batches import Batches, Beside, Groups, Shuffled
from mdpo_jax.data.packing import Item
from mdpo_jax.data.parts import parts_of
from mdpo_jax.objectives import turn_discount_weights
from mdpo_jax.pipeline import monte_carlo, settings
from mdpo_jax.pipeline.context import Context
from mdpo_jax.pipeline.reference import MISMATCHED, PAIRS, ROLLOUTS
from mdpo_jax.training.losses import Objective
from mdpo_jax.training.trainer import Plan
from mdpo_jax.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Examples:
    """Groups to draw from, batch by batch; `beside`: more, of which each batch takes a share."""

    groups: Groups
    plan: Plan
    objective: Objective
    beside: Groups = ()

    def batches(self, seed: int) -> Batches:
        """Endless; every epoch in a new order."""
        main = Shuffled(self.groups, self.plan.batch, seed)
        if not self.beside:
            return main
        share = max(1, round(self.plan.batch * len(self.beside) / len(self.groups)))
        return Beside(main, Shuffled(self.beside, share, seed))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return packing.longest([*self.groups, *self.beside])


def examples(context: Context, folder: Path, reference: str, seed: int) -> Examples:
    """Of the configured method, for the train stage in `folder`.

    reference: fingerprint that every scored row must carry; StepZeroError for another.
    """
    config, t, raft = context.config, context.config.train, context.config.raft
    if config.preset.objective == "likelihood":
        rows = store.read_lines(folder.parent / "pairs" / "correct.jsonl.gz")
        kept = pairs.at_most([store.trajectory_from(r) for r in rows], raft.per_problem)
        groups: Groups = [[packing.item(trajectory, t.mask)] for trajectory in kept]
        plan = _plan(context, len(groups), seed, raft.batch, raft.epochs, raft.max_steps)
        plan = dataclasses.replace(plan, learning_rate=raft.learning_rate)
        return Examples(groups, plan, settings.objective(config))
    scored = _Scored(context, folder.parent / "reference", reference)
    found = scored.pairs(folder.parent / monte_carlo.TERM_C)
    if config.preset.objective == "unpaired":
        borrowed: list[Any] = [None] * (2 * len(found))
        if t.kl == "mismatched":
            borrowed = scored.singles(MISMATCHED)
        sides = [side for pair in found for side in pair]
        groups = [
            [side._replace(mismatched=other)] for side, other in zip(sides, borrowed, strict=True)
        ]
        plan = _plan(context, len(groups), seed, 2 * t.batch_pairs, t.epochs, t.max_steps)
        return Examples(groups, plan, settings.objective(config))
    plan = _plan(context, len(found), seed, t.batch_pairs, t.epochs, t.max_steps)
    beside = [[entry] for entry in scored.singles(ROLLOUTS)]
    return Examples(found, plan, settings.objective(config), beside)


def _plan(
    context: Context, groups: int, seed: int, batch: int, epochs: int, max_steps: int
) -> Plan:
    t = context.config.train
    steps = epochs * groups // batch
    steps = max(1, min(steps, max_steps or steps))
    return Plan(batch, steps, t.learning_rate, t.warmup_steps, t.final_lr_fraction, seed)


@dataclasses.dataclass(frozen=True)
class _Scored:
    """The files of a reference stage as items."""

    context: Context
    folder: Path
    reference: str

    def pairs(self, term_c: Path) -> list[tuple[Item, Item]]:
        """Pairs in the file's order, chosen first, with (C) where it has been estimated."""
        out = []
        for row in self._rows(PAIRS):
            pair = store.pair_from(row)
            chosen = self._item(pair.chosen, pair.chosen_reference)._replace(correct=True)
            out.append((chosen, self._item(pair.rejected, pair.rejected_reference)))
        if self.context.config.term_c.kind != "monte_carlo":
            return out
        found = [(row["chosen"], row["rejected"]) for row in monte_carlo.read(term_c)]
        return [
            (chosen._replace(term_c=c), rejected._replace(term_c=r))
            for (chosen, rejected), (c, r) in zip(out, found, strict=True)
        ]

    def singles(self, name: str) -> list[Item]:
        """Sequences of their own; none if the method needed none."""
        if not (self.folder / name).exists():
            return []
        return [
            self._item(*store.scored_from(row))._replace(correct=row.get("correct", False))
            for row in self._rows(name)
        ]

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        for row in store.read_lines(self.folder / name):
            if row.get("reference") != self.reference:
                raise StepZeroError(
                    f"{self.folder / name}: holds log-probs of the reference "
                    f"{row.get('reference')}, but this iteration's is {self.reference}; delete "
                    f"{self.folder} to have the data scored again"
                )
            yield row

    def _item(self, trajectory: Trajectory, reference: np.ndarray | None) -> Item:
        t, whole = self.context.config.train, self.context.config.preset.observations
        entry = packing.item(
            trajectory, t.mask, observations=whole, reference=reference,
            parts=parts_of(trajectory, self.context.chat),
        )  # fmt: skip
        if t.turn_discount is None:
            return entry
        discounts = _discounts(trajectory.turns, t.turn_discount)
        weights = entry.weights * discounts[np.maximum(trajectory.turn_numbers, 1) - 1]
        return entry._replace(weights=weights)


@functools.cache
def _discounts(turns: int, gamma: float) -> Float[np.ndarray, " turns"]:
    return np.asarray(turn_discount_weights(jnp.arange(turns), turns, gamma=gamma), np.float32)
