"""Products by tiles give what the kernels give, and few rows are computed by them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.model import tiles
from mdpo_jax.model.transformer import extend, hidden_states, init_cache, logits, unstack


@pytest.fixture
def cut(config, params, monkeypatch):
    """The small model's decoding parameters, every kernel in tiles."""
    monkeypatch.setattr(tiles, "COLUMNS", 8)
    monkeypatch.setattr(tiles, "SMALLEST", 1)
    return config, params, tiles.add(unstack(params))


def _first(config, apart, tokens):
    rows, width = tokens.shape
    none = jnp.zeros(rows, jnp.int32)
    hidden, _ = extend(config, apart, init_cache(config, rows, width), tokens, none, none + width)
    return logits(config, apart, hidden)


def _without_kernels(apart):
    """Every kernel that has tiles lost."""

    def lose(part):
        if not isinstance(part, dict):
            return part
        lost = {name: lose(x) for name, x in part.items()}
        return {n: x * jnp.nan if f"{n}_tiles" in part else x for n, x in lost.items()}

    return lose(apart)


def test_few_rows_read_tiles_alone(cut, ids):
    config, params, apart = cut
    tokens = ids(2, 8)
    places = np.broadcast_to(np.arange(8), tokens.shape)
    whole = logits(
        config, params, hidden_states(config, params, tokens, places, np.ones_like(tokens))
    )
    found = _first(config, _without_kernels(apart), tokens)
    np.testing.assert_allclose(found, whole, atol=2e-5)


def test_many_rows_read_kernels(cut, ids):
    config, _, apart = cut
    assert bool(jnp.isnan(_first(config, _without_kernels(apart), ids(3, 16))).all())
    plain = {k: v for k, v in apart.items() if k != tiles.UNEMBEDDING}
    broken = jax.tree.map_with_path(
        lambda path, x: x * jnp.nan if path[-1].key.endswith("_tiles") else x, plain
    )
    assert not bool(jnp.isnan(_first(config, broken, ids(3, 16))).any())


def test_small_and_rounded_kernels_stay_whole(params):
    apart = unstack(params)
    assert jax.tree.structure(tiles.add(apart)) == jax.tree.structure(apart)
    rounded = jax.tree.map(lambda x: jnp.ones((512, 512), jnp.bfloat16), apart)
    assert jax.tree.structure(tiles.add(rounded)) == jax.tree.structure(rounded)
