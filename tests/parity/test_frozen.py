"""Against numbers that transformers gave once (make_fixtures.py); needs no torch."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from mdpo_jax.model import transformer
from mdpo_jax.model.families import count_params
from mdpo_jax.model.hf_config import from_hf
from mdpo_jax.model.weights import read_params


def _read(folder):
    config = from_hf(json.loads((folder / "config.json").read_text()))
    return config, read_params(folder, config)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("dtype", "remat"))
def _logits(config, params, ids, **options):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = transformer.hidden_states(
        config, params, ids, positions, jnp.ones_like(ids), **options
    )
    return transformer.logits(config, params, hidden)


def test_the_fixture_has_an_odd_vocabulary_and_three_shards(frozen):
    folder, _ = frozen
    config, params = _read(folder)
    assert config.vocab_size % 2 == 1
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert count_params(config) == sum(x.size for x in jax.tree.leaves(params))


def test_logits_equal(frozen):
    folder, expected = frozen
    got = _logits(*_read(folder), expected["ids"])
    scale = np.abs(expected["logits"]).max()
    assert np.abs(got - expected["logits"]).max() <= 1e-5 * scale


def test_packed_rows_equal_too(frozen):
    """Both rows of the fixture as segments of one, and padding behind them."""
    folder, expected = frozen
    config, params = _read(folder)
    ids = np.pad(expected["ids"].reshape(1, -1), ((0, 0), (0, 3)))
    segments = np.array([[1] * 24 + [2] * 24 + [0] * 3])
    positions = np.array([[*range(24), *range(24), 0, 0, 0]])
    hidden = jax.jit(transformer.hidden_states, static_argnums=0)(
        config, params, ids, positions, segments
    )
    got = np.asarray(transformer.logits(config, params, hidden))[0, :48].reshape(2, 24, -1)
    assert np.abs(got - expected["logits"]).max() <= 1e-5 * np.abs(expected["logits"]).max()


def test_bfloat16_logits_are_near(frozen):
    folder, expected = frozen
    config, params = _read(folder)
    error = _logits(config, params, expected["ids"], dtype=jnp.bfloat16) - expected["logits"]
    assert np.sqrt(np.mean(error**2)) <= 0.05 * expected["logits"].std()


def test_64_greedy_tokens_equal(frozen):
    folder, expected = frozen
    config, params = _read(folder)
    apart = transformer.unstack(params)
    step = jax.jit(functools.partial(transformer.extend, config))
    prompt = expected["ids"][:1, :8]
    cache, lengths = transformer.init_cache(config, 1, 80), jnp.zeros(1, jnp.int32)
    tokens, found = jnp.asarray(prompt), []
    for _ in range(64):
        new = jnp.full(1, tokens.shape[1])
        hidden, cache = step(apart, cache, tokens, lengths, new)
        lengths = lengths + new
        tokens = transformer.logits(config, params, hidden[:, -1:]).argmax(-1).astype(jnp.int32)
        found.append(int(tokens[0, 0]))
    assert found == expected["greedy"].tolist()


def test_loss_and_gradient_norms_equal(frozen, by_name):
    folder, expected = frozen
    config, params = _read(folder)
    ids = expected["ids"]

    def loss(params):
        log_probs = jax.nn.log_softmax(_logits(config, params, ids, remat="full")[:, :-1])
        return -jnp.take_along_axis(log_probs, ids[:, 1:, None], -1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)
    norms = {name: np.linalg.norm(x) for name, x in by_name(config, gradient).items()}
    assert set(norms) == set(expected["gradient_names"])
    found = [norms[name] for name in expected["gradient_names"]]
    np.testing.assert_allclose(found, expected["gradient_norms"], rtol=1e-4)
