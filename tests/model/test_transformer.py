import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.model import transformer
from mdpo_jax.model.transformer import extend, hidden_states, init_cache, logits, stack, unstack


def _whole(config, params, ids, **options):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return hidden_states(config, params, ids, positions, jnp.ones_like(ids), **options)


def _decode(config, params, ids, chunks, length=24, width=8):
    """Extends row r by chunks[0][r], chunks[1][r], ... tokens, junk in the padding."""
    rows = len(ids)
    step = jax.jit(functools.partial(extend, config))
    cache, lengths = init_cache(config, rows, length), np.zeros(rows, np.int32)
    found = [[] for _ in range(rows)]
    for new in np.asarray(chunks, np.int32):
        tokens = np.full((rows, width), 63, np.int32)
        for r in range(rows):
            tokens[r, : new[r]] = ids[r, lengths[r] : lengths[r] + new[r]]
        hidden, cache = step(unstack(params), cache, tokens, jnp.asarray(lengths), new)
        for r in range(rows):
            found[r].extend(np.asarray(hidden)[r, : new[r]])
        lengths = lengths + new
    return found


def test_extends_of_mixed_lengths_equal_the_full_forward(config, params, ids):
    tokens = ids(3, 20)
    whole = _whole(config, params, tokens)
    # Prefill, an observation, one-token steps, rows that pause (0 new tokens).
    chunks = [(5, 8, 1), (1, 0, 1), (1, 1, 1), (0, 7, 3), (1, 1, 1), (8, 0, 8)]
    found = _decode(config, params, tokens, chunks)
    assert [len(row) for row in found] == [16, 17, 15]
    for row, expected in zip(found, whole, strict=True):
        np.testing.assert_allclose(row, expected[: len(row)], atol=2e-5)


def test_a_cache_filled_to_its_end_is_exact(config, params, ids):
    tokens = ids(2, 12)
    found = _decode(config, params, tokens, [(8, 4), (3, 7), (1, 1)], length=12)
    for row, expected in zip(found, _whole(config, params, tokens), strict=True):
        np.testing.assert_allclose(row, expected, atol=2e-5)


def test_packed_rows_equal_rows_apart(config, params, ids):
    a, b = ids(1, 5, seed=1)[0], ids(1, 9, seed=2)[0]
    row = np.concatenate([a, b, [0, 0]])[None]
    segments = np.array([[1] * 5 + [2] * 9 + [0] * 2])
    positions = np.array([[*range(5), *range(9), 0, 0]])
    packed = hidden_states(config, params, row, positions, segments)[0]
    assert np.isfinite(packed).all()
    np.testing.assert_allclose(packed[:5], _whole(config, params, a[None])[0], atol=2e-5)
    np.testing.assert_allclose(packed[5:14], _whole(config, params, b[None])[0], atol=2e-5)


def test_no_gradient_leaks_between_segments_or_into_padding(config, params, ids):
    row, segments = ids(1, 8), np.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 0, 0]])
    changed = row.copy()
    changed[0, [0, 1, 2, 6, 7]] = 7
    before = hidden_states(config, params, row, positions, segments)
    after = hidden_states(config, params, changed, positions, segments)
    np.testing.assert_array_equal(before[0, 3:6], after[0, 3:6])
    gradient = jax.grad(lambda p: hidden_states(config, p, row, positions, segments)[:, :6].sum())(
        params
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_neither_value_nor_gradient(config, params, ids, remat):
    tokens = ids(2, 10)

    def loss(params, remat):
        return jnp.sum(jnp.sin(_whole(config, params, tokens, remat=remat)))

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, gradient), (other, same) = step(params, "none"), step(params, remat)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(a).max()))


def test_an_unknown_remat_is_refused_by_name(config, params, ids):
    with pytest.raises(ValueError, match="remat: 'some'; expected one of none, full, dots"):
        _whole(config, params, ids(1, 4), remat="some")


def test_stack_undoes_unstack_beyond_ten_layers(config, params):
    long = {**params, "layers": jax.tree.map(lambda x: jnp.tile(x, (6,) + (1,) * (x.ndim - 1)) *
            jnp.arange(12.0).reshape(12, *[1] * (x.ndim - 1)), params["layers"])}  # fmt: skip
    again = stack(unstack(long))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), long, again))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(config, params, ids, dtype):
    hidden = _whole(config, params, ids(2, 6), dtype=dtype)
    assert hidden.dtype == dtype
    assert logits(config, params, hidden).dtype == jnp.float32
    cache = init_cache(config, 2, 8, dtype)
    new = jnp.full(2, 6)
    out, cache = extend(config, unstack(params), cache, ids(2, 6), new * 0, new, dtype=dtype)
    assert out.dtype == cache[0]["keys"].dtype == dtype
    tolerance = 2e-5 if dtype == jnp.float32 else 0.15
    np.testing.assert_allclose(out.astype(jnp.float32), hidden.astype(jnp.float32), atol=tolerance)


def test_init_has_unit_scale_and_neutral_norms(config):
    tree = transformer.init_params(config, jax.random.key(1), jnp.bfloat16)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(tree))
    assert not tree["final_norm"]["weight"].any()
    assert not tree["layers"]["mlp_norm"]["weight"].any()
    down = np.asarray(tree["layers"]["mlp"]["down"], np.float32)
    assert down.std() == pytest.approx(config.intermediate_size**-0.5, rel=0.1)
    assert not np.array_equal(down[0], down[1])


def test_a_decode_step_updates_a_donated_cache_in_place(config, params):
    """No temporary as large as one layer's keys: the loop copies no cache."""
    rows, length = 64, 128

    @functools.partial(jax.jit, donate_argnums=1)
    def run(apart, cache, tokens, lengths):
        def body(state):
            cache, tokens, lengths = state
            hidden, cache = extend(
                config, apart, cache, tokens[:, None], lengths, jnp.ones_like(lengths)
            )
            best = logits(config, apart, hidden[:, 0]).argmax(-1)
            return cache, best.astype(jnp.int32), lengths + 1

        return jax.lax.while_loop(lambda s: s[2][0] < length, body, (cache, tokens, lengths))

    cache, start = init_cache(config, rows, length), jnp.zeros(rows, jnp.int32)
    compiled = run.lower(unstack(params), cache, start, start).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache[0]["keys"].nbytes
