"""Epochs over packed batches: the host's side of the step, with its check of the first loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mdpo_jax import hosts
from mdpo_jax.config import StepZeroError
from mdpo_jax.data.batches import Batches, Fed, feed
from mdpo_jax.data.packing import Item, Layout, pack, unpack
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.lora import Lora
from mdpo_jax.training.losses import Forward, Objective
from mdpo_jax.training.meter import UNTRACED, Meter, Trace
from mdpo_jax.training.state import Optimiser, TrainState, init_state, schedule, state_like
from mdpo_jax.training.step import NOTHING, Fixed, make_scorer, make_step, put
from mdpo_jax.training.value import Joint, init_head


class Saves(Protocol):
    """Where an interrupted `fit` is gone on with (pipeline/progress.py)."""

    @property
    def steps(self) -> int:
        """How many steps are already made; 0 to begin."""
        ...

    def restore(self, like: TrainState) -> tuple[TrainState, Any]:
        """The state after them, in the form of `like`, and the batches' iterator's."""
        ...

    def after(self, step: int, state: TrainState, place: Any) -> None:
        """Told after each step; `state` is donated to the next."""
        ...


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
    """Model, forward, optimiser, layout and mesh of a run; the step compiles once an objective
    and layout.

    adapter: what `fit` trains in place of all parameters, over a base that is then its argument.
    """

    config: ModelConfig
    forward: Forward
    optimiser: Optimiser
    layout: Layout
    mesh: Mesh | None = None
    adapter: Lora | None = None

    def __post_init__(self) -> None:
        if self.layout.shared_prompts and not self.forward.shared_prompts:
            raise ValueError(
                "forward.shared_prompts: False with a layout that shares prompts; expected True, or "
                "their tokens would not be seen"
            )

    def fit(
        self, params: Any, batches: Batches, plan: Plan, objective: Objective, *,
        fixed: Fixed = NOTHING, check_step_zero: bool = False, trace: Trace = UNTRACED,
        report: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
        keep: Callable[[int, Callable[[], Any]], None] = lambda step, params: None,
        saves: Saves | None = None,
    ) -> Any:  # fmt: skip
        """Parameters after `plan.steps` steps; `params` are donated to the first, `fixed` are not.

        Where the optimiser keeps an average of them, that average, here and for `keep`.
        report(step, metrics) after each step; keep(step, params) may copy params().  A metric without
        a value in a batch (the mean of a class that it lacks) is left out.  trace: of a few of
        the steps.  saves: what an interrupted call left, from which this one goes on, and where to
        leave more.  Raises StepZeroError before anything is kept if `check_step_zero` and the first
        log-ratios are not 0.
        """
        step = self._step(objective)
        rate = schedule(plan.learning_rate, plan.warmup_steps, plan.steps, plan.final_lr_fraction)
        with contextlib.closing(feed(batches, self.layout, plan.steps)) as source:
            state, done = self._begin(params, objective, source, saves)
            del params
            meter = self._meter(objective, fixed, step)
            for index, fed in enumerate(source, done):
                with self._on_mesh(), trace.step(index - done, plan.steps - done):
                    arrays = self._put(fed)
                    meter.begin()
                    state, metrics = step(
                        state, arrays[0], np.float32(rate(index)), fixed, arrays[1]
                    )
                    meter.called()
                    values = {name: float(value) for name, value in metrics.items()}
                speed = meter.end(fed.batch, fed.mismatched)
                if index == 0 and check_step_zero:
                    self._check(objective, values)
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(f"step {index}: the loss is {values['loss']}")
                values = {name: value for name, value in values.items() if not math.isnan(value)}
                share = {"fill": fed.batch.fill, "action_share": fed.batch.action_share}
                report(index, values | share | speed)
                keep(index + 1, functools.partial(_kept, state))
                if saves is not None:
                    saves.after(index + 1, state, source.get_state())
            return _kept(state)

    def _begin(
        self, params: Any, objective: Objective, source: Any, saves: Saves | None
    ) -> tuple[TrainState, int]:
        """The state to go on from, with `source` at its next batch, and how many steps it has made."""
        params = self._with_head(objective, params)
        if saves is None or not saves.steps:
            return init_state(params, self.optimiser), 0
        like = state_like(params, self.optimiser)
        jax.tree.map(lambda x: x.delete(), params)  # before what replaces them is read
        state, place = saves.restore(like)
        source.set_state(place)
        return state, saves.steps

    def _put(self, fed: Fed) -> tuple[Any, Any]:
        """The batch, and that of KTO's reference point, on the devices."""
        beside = None if fed.mismatched is None else put(fed.mismatched, self.mesh)
        return put(fed.batch, self.mesh), beside

    def _with_head(self, objective: Objective, params: Any) -> Any:
        if objective.value is None:
            return params
        head = init_head(self.config.hidden_size)
        if self.mesh is not None:
            whole = NamedSharding(self.mesh, PartitionSpec())
            head = jax.tree.map(lambda x: hosts.place(np.asarray(x), whole), head)
        return Joint(params, head)

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
                values = hosts.fetch(scorer(params, put(packed, self.mesh)))
            names = unpack(packed.reference, packed)
            for slot, scores in unpack(values, packed).items():
                scores[0] = 0.0  # nothing precedes it
                out[int(names[slot][0])] = scores.astype(np.float32)
        return out

    def compilations(self, objective: Objective) -> int:
        """How many programs the step of this objective has compiled."""
        return self._step(objective)._cache_size()  # pyright: ignore[reportAttributeAccessIssue]

    def _step(self, objective: Objective) -> Any:
        return make_step(
            self.config, self.forward, objective, self.optimiser, self.mesh, self.adapter,
            self.layout,
        )  # fmt: skip

    def _meter(self, objective: Objective, fixed: Fixed, step: Any) -> Meter:
        return Meter(
            self.config, objective, adapter=self.adapter, reference=fixed.reference is not None,
            devices=1 if self.mesh is None else self.mesh.size, programs=step._cache_size,
        )  # fmt: skip

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        """Inside, activations are pinned to the mesh (model/sharding.py)."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _check(self, objective: Objective, metrics: dict[str, float]) -> None:
        # A token's log-probs round apart by about `share`, where packing differs; over a trajectory
        # that is a random walk.
        share = 1e-5 if self.forward.dtype == "float32" else 1e-2
        limit = share * math.sqrt(self.layout.row_length)
        mean, most = metrics["log_ratio/mean_abs"], metrics["log_ratio/max_abs"]
        loss, expected = metrics["loss/preference"], _first_loss(objective, metrics)
        off = expected is not None and abs(loss - expected) > limit
        if mean > limit or most > 5 * limit or off:
            known = "" if expected is None else f"loss {expected:.6f} and "
            raise StepZeroError(
                f"step 0: loss {loss:.6f} and |log-ratio| {mean:.2e} in the mean, {most:.2e} at "
                f"most, with policy = reference; expected {known}log-ratios of 0 (within "
                f"{limit:.0e}; {5 * limit:.0e} at most)"
            )


def _kept(state: TrainState) -> Any:
    """What a stage saves, without the value head, where there is one."""
    kept = state.kept
    return kept.policy if isinstance(kept, Joint) else kept


def _first_loss(objective: Objective, metrics: dict[str, float]) -> float | None:
    """The preference loss where every log-ratio is 0; None where it is not one number."""
    if objective.kind == "unpaired":
        right, wrong = metrics["count/chosen"], metrics["count/rejected"]
        weighted = objective.lambda_correct * right + objective.lambda_wrong * wrong
        return weighted / (2 * (right + wrong))
    if metrics["term_c/margin_mean_abs"] or objective.loss == "ipo":
        return None  # each pair has its own margin; ipo's loss is as large as 1 / (2 eta)^2
    return 1.0 if objective.loss == "hinge" else math.log(2)


def copy_params(params: Any) -> Any:
    """A copy that survives the donation of the original."""
    return jax.tree.map(lambda x: x.copy(), params)
