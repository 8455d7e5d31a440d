from pathlib import Path

import numpy as np
import pytest

from mdpo_jax.model.families import leaf, weight_map

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(params=sorted(path.stem for path in FIXTURES.glob("*.npz")))
def frozen(request):
    """(checkpoint folder, what transformers made of it)."""
    return FIXTURES / request.param, dict(np.load(FIXTURES / f"{request.param}.npz"))


@pytest.fixture
def by_name():
    """(config, tree) -> {stored name: tensor in the stored layout}."""

    def convert(config, tree):
        found = {}
        for w in weight_map(config):
            x = np.asarray(leaf(tree, w.path))
            axes = w.axes.split()
            order = [axes.index(axis) for group in w.groups for axis in group]
            for name, layer in zip(w.names(config), x if w.stacked else [x], strict=True):
                found[name] = layer.transpose(order).reshape(w.stored_shape(config))
        return found

    return convert
