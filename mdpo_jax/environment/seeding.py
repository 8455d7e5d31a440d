"""Inside a worker: randomness that follows from the trajectory's key, whenever a module is loaded."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import random
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_SEEDED = ("numpy.random", "sympy.core.random")


def install(seed: int) -> None:
    """Seed `random`, NumPy and SymPy: what is loaded now, and the rest as soon as it is loaded.

    `numpy.random.default_rng()` without a seed gets one that follows from this one and from how many
    it has given.  What draws from the system (`random.SystemRandom`, `secrets`, `os.urandom`) is left
    alone.
    """
    random.seed(seed)
    for name in _SEEDED:
        if name in sys.modules:
            _seed(sys.modules[name], seed)
    sys.meta_path.insert(0, _Seeder(seed))


def _seed(module: ModuleType, seed: int) -> None:
    module.seed(seed)
    if module.__name__ != "numpy.random":
        return
    plain, given = module.default_rng, 0

    @functools.wraps(plain)
    def default_rng(seed_: Any = None) -> Any:
        nonlocal given
        if seed_ is None:
            seed_ = [seed, given]
            given += 1
        return plain(seed_)

    module.default_rng = default_rng  # pyright: ignore[reportAttributeAccessIssue]


class _Seeder(importlib.abc.MetaPathFinder):
    """Finds the seeded modules where they are, and seeds them once they have run."""

    def __init__(self, seed: int):
        self._seed = seed

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a seeded module, with a loader that seeds it; None for all others."""
        if fullname not in _SEEDED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _seed(module, self._seed)

            spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec
