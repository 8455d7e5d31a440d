import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.model import transformer
from mdpo_jax.model.families import param_shapes
from mdpo_jax.model.transformer import extend, hidden_states, init_cache, logits, stack, unstack

_forward = jax.jit(hidden_states, static_argnums=0, static_argnames=("dtype", "remat"))
_extend = jax.jit(extend, static_argnums=0, static_argnames="dtype")


def _whole(config, params, ids, **options):
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return _forward(config, params, ids, positions, np.ones_like(ids), **options)


def _decode(config, params, ids, chunks, length=24, width=8):
    """Extends row r by chunks[0][r], chunks[1][r], ... tokens, junk in the padding."""
    rows = len(ids)
    apart = unstack(params)
    cache, lengths = init_cache(config, rows, length), np.zeros(rows, np.int32)
    found = [[] for _ in range(rows)]
    for new in np.asarray(chunks, np.int32):
        tokens = np.full((rows, width), 63, np.int32)
        for r in range(rows):
            tokens[r, : new[r]] = ids[r, lengths[r] : lengths[r] + new[r]]
        hidden, cache = _extend(config, apart, cache, tokens, lengths, new)
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


def test_rings_give_what_the_full_forward_gives(windowed, ids):
    """Extensions shorter and longer than the window, single tokens, pauses, the ring lapped."""
    config, params = windowed
    tokens = ids(3, 20)
    whole = _whole(config, params, tokens)
    chunks = [(5, 8, 1), (1, 0, 1), (1, 1, 1), (0, 7, 3), (1, 1, 1), (8, 0, 8)]
    for width in (8, 12):
        found = _decode(config, params, tokens, chunks, width=width)
        for row, expected in zip(found, whole, strict=True):
            np.testing.assert_allclose(row, expected[: len(row)], atol=2e-5)
    ones = [(1, 1, 1)] * 20
    found = _decode(config, params, tokens, ones, width=1)
    for row, expected in zip(found, whole, strict=True):
        np.testing.assert_allclose(row, expected, atol=2e-5)


def test_a_ring_with_slack_forgets_its_last_tokens(windowed, ids):
    """Tokens taken back, as a stop string does, have not cost the window before them."""
    config, params = windowed
    tokens, junk = ids(1, 20), ids(1, 5, seed=9)
    apart, slack = unstack(params), 5
    cache = init_cache(config, 1, 24, slack=slack)

    def run(cache, row, length):
        new = np.full(1, row.shape[1], np.int32)
        return _extend(config, apart, cache, row, np.full(1, length, np.int32), new)

    _, cache = run(cache, tokens[:, :13], 0)
    for i in range(5):
        _, cache = run(cache, junk[:, i : i + 1], 13 + i)
    found, cache = run(cache, tokens[:, 13:16], 13)
    one, cache = run(cache, tokens[:, 16:17], 16)
    whole = _whole(config, params, tokens)[0]
    np.testing.assert_allclose(found[0], whole[13:16], atol=2e-5)
    np.testing.assert_allclose(one[0], whole[16:17], atol=2e-5)


def test_a_layer_with_a_window_holds_a_window(windowed):
    config, _ = windowed
    cache = init_cache(config, 3, 24)
    slots = [layer["values"].shape[2] for layer in cache]
    assert slots == [6 if config.kind(i).window else 24 for i in range(2)]
    assert [x["values"].shape[2] for x in init_cache(config, 3, 4)] == [4, 4]


def test_a_window_hides_what_lies_before_it(windowed, draw, ids):
    """With one layer, a change beyond the window changes nothing; within it, something."""
    config, _ = windowed
    config = dataclasses.replace(config, num_layers=1, layer_kinds=())
    params, tokens = draw(config), ids(1, 12)
    far, near = tokens.copy(), tokens.copy()
    far[0, 5], near[0, 6] = tokens[0, 5] % 60 + 1, tokens[0, 6] % 60 + 1
    last = [np.asarray(_whole(config, params, x))[0, 11] for x in (tokens, far, near)]
    np.testing.assert_array_equal(last[0], last[1])
    assert np.abs(last[0] - last[2]).max() > 1e-4


def test_packed_windows_equal_rows_apart(windowed, ids):
    config, params = windowed
    a, b = ids(1, 9, seed=1)[0], ids(1, 11, seed=2)[0]
    row, segments = np.concatenate([a, b])[None], np.array([[1] * 9 + [2] * 11])
    positions = np.array([[*range(9), *range(11)]])
    packed = np.asarray(_forward(config, params, row, positions, segments))[0]
    np.testing.assert_allclose(packed[:9], _whole(config, params, a[None])[0], atol=2e-5)
    np.testing.assert_allclose(packed[9:], _whole(config, params, b[None])[0], atol=2e-5)


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
    packed = np.asarray(_forward(config, params, row, positions, segments))[0]
    assert np.isfinite(packed).all()
    np.testing.assert_allclose(packed[:5], _whole(config, params, a[None])[0], atol=2e-5)
    np.testing.assert_allclose(packed[5:14], _whole(config, params, b[None])[0], atol=2e-5)


def test_no_gradient_leaks_between_segments_or_into_padding(config, params, ids):
    row, segments = ids(1, 8), np.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 0, 0]])
    changed = row.copy()
    changed[0, [0, 1, 2, 6, 7]] = 7

    @jax.jit
    def run(params, row):
        def loss(params):
            states = hidden_states(config, params, row, positions, segments)[:, 3:6]
            return jnp.sum(states**2), states

        return jax.grad(loss, has_aux=True)(params)

    (gradient, before), (other, after) = run(params, row), run(params, changed)
    np.testing.assert_array_equal(before, after)
    pairs = zip(*(jax.tree.leaves(g["layers"]) for g in (gradient, other)), strict=True)
    for a, b in pairs:
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_remat_changes_neither_value_nor_gradient(config, params, ids):
    tokens, places = ids(2, 10), np.broadcast_to(np.arange(10), (2, 10))

    def loss(params, remat):
        return hidden_states(config, params, tokens, places, places * 0 + 1, remat=remat)[0].sum()

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = step(params, "none")
    for remat in ("full", "dots"):
        other, same = step(params, remat)
        np.testing.assert_allclose(value, other, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(a).max()))


def test_an_unknown_remat_is_refused_by_name(config, params, ids):
    with pytest.raises(ValueError, match="remat: 'some'; expected one of none, full, dots"):
        _whole(config, params, ids(1, 4), remat="some")


def test_stack_undoes_unstack_beyond_ten_layers(config):
    shapes = param_shapes(dataclasses.replace(config, num_layers=12))
    long = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape), shapes)
    again = stack(unstack(long))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b), long, again))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(config, params, ids, dtype):
    hidden = _whole(config, params, ids(2, 6), dtype=dtype)
    assert hidden.dtype == dtype
    assert logits(config, params, hidden).dtype == jnp.float32
    cache = init_cache(config, 2, 8, dtype)
    new = jnp.full(2, 6)
    out, cache = _extend(config, unstack(params), cache, ids(2, 6), new * 0, new, dtype=dtype)
    assert out.dtype == cache[0]["keys"].dtype == dtype
    tolerance = 2e-5 if dtype == jnp.float32 else 0.15
    np.testing.assert_allclose(np.float32(out), np.float32(hidden), atol=tolerance)


def test_init_has_unit_scale_and_neutral_norms(config):
    init = jax.jit(transformer.init_params, static_argnums=(0, 2))
    tree = jax.tree.map(np.asarray, init(config, jax.random.key(1), jnp.bfloat16))
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
