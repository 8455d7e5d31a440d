"""Epochs over packed batches: the host's side of the step, with the step-0 check of ln 2."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mdpo_jax.config import StepZeroError
from mdpo_jax.data.packing import Item, Layout, pack, unpack
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.training.state import Optimiser, init_state, schedule
from mdpo_jax.training.step import Forward, Objective, make_scorer, make_step, put

Groups = Sequence[Sequence[Item]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Groups a step, number of steps, and the learning rate over them."""

    batch: int
    steps: int
    learning_rate: float
    warmup_steps: int
    final_lr_fraction: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Model, forward, optimiser, layout and mesh of a run; the step compiles once an objective."""

    config: ModelConfig
    forward: Forward
    optimiser: Optimiser
    layout: Layout
    mesh: Mesh | None = None

    def fit(
        self, params: Any, batches: Iterator[Groups], plan: Plan, objective: Objective, *,
        check_step_zero: bool = False,
        report: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
        keep: Callable[[int, Any], None] = lambda step, params: None,
    ) -> Any:  # fmt: skip
        """Parameters after `plan.steps` steps; `params` are donated to the first.

        report(step, metrics) after each step; keep(step, params) may copy them.  Raises
        StepZeroError before anything is kept if `check_step_zero` and the first loss is not ln 2.
        """
        step = make_step(self.config, self.forward, objective, self.optimiser, self.mesh)
        rate = schedule(plan.learning_rate, plan.warmup_steps, plan.steps, plan.final_lr_fraction)
        state = init_state(params, self.optimiser)
        for index in range(plan.steps):
            batch = pack(next(batches), self.layout)
            with self._on_mesh():
                state, metrics = step(state, put(batch, self.mesh), np.float32(rate(index)))
            values = {name: float(value) for name, value in metrics.items()}
            if index == 0 and check_step_zero:
                self._check(values)
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(f"step {index}: the loss is {values['loss']}")
            report(index, values | {"fill": batch.fill})
            keep(index + 1, state.params)
        return state.params

    def score(self, params: Any, items: Sequence[Item], batch: int) -> list[np.ndarray]:
        """[length] log-probs of each item's tokens by the trainer's own forward."""
        scorer = make_scorer(self.config, self.forward)
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(items)
        for start in range(0, len(items), batch):
            # `pack` reorders; a unique id in `reference` finds each sequence again.
            chunk = [
                Item(it.ids, it.weights, np.full(len(it.ids), start + i, np.float32))
                for i, it in enumerate(items[start : start + batch])
            ]
            packed = pack([[entry] for entry in chunk], self.layout)
            with self._on_mesh():
                values = np.asarray(scorer(params, put(packed, self.mesh)))
            names = unpack(packed.reference, packed)
            for slot, scores in unpack(values, packed).items():
                scores[0] = 0.0  # nothing precedes it
                out[int(names[slot][0])] = scores.astype(np.float32)
        return out

    def compilations(self, objective: Objective) -> int:
        """How many programs the step of this objective has compiled."""
        step = make_step(self.config, self.forward, objective, self.optimiser, self.mesh)
        return step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        """Inside, activations are pinned to the mesh (model/sharding.py)."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _check(self, metrics: dict[str, float]) -> None:
        # A token's log-probs round apart by about `share`, where packing differs; over a trajectory
        # that is a random walk.
        share = 1e-5 if self.forward.dtype == "float32" else 1e-2
        limit = share * math.sqrt(self.layout.row_length)
        mean, most = metrics["log_ratio/mean_abs"], metrics["log_ratio/max_abs"]
        loss = metrics["loss/preference"]
        if mean > limit or most > 5 * limit or abs(loss - math.log(2)) > limit:
            raise StepZeroError(
                f"step 0: loss {loss:.6f} and |log-ratio| {mean:.2e} in the mean, {most:.2e} at "
                f"most, with policy = reference; expected ln 2 = {math.log(2):.6f} and 0 (within "
                f"{limit:.0e}; {5 * limit:.0e} at most)"
            )


def shuffled(groups: Groups, batch: int, seed: int) -> Iterator[Groups]:
    """Endless batches: each epoch a new order, keyed by (seed, epoch); every batch is full."""
    if not groups:
        raise ValueError("training data: no sequence; expected at least one")
    epoch, pool = 0, []
    while True:
        while len(pool) < batch:
            order = np.random.default_rng((seed, epoch)).permutation(len(groups))
            pool += [groups[i] for i in order]
            epoch += 1
        yield pool[:batch]
        pool = pool[batch:]


def copy_params(params: Any) -> Any:
    """A copy that survives the donation of the original."""
    return jax.tree.map(lambda x: x.copy(), params)
