"""A run's parameters on disk: every weight of each stage, or adapters over a base kept once.

    every weight    sft/params  iteration-1/train/params  ...             each a whole model
    LoRA            base        iteration-1/train/params  .../params.json each A and B alone

The base is `model.path` as it is, and the warm-up trains an adapter like the rest; or a fresh model
after its warm-up, which must learn in full.  params.json names the base by its fingerprint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mdpo_jax import hosts
from mdpo_jax.config import ConfigError
from mdpo_jax.model import lora
from mdpo_jax.model.families import ModelConfig
from mdpo_jax.model.lora import Lora
from mdpo_jax.model.policy import fingerprint
from mdpo_jax.pipeline.files import read_json, write_json
from mdpo_jax.training import checkpoint
from mdpo_jax.training.trainer import copy_params

Trainable = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Of a run that trains every weight.

    like: their form, as shapes with shardings.  start: reads those before any training; nobody holds
    them beside what is trained.
    """

    like: Any
    start: Callable[[], Any]

    def first(self) -> Trainable:
        """What the warm-up trains, fit to be donated, and the base under it (None: it is all)."""
        return self.start(), None

    def trainable(self, path: Path) -> Trainable:
        """The same of a stage that continues from `path`."""
        return checkpoint.load_params(path, self.like), None

    def whole(self, params: Any, base: Any) -> Any:
        """Of a `Trainable`, parameters that the model takes."""
        del base
        return params

    def load(self, path: Path) -> Any:
        """Parameters that the model takes, from a stage's folder."""
        return self.whole(*self.trainable(path))

    def identity(self, params: Any, base: Any) -> str:
        """Fingerprint of what `load` gives once a `Trainable` is saved."""
        return fingerprint(self.whole(params, base))

    def save(self, path: Path, params: Any, base: Any) -> None:
        """Keep a `Trainable`: of an adapter its own leaves, and which base they belong to."""
        del base
        checkpoint.save_params(path, params)


@dataclasses.dataclass(frozen=True)
class Adapters(Parameters):
    """Of a LoRA run.

    `load` combines, a policy without an adapter with a new one (which changes nothing): so the
    programs see trees of one form, and a policy equals its reference to the fingerprint.

    source: `model.path`, or None for a fresh model.  warm: where that lies after its warm-up.
    """

    config: ModelConfig
    adapter: Lora
    source: str | None
    warm: Path
    mesh: Mesh | None
    seed: int

    def first(self) -> Trainable:
        return self._over(self.base) if self.source else super().first()

    def trainable(self, path: Path) -> Trainable:
        """Raises ConfigError if the adapter at `path` was trained over another base."""
        note = _note(path)
        if not note.exists():
            same = not self.source and path == self.warm
            return self._over(self.base if same else checkpoint.load_params(path, self.like))
        trained_over = read_json(note)["base"]
        if trained_over != self.fingerprint:
            raise ConfigError(
                f"{self.source or self.warm}: its fingerprint is {self.fingerprint}, but {path} "
                f"is an adapter over {trained_over}; expected the base that the run began with"
            )
        return checkpoint.load_params(path, self._new), self.base

    def save(self, path: Path, params: Any, base: Any) -> None:
        if base is not None:
            note = {"base": self.fingerprint, "source": self.source}  # computed by all processes
            if hosts.first():
                write_json(_note(path), note)
        checkpoint.save_params(path, params)

    @functools.cached_property
    def base(self) -> Any:
        """What the run's adapters stand on."""
        return self.start() if self.source else checkpoint.load_params(self.warm, self.like)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the base."""
        return fingerprint(self.base)

    @functools.cached_property
    def _new(self) -> Any:
        """The seed's, so that every stage and every rerun begins with the same."""
        make, key = functools.partial(lora.init, self.config, self.adapter), self.seed
        # On its devices, as what is read from disk is: else programs would compile twice.
        if self.mesh is None:
            return jax.device_put(jax.jit(make)(jax.random.key(key)), jax.devices()[0])
        where = lora.shardings(self.config, self.adapter, self.mesh)
        return jax.jit(lambda: make(jax.random.key(key)), out_shardings=where)()

    def _over(self, base: Any) -> Trainable:
        return copy_params(self._new), base

    def identity(self, params: Any, base: Any) -> str:
        return super().identity(*(self._over(params) if base is None else (params, base)))

    def whole(self, params: Any, base: Any) -> Any:
        return params if base is None else lora.combine(base, params, self.adapter)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
