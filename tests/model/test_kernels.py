"""The accelerator kernels against attention written out in numpy float64.

Splash and Triton run as plain jax (`interpret`), cuDNN's call through jax's XLA implementation; that
the TPU programs lower is checked, that they run on a TPU is not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.model import attention, kernels, skipping
from mdpo_jax.model.attention import BACKENDS
from mdpo_jax.model.kernels import KERNELS, choose
from mdpo_jax.model.sharding import make_mesh

LENGTH = 200  # not a multiple of 128, and with the block below it takes two blocks of queries
SCALE = 0.3


@pytest.fixture(autouse=True)
def _narrow_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "SPLASH_BLOCK", 128)


def _draw(heads=4, kv_heads=2, rows=2, length=LENGTH, head_dim=16, seed=0):
    """q, k, v and a cotangent for the output."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _segments(rows=2, length=LENGTH):
    """Row 0: three segments and padding; row 1: one segment and a one-token segment; and so on."""
    packed = np.repeat([1, 2, 3, 0], [length // 2, length // 5, length // 5, length])[:length]
    whole = np.r_[np.full(length - 1, 7), 8]
    return np.stack([packed, whole] * rows)[:rows].astype(np.int32)


def _by_hand(q, k, v, g, segments, window, softcap):
    """The output and the gradients of sum(out * g), in float64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    (rows, length, heads, head_dim), kv_heads = q.shape, k.shape[2]
    m = heads // kv_heads
    kr, vr = np.repeat(k, m, axis=2), np.repeat(v, m, axis=2)
    t, s = np.arange(length)[:, None], np.arange(length)[None, :]
    mask = (segments[:, :, None] == segments[:, None, :]) & (s <= t)
    mask &= t - s < (length if window is None else window)
    x = np.einsum("bthk,bshk->bhts", q, kr) * SCALE
    capped = x if softcap is None else softcap * np.tanh(x / softcap)
    weights = np.where(mask[:, None], np.exp(capped - capped.max(-1, keepdims=True)), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshk->bthk", weights, vr)
    dweights = np.einsum("bthk,bshk->bhts", g, vr)
    dx = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dx *= SCALE * (1.0 if softcap is None else 1 - np.tanh(x / softcap) ** 2)
    dq, dk = np.einsum("bhts,bshk->bthk", dx, kr), np.einsum("bhts,bthk->bshk", dx, q)
    dv = np.einsum("bhts,bthk->bshk", weights, g)
    dk, dv = (y.reshape(rows, length, kv_heads, m, head_dim).sum(3) for y in (dk, dv))
    return out, dq, dk, dv


def _run(kernel, q, k, v, g, segments, window, softcap, **options):
    """What `_by_hand` gives, from a kernel."""
    options |= {"scale": SCALE, "window": window, "softcap": softcap}

    def both(q, k, v, g, segments):
        out, pull = jax.vjp(lambda *qkv: kernel(*qkv, segments, **options), q, k, v)
        return out, *pull(g.astype(out.dtype))

    return jax.jit(both)(q, k, v, g, jnp.asarray(segments))


def _same(got, want, out=2e-6, grads=1e-4):
    for a, b, tolerance in zip(got, want, (out, grads, grads, grads), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max(), rtol=0
        )


CASES = [(None, None, 1), (50, None, 4), (LENGTH + 9, 50.0, 2), (50, 5.0, 2)]


@pytest.mark.parametrize(("window", "softcap", "kv_heads"), CASES)
def test_splash_by_hand(window, softcap, kv_heads):
    case = (*_draw(kv_heads=kv_heads), _segments(), window, softcap)
    _same(_run(kernels.splash, *case, interpret=True), _by_hand(*case))


def test_splash_rounds_only_inputs_and_outputs_in_bfloat16():
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in _draw(kv_heads=1, rows=1))
    case = (q, k, v, g, _segments(rows=1), 50, 5.0)
    got = _run(kernels.splash, *case, interpret=True)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    _same(got, _by_hand(*case), out=2e-2, grads=3e-2)


# Key heads that "tensor" does not divide: one, two over four devices, and odd query heads beside them.
MESHES = [(2, 2, 4, 1), (1, 4, 8, 2), (2, 2, 3, 3)]


@pytest.mark.parametrize(("fsdp", "tensor", "heads", "kv_heads"), MESHES)
def test_splash_on_a_mesh(fsdp, tensor, heads, kv_heads):
    case = (*_draw(heads, kv_heads, length=128), _segments(length=128), 50, 50.0)
    with jax.set_mesh(make_mesh(fsdp=fsdp, tensor=tensor)):
        got = _run(kernels.splash, *case, interpret=True)
    _same(got, _by_hand(*case))


def test_rows_and_heads_stay_on_their_devices():
    case = (*_draw(8, 2, length=128), _segments(length=128), 50, 50.0)
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):
        got = _run(kernels.splash, *case, interpret=True)
    _same(got, _by_hand(*case))
    shapes = [{shard.data.shape for shard in x.addressable_shards} for x in got]
    assert shapes == [{(1, 128, 4, 16)}] * 2 + [{(1, 128, 1, 16)}] * 2


def test_a_trace_leaves_nothing_to_the_next():
    q, k, v, _ = _draw(1, 1, rows=1, length=128)
    segments = jnp.ones((1, 128), jnp.int32)
    layer = functools.partial(kernels.splash, scale=SCALE, window=50, softcap=None, interpret=True)

    @jax.jit
    @jax.value_and_grad
    def scanned(q):
        def body(x, _):
            return layer(x, k, v, segments), None

        return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), q, length=2)[0].sum()

    once = jax.jit(layer)  # traced inside of no other program
    want = once(once(q, k, v, segments), k, v, segments).sum()
    value, gradient = scanned(q)
    np.testing.assert_allclose(value, want, atol=1e-4)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("length", "want"), [(1, (128, 1)), (512, (512, 1)), (600, (384, 2)), (2176, (512, 5))]
)
def test_splash_blocks_fit_the_row(length, want, monkeypatch):
    monkeypatch.setattr(kernels, "SPLASH_BLOCK", 512)
    assert kernels._splash_blocks(length) == want


def _real(case):
    """The case with no cotangent at padding, and a function that takes padding out of results."""
    *arrays, g, segments, window, softcap = case
    real = (segments > 0)[:, :, None, None]
    return (*arrays, g * real, segments, window, softcap), lambda xs: [x * real for x in xs]


@pytest.mark.parametrize(("window", "softcap", "kv_heads"), CASES)
def test_skipping_by_hand(window, softcap, kv_heads):
    case, real = _real((*_draw(kv_heads=kv_heads), _segments(), window, softcap))
    _same(real(_run(skipping.skipping, *case)), real(_by_hand(*case)))


def test_skipping_rounds_only_inputs_weights_and_outputs_in_bfloat16():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in _draw(kv_heads=1, rows=1)]
    case, real = _real((*arrays, _segments(rows=1), 50, 5.0))
    got = _run(skipping.skipping, *case)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    _same(real(got), real(_by_hand(*case)), out=2e-2, grads=3e-2)


@pytest.mark.parametrize(("fsdp", "tensor", "heads", "kv_heads"), MESHES)
def test_skipping_on_a_mesh(fsdp, tensor, heads, kv_heads):
    case, real = _real((*_draw(heads, kv_heads, length=128), _segments(length=128), 50, 50.0))
    with jax.set_mesh(make_mesh(fsdp=fsdp, tensor=tensor)):
        got = _run(skipping.skipping, *case)
    _same(real(got), real(_by_hand(*case)))


def test_what_lies_outside_of_a_segment_or_a_window_is_not_computed():
    block = skipping.BLOCK
    q, k, v, g = _draw(rows=1, length=4 * block)
    v[:, : 2 * block] = np.nan  # times a weight of 0 it would still be seen
    g[:, : 2 * block] = 0
    segments = np.repeat([[1, 2]], 2 * block, axis=1).astype(np.int32)
    for case in ((segments, None, None), (np.ones_like(segments), block + 1, None)):
        out, *grads = (np.asarray(x) for x in _run(skipping.skipping, q, k, v, g, *case))
        seen = slice(2 * block if case[1] is None else 3 * block, None)
        assert np.isfinite(out[:, seen]).all()
        assert not np.isfinite(out[:, : 2 * block]).any()
        assert np.isfinite(grads[0][:, seen]).all()


# Two pairs of sequences, each of which goes on from a prompt, and one alone; then padding: places of
# the sequence, and of its prompt.  The second skips blocks between its prompt and itself.
TREE = [(0, 30), (30, 150, 0, 30), (150, 260, 0, 30), (260, 270), (270, 275, 260, 270),
        (275, 340, 260, 270), (340, 370)]  # fmt: skip


def _tree(length):
    """Segments and the prefix of `TREE`, for two rows: itself, and one segment alone."""
    segments, bounds = np.zeros((2, length), np.int32), np.zeros((2, length, 2), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    segments[1] = 1
    for i, (start, stop, *prompt) in enumerate(TREE, 1):
        before = prompt[1] - prompt[0] if prompt else 0
        segments[0, start:stop] = i
        positions[0, start:stop] = before + np.arange(stop - start)
        bounds[0, start:stop] = prompt or (0, 0)
    return segments, kernels.Prefix(jnp.asarray(bounds), jnp.asarray(positions))


def _tree_by_hand(q, k, v, g, window, softcap):
    """Every sequence of `TREE` alone, with its prompt before it, in float64; the row alone besides."""
    total = [np.zeros(x.shape) for x in (q, q, k, v)]
    whole = (1, np.arange(q.shape[1]), 0)
    runs = [
        (0, np.r_[np.arange(*prompt or (0, 0)), start:stop], prompt[1] - prompt[0] if prompt else 0)
        for start, stop, *prompt in TREE
    ]
    for row, places, before in [whole, *runs]:
        here = [x[row : row + 1, places] for x in (q, k, v, g)]
        here[3] = np.where(np.arange(len(places))[:, None, None] < before, 0, here[3])
        out, *grads = _by_hand(*here, np.ones((1, len(places)), np.int32), window, softcap)
        total[0][row, places[before:]] = out[0, before:]
        for sums, part in zip(total[1:], grads, strict=True):
            np.add.at(sums[row], places, part[0])
    return total


@pytest.mark.parametrize("backend", ["skipping", "reference"])
@pytest.mark.parametrize(("window", "softcap", "kv_heads"), [(None, None, 1), (50, 5.0, 2)])
def test_sequences_that_go_on_from_one_prompt(backend, window, softcap, kv_heads, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 128)
    q, k, v, g = _draw(kv_heads=kv_heads, length=400)
    g[0, TREE[-1][1] :] = 0  # padding
    segments, prefix = _tree(400)
    got = _run(BACKENDS[backend], q, k, v, g, segments, window, softcap, prefix=prefix)
    got[0].block_until_ready()
    out = np.array(got[0])
    out[0, TREE[-1][1] :] = 0
    _same((out, *got[1:]), _tree_by_hand(q, k, v, g, window, softcap))


def test_blocks_between_a_prompt_and_what_goes_on_from_it_are_not_computed():
    block = skipping.BLOCK
    q, k, v, g = _draw(rows=1, length=4 * block)
    v[:, block : 3 * block] = np.nan  # the first of two that go on from block 0
    g[:, block : 3 * block] = 0
    segments = np.repeat([[1, 2, 2, 3]], block, axis=1).astype(np.int32)
    bounds = np.zeros((1, 4 * block, 2), np.int32)
    bounds[:, block:] = 0, block
    positions = np.r_[np.arange(3 * block), np.arange(block, 2 * block)][None].astype(np.int32)
    prefix = kernels.Prefix(jnp.asarray(bounds), jnp.asarray(positions))
    out, dq, *_ = _run(skipping.skipping, q, k, v, g, segments, None, None, prefix=prefix)
    seen = np.r_[:block, 3 * block : 4 * block]
    assert np.isfinite(out[:, seen]).all()
    assert not np.isfinite(out[:, block : 3 * block]).any()
    assert np.isfinite(dq[:, seen]).all()


def test_triton_by_hand():
    case = (*_draw(kv_heads=2, head_dim=160), _segments(), LENGTH, None)
    _same(_run(kernels.pallas_triton, *case, interpret=True), _by_hand(*case), out=1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_cudnn_is_asked_for_the_same_attention(window, monkeypatch):
    call = jax.nn.dot_product_attention

    def in_float32_by_xla(q, k, v, *, mask, implementation, **options):
        assert implementation == "cudnn"
        assert q.shape[1] % 64 == 0
        assert mask.shape == (2, 1, *q.shape[1:2] * 2)
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return call(q, k, v, mask=mask, implementation="xla", **options).astype(jnp.bfloat16)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_float32_by_xla)
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in _draw(kv_heads=2))
    case = (q, k, v, g, _segments(), window, None)
    _same(_run(kernels.cudnn, *case), _by_hand(*case), out=1e-2, grads=2e-2)
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in _draw(length=400))
    segments, prefix = _tree(400)
    got = _run(kernels.cudnn, q, k, v, g, segments, window, None, prefix=prefix)
    want = _run(BACKENDS["reference"], q, k, v, g, segments, window, None, prefix=prefix)
    _same(got, [np.asarray(x, np.float64) for x in want], out=1e-2, grads=2e-2)


REFUSALS = [
    ("cudnn", {"softcap": 50.0}, "cudnn: softcap: 50.0; expected None"),
    ("cudnn", {"dtype": jnp.float32}, "cudnn: dtype: float32; expected bfloat16 or float16"),
    ("cudnn", {"head_dim": 12}, "cudnn: head_dim: 12; expected a multiple of 8, at most 256"),
    ("cudnn", {"head_dim": 264}, "cudnn: head_dim: 264; expected a multiple of 8"),
    ("pallas_triton", {"softcap": 50.0}, "pallas_triton: softcap: 50.0; expected None"),
    ("pallas_triton", {"window": 5}, "window: 5; expected None or at least the length 8"),
    ("pallas_triton", {"head_dim": 512}, "pallas_triton: head_dim: 512; expected at most 256"),
    ("splash", {"dtype": jnp.float16}, "dtype: float16; expected bfloat16 or float32"),
    ("splash", {"window": 0}, "splash: window: 0; expected None or a positive integer"),
    ("splash", {"kv_heads": 3}, "splash: kv_heads: 3; expected a divisor of the 4 heads"),
    ("splash", {"prefix": ()}, "splash: prefix: one; expected None; segments that go on"),
    ("pallas_triton", {"prefix": ()}, "need reference, skipping, cudnn"),
]


@pytest.mark.parametrize(("backend", "change", "message"), REFUSALS)
def test_what_a_kernel_cannot_do_is_refused(backend, change, message):
    shape = {"kv_heads": 2, "head_dim": 16} | {
        name: change[name] for name in ("kv_heads", "head_dim") if name in change
    }
    dtype = change.get("dtype", jnp.bfloat16)
    q, k, v, _ = (jnp.asarray(x, dtype) for x in _draw(rows=1, length=8, **shape))
    options = {name: change.get(name) for name in ("window", "softcap", "prefix")}
    with pytest.raises(ValueError, match=message):
        KERNELS[backend](q, k, v, jnp.ones((1, 8), jnp.int32), scale=1.0, **options)


GEMMA = {"window": None, "softcap": None, "head_dim": 256, "length": 4096, "dtype": jnp.bfloat16}
GEMMA2 = GEMMA | {"window": 4096, "softcap": 50.0}
CHOICES = [
    ("cpu", GEMMA, "skipping"),
    ("tpu", GEMMA, "splash"),
    ("tpu", GEMMA2, "splash"),
    ("tpu", GEMMA | {"head_dim": 96, "dtype": "float32"}, "splash"),
    ("tpu", GEMMA | {"dtype": jnp.float16}, "reference"),
    ("gpu", GEMMA, "cudnn"),
    ("gpu", GEMMA | {"window": 4096}, "cudnn"),
    ("cuda", GEMMA, "cudnn"),
    ("gpu", GEMMA2, "reference"),
    ("gpu", GEMMA | {"dtype": jnp.float32}, "reference"),
    ("gpu", GEMMA | {"head_dim": 288}, "reference"),
    ("gpu", GEMMA | {"length": 32768}, "reference"),
    ("METAL", GEMMA, "reference"),
]


@pytest.mark.parametrize(("platform", "case", "want"), CHOICES)
def test_choice_by_platform(platform, case, want):
    assert choose(platform, **case) == want
    assert want in BACKENDS


@pytest.mark.parametrize(
    ("capability", "head_dim", "want"),
    [
        ("9.0", 256, "cudnn"),
        ("8.0", 256, "reference"),
        ("8.0", 128, "cudnn"),
        ("gfx90a", 64, "reference"),
    ],
)
def test_choice_by_card(capability, head_dim, want, monkeypatch):
    card = type("Card", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "devices", lambda: [card])
    assert choose("gpu", **GEMMA | {"head_dim": head_dim}) == want


@pytest.mark.parametrize(("window", "softcap", "kv_heads"), [(None, None, 4), (300, 50.0, 2)])
def test_splash_lowers_for_tpu(window, softcap, kv_heads, monkeypatch):
    monkeypatch.setattr(kernels, "SPLASH_BLOCK", 512)
    options = {"scale": 0.0625, "window": window, "softcap": softcap}
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, k = shape((2, 600, 4, 256)), shape((2, 600, kv_heads, 256))
    segments = jax.ShapeDtypeStruct((2, 600), jnp.int32)

    def loss(q, k, v, segments):
        return kernels.splash(q, k, v, segments, **options).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segments)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for name in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{name}_segmented" in text
