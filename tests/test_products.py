"""Products with parameters: the same values and gradients as jax's own, in every form they take."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdpo_jax.products import product


def arrays(shape, kernel, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in (shape, kernel)]


@pytest.mark.parametrize(("shape", "kernel", "inputs"), [
    ((2, 40, 12), (12, 30), 1),  # x narrower than what comes out
    ((2, 40, 30), (30, 12), 1),  # wider
    ((2, 40, 12), (12, 3, 5), 1),  # heads come out
    ((2, 40, 3, 5), (3, 5, 12), 2),  # heads go in
    ((1, 37, 12), (12, 30), 1),  # rows that strips do not divide
    ((1, 7, 30), (30, 12), 1),  # fewer than a strip
    ((0, 7, 12), (12, 30), 1),  # none
])  # fmt: skip
def test_gradients_are_those_of_a_plain_product(shape, kernel, inputs):
    x, w = arrays(shape, kernel)

    def loss(f):
        return lambda x, w: jnp.sum(jnp.sin(f(x, w)))

    ours = jax.jit(jax.grad(loss(lambda x, w: product(x, w, inputs)), (0, 1)))(x, w)
    plain = jax.grad(loss(lambda x, w: jnp.tensordot(x, w, inputs)), (0, 1))(x, w)
    for found, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_sums_have_the_type_that_is_asked_for_and_gradients_that_of_what_they_are_for():
    x, w = arrays((1, 20, 12), (12, 30), jnp.bfloat16)

    def loss(x, w):
        out = product(x, w, 1, jnp.float32)
        assert out.dtype == jnp.float32
        return jnp.sum(out * out)

    found = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    wide = [a.astype(jnp.float32) for a in (x, w)]
    expected = jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), (0, 1))(*wide)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=0.01)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_a_loop_converts_nothing_again_and_again(dtype):
    """A CPU keeps what a loop in bfloat16 carries as float32, and rounds all of it every time."""
    x, w = arrays((64, 32), (32, 48), jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda x, w: jnp.sum(product(x, w, 1, dtype) ** 2), 1))
    assert "while(" not in grad.lower(x, w).compile().as_text()


@pytest.mark.parametrize("turned", [False, True])
def test_a_gradient_keeps_its_form_and_no_operand_of_it_is_laid_out_again(turned):
    """XLA's own transpose of a product's operand reads it value by value."""
    x, w = arrays((64, 32), (48, 32) if turned else (32, 48))

    def loss(x, w):
        return jnp.sum(product(x, w.T if turned else w, 1) ** 2)

    grad = jax.jit(jax.grad(loss, 1))
    text = grad.lower(x, w).compile().as_text()
    assert "f32[32,64]" in text
    assert "while(" in text
    assert re.search(r"= f32\[32,48\]\S* dot\(", text), "the product has taken a transpose in"
    copies = [line for line in text.splitlines() if "f32[32,64]" in line and " copy(" in line]
    assert not copies, copies
